"""Draw the README's first picture: eight prompts by the bundled teacher and its TCD student, from the same noise.

    python tools/readme_picture.py --out docs/assets/first-screen.webp

Rows are samplers, columns the first eight validation prompts of the bundled world. A guided call of the teacher is two
network evaluations. n = 8 pictures a row, seeds 0 to 7, CPU.
"""

from __future__ import annotations

import argparse
import tempfile
import textwrap
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

import fewstep
from fewstep.common.defaults import world

ROWS: tuple[tuple[str, str | None, dict[str, object]], ...] = (
    ("teacher, 2 steps\n4 evaluations", None, {"sampler": "ddim", "steps": 2, "omega": 2.0}),
    ("TCD student, 4 steps\n4 evaluations", "tcd", {"steps": 4}),
    ("teacher, 50 steps\n100 evaluations", None, {"sampler": "ddim", "steps": 50, "omega": 2.0}),
)
COLUMNS, TILE, MARGIN, HEAD, GAP = 8, 96, 150, 104, 4


def draw_row(prompts: list[str], lora: str | None, settings: dict[str, object]) -> list[Image.Image]:
    """Return one picture [TILE, TILE] of each prompt; the i-th starts from the noise of seed i."""
    with tempfile.TemporaryDirectory() as folder:
        path = fewstep.sample(prompts, out=Path(folder) / "row.png", lora=lora, scale=1, settings=settings)
        column = Image.open(path).convert("RGB")
    side = (column.height - GAP) // len(prompts) - GAP  # `sample` puts GAP pixels around each picture
    tiles = [
        column.crop((GAP, GAP + i * (side + GAP), GAP + side, (i + 1) * (side + GAP))) for i in range(len(prompts))
    ]
    return [tile.resize((TILE, TILE), Image.Resampling.LANCZOS) for tile in tiles]


def compose(prompts: list[str], rows: list[list[Image.Image]]) -> Image.Image:
    """Return the rows with a name on the left and the prompts above."""
    width, height = MARGIN + COLUMNS * (TILE + GAP), HEAD + len(rows) * (TILE + GAP)
    canvas = Image.new("RGB", (width, height), "white")
    pen, font, small = ImageDraw.Draw(canvas), ImageFont.load_default(13), ImageFont.load_default(11)
    for i, prompt in enumerate(prompts):
        centre = (MARGIN + (i + 0.5) * (TILE + GAP), HEAD / 2)
        pen.multiline_text(centre, textwrap.fill(prompt, 16), "black", small, anchor="mm", align="center", spacing=2)
    for j, ((name, _, _), tiles) in enumerate(zip(ROWS, rows, strict=True)):
        top = HEAD + j * (TILE + GAP)
        pen.multiline_text((8, top + TILE / 2), name, "black", font, anchor="lm", spacing=5)
        for i, tile in enumerate(tiles):
            canvas.paste(tile, (MARGIN + i * (TILE + GAP), top))
    return canvas


def main() -> None:
    """Draw and write the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/assets/first-screen.webp"))
    parser.add_argument("--quality", type=int, default=65, help="of the WebP file, 0 to 100")
    options = parser.parse_args()
    prompts = list(world().read_prompts("validation")[:COLUMNS])
    picture = compose(prompts, [draw_row(prompts, lora, settings) for _, lora, settings in ROWS])
    picture.save(options.out, quality=options.quality, method=6)
    print(f"{options.out}: {picture.width} x {picture.height}, {options.out.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
