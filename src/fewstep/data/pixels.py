"""Bring pictures of 16 and 32 bits and of floating point to 8 bits: scaled by their white, never clipped."""

from __future__ import annotations

import numpy as np
from PIL import Image

SLACK = 1e-3
"""Share of the white by which floating-point values may lie outside of the range."""
GREY_16 = b"\x89PNG\r\n\x1a\n", 24, b"\x10\x00"
"""How a grey PNG of 16 bits begins: signature, and at an offset its bit depth and colour type."""
HEAD = 26
"""Bytes that tell."""


def eight_bits(image: Image.Image, format_name: str | None) -> Image.Image:
    """Return a picture of 8 bits a channel; one that is so already is returned as it is.

    Grey values of 16 bits are divided by 65,535. Values of 32 bits (mode I) are read as 16-bit ones, or as 8-bit ones
    where none is above 255; floating-point values (mode F) are read as 0..1, or as 0..255 where one is above 1.

    Args:
        format_name: Pillow's name of the file's format. A PGM of more than 8 bits comes in mode I, with white 65,535.

    Raises:
        ValueError: values of another range, or that are not finite: what is white is then unknown.
    """
    if not image.mode.startswith("I") and image.mode != "F":
        return image
    values = np.asarray(image).astype(np.float64)
    low, high = float(values.min()), float(values.max())
    if image.mode == "F":
        white = 1.0 if high <= 1 + SLACK else 255.0
        if not (-SLACK * white <= low and high <= white * (1 + SLACK)):  # not finite, too
            raise ValueError(f"floating-point values from {low:g} to {high:g}, not 0..1 or 0..255; save it as 8 bits")
    else:
        white = 255.0 if image.mode == "I" and high <= 255 and format_name != "PPM" else 65535.0
        if low < 0 or high > 65535:
            raise ValueError(f"32-bit values from {low:g} to {high:g}, not 0..65535; save it as 8 or 16 bits")
    grey = Image.fromarray(np.rint(values.clip(0, white) * (255 / white)).astype(np.uint8))
    hole = image.info.get("transparency")
    if isinstance(hole, int):
        grey.putalpha(Image.fromarray(np.where(values == hole, 0, 255).astype(np.uint8)))
    return grey


def is_deep_png(head: bytes) -> bool:
    """Whether a file that begins so is a grey PNG of 16 bits, which `eight_bits` scales."""
    signature, place, depth = GREY_16
    return head.startswith(signature) and head[place : place + 2] == depth
