"""Draw Emoji-8's artwork and write it as contact sheets."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import numpy.typing as npt
import resvg_py
from PIL import Image

from fewstep.common.files import atomic_write
from fewstep_worlds.emoji8.dataset import COLUMNS, SIZE, read_sheet

STEP = 8
"""Colours are rounded to steps of 8 below white, which makes lossless WebP small and keeps white 255. Lossy
WebP halves the resolution of colour: flat art with hard edges loses 10 dB to that at the same size."""


def draw(artwork: str | bytes) -> npt.NDArray[np.uint8]:
    """Draw an SVG text or a raster file on white, uint8 [SIZE, SIZE, 3]."""
    if isinstance(artwork, str):
        artwork = bytes(resvg_py.svg_to_bytes(svg_string=artwork, skip_system_fonts=True))
    picture = Image.open(io.BytesIO(artwork)).convert("RGBA")
    white = Image.new("RGBA", picture.size, "white")
    white.alpha_composite(picture)
    return np.asarray(white.convert("RGB").resize((SIZE, SIZE), Image.Resampling.LANCZOS))


def posterise(pictures: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Round every channel to the levels 255, 255 - STEP, 255 - 2 STEP, ..., clipped at 0; same shape."""
    below = np.rint((255 - pictures.astype(np.float32)) / STEP) * STEP
    levels: npt.NDArray[np.uint8] = np.maximum(255 - below, 0).astype(np.uint8)
    return levels


def write_sheet(tiles: npt.NDArray[np.uint8], path: Path) -> float:
    """Write tiles [N, SIZE, SIZE, 3] as a contact sheet; return the mean PSNR of the tiles in dB."""
    rows = -(-len(tiles) // COLUMNS)
    padded = np.full((rows * COLUMNS, SIZE, SIZE, 3), 255, dtype=np.uint8)
    padded[: len(tiles)] = posterise(tiles)
    grid = padded.reshape(rows, COLUMNS, SIZE, SIZE, 3).swapaxes(1, 2)
    sheet = grid.reshape(rows * SIZE, COLUMNS * SIZE, 3)
    with atomic_write(path) as part:
        Image.fromarray(sheet).save(part, format="WebP", lossless=True, quality=100, method=6)
    back = read_sheet(path)
    if not np.array_equal(back, padded):
        raise SystemExit(f"{path} does not read back as it was written")
    error = ((back[: len(tiles)].astype(np.float32) - tiles) ** 2).mean(axis=(1, 2, 3), dtype=np.float64)
    return float((10 * np.log10(255**2 / np.maximum(error, 1e-2))).mean())
