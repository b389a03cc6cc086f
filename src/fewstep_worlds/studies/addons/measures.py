"""Measures of pictures, uint8 [N, H, W, 3], against a condition: edges, lost detail, other pictures."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from PIL import Image

from fewstep.evaluation.metric import Array, Pictures


def edges(pictures: Pictures) -> npt.NDArray[np.float32]:
    """Return the Sobel magnitude of the luminance, float32 [N, H, W]; 1 from a step of a quarter of the range on."""
    y = (pictures.astype(np.float32) @ np.asarray([0.299, 0.587, 0.114], np.float32)) / 255
    p = np.pad(y, ((0, 0), (1, 1), (1, 1)), mode="edge")
    rows, columns = p[:, :-2] + 2 * p[:, 1:-1] + p[:, 2:], p[..., :-2] + 2 * p[..., 1:-1] + p[..., 2:]
    across, down = rows[..., 2:] - rows[..., :-2], columns[:, 2:] - columns[:, :-2]
    found: npt.NDArray[np.float32] = np.hypot(down, across).clip(0, 1)
    return found


def _smooth(x: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Blur by a binomial of five points each way, so that edges a pixel apart overlap."""
    for axis in (1, 2):
        p = np.pad(x, [(2, 2) if a == axis else (0, 0) for a in range(3)], mode="edge")
        n = x.shape[axis]
        x = sum(w * np.take(p, range(i, i + n), axis) for i, w in enumerate((1, 4, 6, 4, 1)))  # type: ignore[assignment]
    return (x / 256).astype(np.float32)


def _cosine(x: Array, y: Array) -> Array:
    """Return the cosine of each row of x with that of y, float64 [N]; 0 where one of them is zero."""
    own, other = (np.asarray(z, np.float64).reshape(len(z), -1) for z in (x, y))
    size = np.linalg.norm(own, axis=1) * np.linalg.norm(other, axis=1)
    found: Array = (own * other).sum(1) / np.maximum(size, 1e-9)
    return found


def edge_likeness(pictures: Pictures, wanted: npt.NDArray[np.float32]) -> Array:
    """Return the correlation of the pictures' edges with target edges, both smoothed, float64 [N]."""
    own, other = (_smooth(x) for x in (edges(pictures), wanted))
    return _cosine(own - own.mean((1, 2), keepdims=True), other - other.mean((1, 2), keepdims=True))


def detail_likeness(pictures: Pictures, rough: Pictures, sharp: Pictures) -> Array:
    """Return the cosine of (pictures - rough) with (sharp - rough), float64 [N]."""
    base = rough.astype(np.float64)
    return _cosine(pictures - base, sharp - base)


def distance(pictures: Pictures, others: Pictures) -> Array:
    """Return the mean absolute difference as a share of the range, float64 [N]."""
    found: Array = np.abs(pictures.astype(np.float64) - others).mean((1, 2, 3)) / 255
    return found


def kept(pictures: Pictures, given: Pictures, mask: npt.NDArray[np.bool_]) -> Array:
    """Return 1 minus the mean absolute difference outside a mask [N, H, W] as a share of the range, float64 [N]."""
    apart = np.abs(pictures.astype(np.float64) - given).mean(3) / 255
    return 1 - np.array([own[~hole].mean() for own, hole in zip(apart, mask, strict=True)])


def blurred(pictures: Pictures, factor: int = 4) -> Pictures:
    """Return the pictures reduced by a factor and enlarged again, the input of super-resolution."""
    small = pictures.shape[1] // factor
    reduced = (Image.fromarray(picture).resize((small, small), Image.Resampling.BOX) for picture in pictures)
    return np.stack([np.asarray(image.resize(pictures.shape[2:0:-1], Image.Resampling.BICUBIC)) for image in reduced])
