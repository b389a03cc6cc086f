"""A scene as a picture."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from fewstep_worlds.stickers.scene import SIDE, Background, Scene, Sticker
from fewstep_worlds.stickers.sprites import SIZES, Sprites
from fewstep_worlds.stickers.vocabulary import COLOURS

Picture = npt.NDArray[np.uint8]
Plane = npt.NDArray[np.floating[Any]]

WHITENED = 0.55
"""Position of a background's second tone between its colour and white; of a gradient's, below."""
WHITENED_GRADIENT = 0.85
SHADE = (214, 217, 226)
"""Second tone of white."""
ROWS, COLUMNS = np.mgrid[:SIDE, :SIDE].astype(np.float32) + 0.5 - SIDE / 2


def draw_scene(scene: Scene, sprites: Sprites) -> Picture:
    """Return the picture of a scene, uint8 [64, 64, 3]."""
    picture = draw_background(scene.background)
    for sticker in scene.stickers:
        _stick(picture, sticker, sprites[sticker.concept, scene.style])
    return picture


def draw_background(background: Background) -> Picture:
    """Return a background alone, uint8 [64, 64, 3]."""
    first = np.array(COLOURS[background.colour], np.float32)
    whitened = WHITENED_GRADIENT if background.pattern == "gradient" else WHITENED
    second = np.array(SHADE, np.float32) if background.colour == "white" else first + whitened * (255 - first)
    share = _share(background)[..., None]
    return np.asarray(first + share * (second - first) + 0.5).astype(np.uint8)


def _share(background: Background) -> Plane:
    """Return the share of the second tone at each pixel, float32 [64, 64] in [0, 1]; edges are a pixel wide."""
    angle, period = math.radians(background.angle), background.period
    along = COLUMNS * math.cos(angle) + ROWS * math.sin(angle) + period * background.phase[0]
    across = ROWS * math.cos(angle) - COLUMNS * math.sin(angle) + period * background.phase[1]
    if background.pattern == "plain":
        return np.zeros((SIDE, SIDE), np.float32)
    if background.pattern == "gradient":
        reach = SIDE / 2 * (abs(math.cos(angle)) + abs(math.sin(angle)))
        return _between((along - period * background.phase[0]) / (2 * reach))
    if background.pattern == "stripes":
        return _between(period / 4 - _from_middle(along, period))
    if background.pattern == "checks":
        inside, other = (2 * _between(period / 4 - _from_middle(side, period)) - 1 for side in (along, across))
        return (inside * other + 1) / 2
    column, row = along % period - period / 2, across % period - period / 2
    radius = np.hypot(column, row)
    if background.pattern == "dots":
        return _between(0.27 * period - radius)
    return _between(0.36 * period * _star(np.arctan2(column, row)) - radius)


def _between(inside: Plane) -> Plane:
    """Return 1 where a signed distance in pixels is inside an edge, 0 outside, and a slope one pixel wide between."""
    share: Plane = np.clip(inside + 0.5, 0, 1)
    return share


def _from_middle(position: Plane, period: float) -> Plane:
    """Return the distance to the nearest middle of a stripe, in pixels."""
    distance: Plane = np.abs(position % period - period / 2)
    return distance


def _star(angle: Plane) -> Plane:
    """Return the radius of a five-pointed star of radius 1 in each direction, in radians from a point."""
    inner = 0.42
    turn = np.abs((angle + math.pi / 5) % (2 * math.pi / 5) - math.pi / 5)
    # the straight line from the point (1, 0) to the notch at pi / 5
    x, y = inner * math.cos(math.pi / 5), inner * math.sin(math.pi / 5)
    radius: Plane = y / (np.sin(turn) * (1 - x) + y * np.cos(turn))
    return radius


def _stick(picture: Picture, sticker: Sticker, sprite: Mapping[int, Image.Image]) -> None:
    """Draw a sticker over the picture, in place."""
    edge = min((size for size in SIZES if size >= sticker.size), default=SIZES[0])
    angle, scale = math.radians(sticker.turn), edge / sticker.size
    reach = sticker.size / 2 * (abs(math.cos(angle)) + abs(math.sin(angle))) + 1
    left, top = max(math.floor(sticker.x - reach), 0), max(math.floor(sticker.y - reach), 0)
    right, bottom = min(math.ceil(sticker.x + reach), SIDE), min(math.ceil(sticker.y + reach), SIDE)
    cos, sin = scale * math.cos(angle), scale * math.sin(angle)
    flip, middle = -1 if sticker.mirrored else 1, edge / 2 + 1
    x, y = sticker.x - left, sticker.y - top
    matrix = (
        flip * cos, -flip * sin, middle - flip * (cos * x - sin * y),
        sin, cos, middle - (sin * x + cos * y),
    )  # fmt: skip
    turned = sprite[edge].transform(
        (right - left, bottom - top), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR
    )
    ink = np.asarray(turned).astype(np.uint16)
    under = picture[top:bottom, left:right]
    under[...] = np.minimum(ink[..., :3] + (under * (255 - ink[..., 3:]) + 127) // 255, 255)
