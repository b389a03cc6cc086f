"""Effects of add-ons on pictures: other skins, a style, edges, silhouettes; and how much of it a picture keeps.

Pictures are uint8 [N, H, W, 3] on white, as Emoji-8's are.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fewstep.evaluation.metric import Array, Pictures

Mask = npt.NDArray[np.bool_]

YELLOW = (255, 204, 60)
"""The skin of emoji that have no tone."""
TONES = {
    "light skin tone": (247, 222, 206),
    "medium skin tone": (213, 171, 136),
    "dark skin tone": (124, 83, 62),
}
"""Three of Unicode's five tones, as Twemoji paints them."""
BLUE, SHADE, LINE = (28, 66, 138), (70, 108, 178), (240, 246, 255)
"""The blueprint style: paper, what is drawn on it, its lines."""
NEAR = 60.0
"""Largest distance of a pixel from a colour, in RGB, to count as it."""
INK = 24
"""Least distance of a pixel from white, in one channel, to count as drawn."""


def skin(pictures: Pictures) -> Mask:
    """Return the mask of yellow skin, [N, H, W]."""
    r, g, b = (pictures[..., i].astype(np.int16) for i in range(3))
    found: Mask = (r > 180) & (g > 130) & (g <= r) & (r - b > 70) & (g - b > 40)
    return found


def with_tone(pictures: Pictures, tone: str) -> npt.NDArray[np.uint8]:
    """Return the pictures with skin of a tone; shading is kept."""
    mask = skin(pictures)
    light = pictures.max(axis=3).astype(np.float32)
    full = np.where(mask, light, 0).reshape(len(pictures), -1).max(axis=1).clip(min=1)[:, None, None]
    painted = np.asarray(TONES[tone], np.float32) * (light / full)[..., None]
    return np.where(mask[..., None], painted, pictures).round().clip(0, 255).astype(np.uint8)


def tone_share(pictures: Pictures, tones: list[str]) -> Array:
    """Return 1 where the requested tone has more pixels than yellow or any other tone, else 0; float64 [N]."""
    names = list(TONES)
    colours = np.asarray([YELLOW, *TONES.values()], np.float32)
    distance = np.linalg.norm(pictures[..., None, :].astype(np.float32) - colours, axis=-1)
    nearest, close = distance.argmin(-1), distance.min(-1) < NEAR
    drawn = ink(pictures)
    counts = np.stack([((nearest == k) & close & drawn).sum((1, 2)) for k in range(len(colours))], 1)
    wanted = np.asarray([1 + names.index(tone) for tone in tones])
    right: Array = ((counts.argmax(1) == wanted) & (counts.max(1) > 0)).astype(np.float64)
    return right


def ink(pictures: Pictures) -> Mask:
    """Return the mask of pixels that are not background (the silhouette), [N, H, W]."""
    found: Mask = (255 - pictures.min(axis=3)) > INK
    return found


def overlap(pictures: Pictures, masks: Mask) -> Array:
    """Return the intersection over union of silhouettes, float64 [N]."""
    own = ink(pictures)
    both, either = (own & masks).sum((1, 2)), (own | masks).sum((1, 2))
    share: Array = both / np.maximum(either, 1)
    return share


def edges(pictures: Pictures) -> npt.NDArray[np.float32]:
    """Return the Sobel magnitude of the luminance, float32 [N, H, W]; 1 from a step of a quarter of the range on."""
    y = (pictures.astype(np.float32) @ np.asarray([0.299, 0.587, 0.114], np.float32)) / 255
    p = np.pad(y, ((0, 0), (1, 1), (1, 1)), mode="edge")
    down = p[:, 2:, :-2] + 2 * p[:, 2:, 1:-1] + p[:, 2:, 2:] - p[:, :-2, :-2] - 2 * p[:, :-2, 1:-1] - p[:, :-2, 2:]
    across = p[:, :-2, 2:] + 2 * p[:, 1:-1, 2:] + p[:, 2:, 2:] - p[:, :-2, :-2] - 2 * p[:, 1:-1, :-2] - p[:, 2:, :-2]
    found: npt.NDArray[np.float32] = np.hypot(down, across).clip(0, 1)
    return found


def _smooth(x: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Blur by a binomial of five points each way, so that edges a pixel apart overlap."""
    for axis in (1, 2):
        p = np.pad(x, [(2, 2) if a == axis else (0, 0) for a in range(3)], mode="edge")
        n = x.shape[axis]
        x = sum(w * np.take(p, range(i, i + n), axis) for i, w in enumerate((1, 4, 6, 4, 1)))  # type: ignore[assignment]
    return (x / 256).astype(np.float32)


def edge_likeness(pictures: Pictures, wanted: npt.NDArray[np.float32]) -> Array:
    """Return the correlation of the pictures' edges with target edges, both smoothed, float64 [N]."""
    own, other = (_smooth(x).reshape(len(pictures), -1).astype(np.float64) for x in (edges(pictures), wanted))
    own, other = own - own.mean(1, keepdims=True), other - other.mean(1, keepdims=True)
    size = np.linalg.norm(own, axis=1) * np.linalg.norm(other, axis=1)
    correlation: Array = (own * other).sum(1) / np.maximum(size, 1e-9)
    return correlation


def detail_likeness(pictures: Pictures, rough: Pictures, sharp: Pictures) -> Array:
    """Return the correlation of (pictures - rough) with (sharp - rough), float64 [N]."""
    added, lacking = (
        (np.asarray(x, np.float64) - np.asarray(rough, np.float64)).reshape(len(rough), -1) for x in (pictures, sharp)
    )
    size = np.linalg.norm(added, axis=1) * np.linalg.norm(lacking, axis=1)
    correlation: Array = (added * lacking).sum(1) / np.maximum(size, 1e-9)
    return correlation


def closeness(pictures: Pictures, others: Pictures) -> Array:
    """Return 1 minus the mean absolute difference as a share of the range, float64 [N]."""
    near: Array = 1 - np.abs(pictures.astype(np.float64) - others).mean((1, 2, 3)) / 255
    return near


def blueprint(pictures: Pictures) -> npt.NDArray[np.uint8]:
    """Return the pictures in the blueprint style: light lines on blue paper."""
    inside = ink(pictures)[..., None]
    line = edges(pictures)[..., None]
    paper = np.where(inside, np.asarray(SHADE, np.float32), np.asarray(BLUE, np.float32))
    painted: npt.NDArray[np.uint8] = (paper + line * (np.asarray(LINE, np.float32) - paper)).round().astype(np.uint8)
    return painted


def blueprint_share(pictures: Pictures) -> Array:
    """Return the share of pixels in one of the style's two blues, float64 [N]."""
    plain = pictures.astype(np.float32)
    near = [np.linalg.norm(plain - np.asarray(colour, np.float32), axis=-1) < NEAR for colour in (BLUE, SHADE)]
    share: Array = (near[0] | near[1]).mean((1, 2)).astype(np.float64)
    return share


def blurred(pictures: Pictures, factor: int = 4) -> npt.NDArray[np.uint8]:
    """Return the pictures reduced by a factor and enlarged again, the input of super-resolution."""
    from PIL import Image

    small = pictures.shape[1] // factor
    made = []
    for picture in pictures:
        image = Image.fromarray(picture).resize((small, small), Image.Resampling.BOX)
        made.append(np.asarray(image.resize(picture.shape[1::-1], Image.Resampling.BICUBIC)))
    return np.stack(made)
