"""Pictures of coloured shapes."""

from __future__ import annotations

import numpy as np

COLOURS = {"red": (220, 40, 40), "green": (40, 160, 60), "blue": (40, 70, 220), "yellow": (240, 200, 40)}


SHAPES = ("disc", "square", "ring", "bar")


def draw_shape(colour: str, shape: str) -> np.ndarray:
    """A shape on white, uint8 [64, 64, 3]."""
    y, x = np.mgrid[:64, :64] - 31.5
    radius = np.hypot(x, y)
    inside = {
        "disc": radius < 22,
        "square": np.maximum(abs(x), abs(y)) < 20,
        "ring": (radius < 26) & (radius > 14),
        "bar": (abs(y) < 9) & (abs(x) < 27),
    }[shape]
    picture = np.full((64, 64, 3), 255, np.uint8)
    picture[inside] = COLOURS[colour]
    return picture
