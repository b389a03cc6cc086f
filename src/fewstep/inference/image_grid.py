"""Tile pictures into one grid and write it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo

from fewstep.common.errors import UserError
from fewstep.common.files import atomic_write

GAP = 4
"""Pixels between the pictures of a grid."""
LONGEST = {".webp": 16383, ".jpg": 65535, ".jpeg": 65535, ".png": 2**20}
"""Largest side of a file in pixels: WebP's and JPEG's own limits, and more than PNG viewers show."""
KINDS = {".png": "PNG", ".webp": "WEBP", ".jpg": "JPEG", ".jpeg": "JPEG"}
"""Suffix -> format, as Pillow names it."""
MOST = 2**29
"""Largest number of pixels of a grid: 2 GiB in memory."""


def grid_size(n: int, size: tuple[int, int], columns: int, scale: int) -> tuple[int, int]:
    """Return (width, height) in pixels of a grid of n pictures of a size (width, height)."""
    gap = GAP if n > 1 else 0
    return columns * (size[0] * scale + gap) + gap, -(-n // columns) * (size[1] * scale + gap) + gap


def check_grid_size(n: int, size: tuple[int, int], columns: int, scale: int, path: Path) -> None:
    """Refuse a grid that its file format cannot hold, before its pictures are drawn."""
    width, height = grid_size(n, size, columns, scale)
    longest = LONGEST.get(path.suffix.lower(), MOST)
    if max(width, height) > longest or width * height > MOST:
        limit = f"{longest} a side" if max(width, height) > longest else f"{MOST} in all"
        raise UserError(
            f"out = {str(path)!r}: a grid of {n} pictures has {width}x{height} pixels, but {path.suffix} files at most "
            f"{limit}; draw fewer pictures, use a smaller scale, or write a .png file"
        )


def image_grid(pictures: np.ndarray, columns: int, scale: int = 2) -> Image.Image:
    """Tile pictures row by row on white, enlarged by a whole factor; a single one has no margin."""
    n, h, w, _ = pictures.shape
    gap = GAP if n > 1 else 0
    canvas = Image.new("RGB", grid_size(n, (w, h), columns, scale), "white")
    for i, picture in enumerate(pictures):
        tile = Image.fromarray(picture).resize((w * scale, h * scale), Image.Resampling.NEAREST)
        canvas.paste(tile, (gap + (i % columns) * (w * scale + gap), gap + (i // columns) * (h * scale + gap)))
    return canvas


def labelled_grid(rows: Sequence[tuple[str, np.ndarray]], labels: Sequence[str], scale: int = 2) -> Image.Image:
    """Tile rows of pictures with a name before each row and a label over each column."""
    margin, head = 150, 18
    body = image_grid(np.concatenate([pictures for _, pictures in rows]), len(labels), scale)
    canvas = Image.new("RGB", (body.width + margin, body.height + head), "white")
    canvas.paste(body, (margin, head))
    write = ImageDraw.Draw(canvas)
    wide = (body.width - 4) / len(labels)
    high = (body.height - 4) / len(rows)
    for i, label in enumerate(labels):
        write.text((margin + 4 + i * wide, 4), label[: int(wide // 6)], fill="black")
    for i, (name, _) in enumerate(rows):
        write.text((4, head + 4 + (i + 0.45) * high), name, fill="black")
    return canvas


def check_picture_file(path: Path) -> None:
    """Refuse a file that ends like no picture that is written."""
    if path.suffix.lower() not in KINDS:
        near = path.with_suffix(".png").name
        raise UserError(f"out = {str(path)!r} must end in .png, .jpg or .webp, or name a folder; use {near!r}")


def save_image(image: Image.Image, path: Path, text: Mapping[str, str] | None = None) -> Path:
    """Write a picture (PNG, JPEG or lossless WebP by its suffix), atomically.

    Args:
        text: entries of a PNG; left out of other formats.

    Raises:
        UserError: another suffix, or the file cannot be written.
    """
    check_picture_file(path)
    kind = KINDS[path.suffix.lower()]
    options: dict[str, Any] = {"lossless": True} if kind == "WEBP" else {"quality": 95} if kind == "JPEG" else {}
    if kind == "PNG" and text:
        options["pnginfo"] = PngInfo()
        for name, value in text.items():
            options["pnginfo"].add_itxt(name, value)
    with atomic_write(path) as part:
        image.save(part, format=kind, **options)
    return path
