"""The drawn emoji that scenes are made of: one RGBA WebP sheet a style, cut into sprites of several sizes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

from PIL import Image

from fewstep.common.errors import UserError
from fewstep_worlds.common.location import STICKERS, root
from fewstep_worlds.stickers.vocabulary import NAMES, STYLES

EDGE = 64
"""Edge of a sprite in its sheet, in pixels; the drawing touches the edge with its longer side."""
COLUMNS = 8
SIZES = (64, 48, 36, 27, 20, 15)
"""Edges at which a sprite is kept, so that drawing it smaller needs no more than a bilinear reduction."""
FOLDER_VARIABLE = "FEWSTEP_STICKERS"

Sprites = Mapping[tuple[str, str], Mapping[int, Image.Image]]
"""(concept, style) -> edge in pixels -> RGBa picture (colours premultiplied by transparency)."""


def sprite_folder() -> Path:
    """Return the folder of the sheets: $FEWSTEP_STICKERS, or else that of the bundled world."""
    named = os.environ.get(FOLDER_VARIABLE)
    return Path(named) if named else root() / STICKERS


@lru_cache(maxsize=2)
def load_sprites(folder: Path) -> Sprites:
    """Read the sheets of all styles in `folder`.

    Raises:
        UserError: a sheet is missing, unreadable, or of another size than the vocabulary's.
    """
    return {key: sprite for style in STYLES for key, sprite in _read_sheet(folder, style).items()}


def _read_sheet(folder: Path, style: str) -> dict[tuple[str, str], dict[int, Image.Image]]:
    path = folder / f"{style}.webp"
    expected = (COLUMNS * EDGE, -(-len(NAMES) // COLUMNS) * EDGE)
    try:
        with Image.open(path) as opened:
            sheet = opened.convert("RGBA").convert("RGBa")
    except (OSError, ValueError) as error:
        raise UserError(
            f"sprite sheet {path} cannot be read: {getattr(error, 'strerror', None) or error}; "
            f"build it with tools/build_stickers.py, or set {FOLDER_VARIABLE} to the folder that holds it"
        ) from error
    if sheet.size != expected:
        raise UserError(f"sprite sheet {path} has {sheet.size} pixels, expected {expected}; build it again")
    result = {}
    for number, concept in enumerate(NAMES):
        left, top = number % COLUMNS * EDGE, number // COLUMNS * EDGE
        whole = sheet.crop((left, top, left + EDGE, top + EDGE))
        result[concept, style] = {size: _reduced(whole, size) for size in SIZES}
    return result


def _reduced(sprite: Image.Image, size: int) -> Image.Image:
    """Return the sprite at size x size in the middle of a transparent margin, which a turned copy is sampled from."""
    inner = sprite if size == EDGE else sprite.resize((size, size), Image.Resampling.BOX)
    margin = Image.new("RGBa", (size + 2, size + 2))
    margin.paste(inner, (1, 1))
    return margin
