"""Rebuild the sprite sheets of sticker scenes from pinned packages: one RGBA WebP a style, concepts in rows of 8.

A developers' tool: users and tests never run it. It needs `npm` on the path and the package `resvg-py` 0.5.0.

    python tools/build_stickers.py --cache ~/.cache/fewstep-build --out world/stickers

The licence texts are no output of it: another folder gets a copy of those of the bundled world.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import shutil
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import resvg_py
from PIL import Image

from fewstep.common.files import atomic_write
from fewstep_worlds.common.location import STICKERS, root
from fewstep_worlds.stickers.sprites import COLUMNS, EDGE
from fewstep_worlds.stickers.vocabulary import CONCEPTS

RENDER = 256
"""Edge in pixels at which vector artwork is drawn before it is reduced."""


@dataclass(frozen=True)
class Package:
    """A pinned npm package of vector icons and the sha256 of its tarball."""

    npm: str
    version: str
    sha256: str

    @property
    def pin(self) -> str:
        """Return name@version."""
        return f"{self.npm}@{self.version}"


PACKAGES = {
    "noto": Package("@iconify-json/noto", "1.2.9", "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad"),
    "twemoji": Package(
        "@iconify-json/twemoji", "1.2.5", "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7"
    ),
    "fluent": Package(
        "@iconify-json/fluent-emoji-flat", "1.2.6", "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175"
    ),
    "emojione": Package(
        "@iconify-json/emojione", "1.2.3", "26a14f44284407e8bcde91799388dca2bfd91dbcd55a97f425524a1c5b73610e"
    ),
}
"""Style -> the package that draws it."""
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


def fetch(package: Package, cache: Path) -> Path:
    """Return the package's tarball, packed into `cache` if it is not there; refuse one with another hash."""
    cache.mkdir(parents=True, exist_ok=True)
    path = cache / f"{package.npm.lstrip('@').replace('/', '-')}-{package.version}.tgz"
    if not path.is_file():
        command = ["npm", "pack", "--silent", package.pin]
        subprocess.run(command, cwd=cache, check=True, stdout=subprocess.DEVNULL)
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != package.sha256:
        raise SystemExit(f"{path}: sha256 is {found}, expected {package.sha256}; remove it and find out why")
    return path


def read_member(tarball: Path, name: str) -> Any:
    """Return a JSON file of a package."""
    with tarfile.open(tarball) as archive:
        stream = archive.extractfile(f"package/{name}")
        assert stream is not None
        return json.load(stream)


def svg_text(icons: Any, name: str) -> str:
    """Return an Iconify icon as an SVG document of RENDER x RENDER pixels; some sets add "-face" to its name."""
    icon = icons["icons"].get(name) or icons["icons"][f"{name}-face"]
    left, top = (icon.get(key, icons.get(key, 0)) for key in ("left", "top"))
    width, height = (icon.get(key, icons.get(key, 16)) for key in ("width", "height"))
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{left} {top} {width} {height}" width="{RENDER}" height="{RENDER}">{icon["body"]}</svg>'
    )


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
    """Write the sheets and the attribution."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    own = root() / STICKERS
    parser.add_argument("--cache", type=Path, default=Path("~/.cache/fewstep-build"), help="for the tarballs")
    parser.add_argument("--out", type=Path, default=own)
    parser.add_argument("--quality", type=int, default=92, help="of the sheets' colours; transparency is lossless")
    options = parser.parse_args()

    cache = options.cache.expanduser()
    names = read_member(fetch(PACKAGES["noto"], cache), "chars.json")
    options.out.mkdir(parents=True, exist_ok=True)
    for style, package in PACKAGES.items():
        icons = read_member(fetch(package, cache), "icons.json")
        sheet = Image.new("RGBA", (COLUMNS * EDGE, -(-len(CONCEPTS) // COLUMNS) * EDGE))
        for number, concept in enumerate(CONCEPTS.values()):
            tile = draw(svg_text(icons, names[concept.code]))
            sheet.paste(tile, (number % COLUMNS * EDGE, number // COLUMNS * EDGE))
        path = options.out / f"{style}.webp"
        with atomic_write(path) as part:
            sheet.save(part, "WEBP", quality=options.quality, alpha_quality=100, method=6)
        print(f"{style:10s} {path.stat().st_size / 1024:6.1f} KiB")
    pins = {style: package.pin for style, package in PACKAGES.items()}
    with atomic_write(options.out / "ATTRIBUTION.md") as part:
        part.write_text(CREDITS.format(**pins, count=len(CONCEPTS), edge=EDGE), encoding="utf-8")
    if options.out.resolve() != own.resolve():
        shutil.copytree(own / "LICENSES", options.out / "LICENSES", dirs_exist_ok=True)


if __name__ == "__main__":
    main()
