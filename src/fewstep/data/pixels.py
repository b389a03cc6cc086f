"""Conversion of pictures of 16 and 32 bits and of floating point to 8 bits, scaled by their white, never clipped."""

from __future__ import annotations

import numpy as np
from PIL import Image

SLACK = 1e-3
"""Share of the white by which floating-point values may exceed the range."""
FAINT = 16.0
"""Floating-point pictures with a maximum above 1 and below this are ambiguous: nearly black at a white of 255."""
GREY_16 = b"\x89PNG\r\n\x1a\n", 24, b"\x10\x00"
"""Header of a grey PNG of 16 bits: signature, and an offset with bit depth and colour type."""
HEAD = 26
"""Bytes that `is_deep_png` needs."""

BITS, PHOTOMETRIC = 258, 262
"""TIFF's tags: bits of a value, and whether 0 is black (1) or white (0)."""


def eight_bits(image: Image.Image, opened: Image.Image) -> Image.Image:
    """Return a picture with 8 bits a channel; one that has them already is returned itself.

    Args:
        image: in Pillow's modes of one deep channel (I;16, I and F), or in any other.
        opened: the same picture as Pillow opened it, whose format decides what is white.

    Raises:
        ValueError: a value is not finite, or not between black and white, so that the white is unknown.
    """
    if not image.mode.startswith("I") and image.mode != "F":
        return image
    values = np.asarray(image).astype(np.float64)
    low, high = float(values.min()), float(values.max())
    tags = getattr(opened, "tag_v2", {})
    white = _white(image.mode, high, opened.format, tags.get(BITS, (0,))[0])
    slack = SLACK * white if image.mode == "F" else 0.0
    faint = image.mode == "F" and 1 + SLACK < high < FAINT  # light above 1, not 255 levels
    if faint or not (-slack <= low and high <= white + slack):  # also false for values that are not finite
        raise ValueError(
            f"values from {low:g} to {high:g}, whose white is unknown; save it as 8 bits, or 16 unsigned ones"
        )
    scaled = values.clip(0, white) / white
    if tags.get(PHOTOMETRIC) == 0:
        scaled = 1 - scaled
    grey = Image.fromarray(np.rint(scaled * 255).astype(np.uint8))
    hole = image.info.get("transparency")
    if isinstance(hole, int):
        grey.putalpha(Image.fromarray(np.where(values == hole, 0, 255).astype(np.uint8)))
    return grey


def _white(mode: str, high: float, format_name: str | None, bits: int) -> float:
    """Return the value that is white.

    Args:
        high: the largest value.
        bits: of a TIFF's values; 0 for other formats.
    """
    if mode == "F":
        return 1.0 if high <= 1 + SLACK else 255.0
    if mode != "I":
        return 4095.0 if bits == 12 else 65535.0
    if format_name == "PPM":  # Pillow scales a PGM of more than 8 bits
        return 65535.0
    if bits == 16:  # signed
        return 32767.0
    return 255.0 if high <= 255 else 65535.0


def is_deep_png(head: bytes) -> bool:
    """Return whether a file with this beginning is a grey PNG of 16 bits, which `eight_bits` scales."""
    signature, place, depth = GREY_16
    return head.startswith(signature) and head[place : place + 2] == depth
