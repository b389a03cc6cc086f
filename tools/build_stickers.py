"""Rebuild the sprite sheets of sticker scenes from pinned packages: one RGBA WebP a style, concepts in rows of 8.

A developers' tool: users and tests never run it. It needs `npm` on the path and the package `resvg-py` 0.5.0.

    python tools/build_stickers.py --cache ~/.cache/fewstep-build --out world/stickers
"""

from __future__ import annotations

import argparse
import io
import shutil
from pathlib import Path

import resvg_py
from PIL import Image

from emoji8_sources import CAPTIONS, SOURCES, fetch, match_icons, read_concepts, read_json_members, svg_text
from fewstep.common.files import atomic_write
from fewstep_worlds.stickers.sprites import COLUMNS, EDGE
from fewstep_worlds.stickers.vocabulary import CONCEPTS

ARTWORK = {"noto": "noto", "twemoji": "twemoji", "fluent": "fluent-flat", "emojione": "emojione"}
"""Style -> the source that draws it."""
LICENCES = ("Apache-2.0", "CC-BY-4.0", "MIT")
CREDITS = """# Attribution

The sprites are artwork of the holders below, none of whom endorses this project. Full licence texts are in `LICENSES/`.

| sheet | artwork | holder | licence | package |
| --- | --- | --- | --- | --- |
| `noto` | [Noto Emoji] | Copyright 2013 Google, Inc. | Apache-2.0 | `{noto}` |
| `twemoji` | [Twemoji] | © Twitter, Inc and other contributors | CC BY 4.0 | `{twemoji}` |
| `fluent` | [Fluent Emoji], flat | Copyright (c) Microsoft Corporation | MIT | `{fluent}` |
| `emojione` | [EmojiOne 2.3] | © EmojiOne | CC BY 4.0 | `{emojione}` |

[Noto Emoji]: https://github.com/googlefonts/noto-emoji
[Twemoji]: https://github.com/jdecked/twemoji
[Fluent Emoji]: https://github.com/microsoft/fluentui-emoji
[EmojiOne 2.3]: https://github.com/EmojiTwo/emojitwo

**Changes made, to every sheet:** {count} emoji were chosen, rasterised at 256x256 pixels, cropped to what is not
transparent, reduced to fit {edge}x{edge} pixels with a Lanczos filter, and tiled into one WebP sheet (lossy colour).
The vector packages were made by [Iconify](https://iconify.design).

Models trained on these pictures should carry this attribution in their model cards.
"""


def draw(svg: str) -> Image.Image:
    """Rasterise an icon, RGBA, cropped to its opaque part and fitted in the middle of an EDGE x EDGE tile."""
    picture = Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg, skip_system_fonts=True))))
    picture = picture.convert("RGBA")
    picture = picture.crop(picture.getchannel("A").point(lambda level: 255 * (level > 16)).getbbox())
    scale = EDGE / max(picture.size)
    width, height = (max(round(scale * side), 1) for side in picture.size)
    tile = Image.new("RGBA", (EDGE, EDGE))
    tile.paste(picture.resize((width, height), Image.Resampling.LANCZOS), ((EDGE - width) // 2, (EDGE - height) // 2))
    return tile


def main() -> None:
    """Write the sheets, the attribution and the licence texts."""
    parser = argparse.ArgumentParser(description=__doc__)
    root = Path(__file__).parents[1]
    parser.add_argument("--cache", type=Path, default=Path("~/.cache/fewstep-build"), help="for the tarballs")
    parser.add_argument("--out", type=Path, default=root / "world" / "stickers")
    parser.add_argument("--quality", type=int, default=92, help="of the sheets' colours; transparency is lossless")
    options = parser.parse_args()

    cache = options.cache.expanduser()
    _, labels = read_concepts(fetch(CAPTIONS, cache))
    sources = {"noto", *ARTWORK.values()}
    files = ("package/icons.json", "package/chars.json")
    sets = {source: tuple(read_json_members(fetch(SOURCES[source], cache), *files)) for source in sources}
    icons = match_icons({source: (sets[source][0], sets[source][1]) for source in sorted(sets)}, labels)
    (options.out / "LICENSES").mkdir(parents=True, exist_ok=True)
    for style, source in ARTWORK.items():
        sheet = Image.new("RGBA", (COLUMNS * EDGE, -(-len(CONCEPTS) // COLUMNS) * EDGE))
        for number, concept in enumerate(CONCEPTS.values()):
            tile = draw(svg_text(sets[source][0], icons[source][concept.code]))
            sheet.paste(tile, (number % COLUMNS * EDGE, number // COLUMNS * EDGE))
        path = options.out / f"{style}.webp"
        with atomic_write(path) as part:
            sheet.save(part, "WEBP", quality=options.quality, alpha_quality=100, method=6)
        print(f"{style:10s} {path.stat().st_size / 1024:6.1f} KiB")
    pins = {style: SOURCES[source].pin for style, source in ARTWORK.items()}
    with atomic_write(options.out / "ATTRIBUTION.md") as part:
        part.write_text(CREDITS.format(**pins, count=len(CONCEPTS), edge=EDGE), encoding="utf-8")
    for licence in LICENCES:
        shutil.copy(root / "world" / "emoji8" / "LICENSES" / f"{licence}.txt", options.out / "LICENSES")


if __name__ == "__main__":
    main()
