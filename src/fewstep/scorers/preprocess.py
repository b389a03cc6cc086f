"""Differentiable preprocessing of a scorer's pictures: resized, cropped or padded, normalised."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Framing:
    """The conversion of a picture to a network's square input.

    Attributes:
        size: edge of the input in pixels.
        fit: "crop" resizes the shorter side to `size` and crops the centre; "pad" resizes the longer side and pads with
            black.
        mean, std: of the channels, of pictures in [0, 1].
    """

    size: int
    fit: Literal["crop", "pad"] = "crop"
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD

    def __str__(self) -> str:
        how = "shorter side, middle cut out" if self.fit == "crop" else "longer side, black around"
        return (
            f"{self.size} x {self.size}, antialiased bicubic in floating point on the {how}; (x - mean)/std of [0, 1], "
            f"mean {' '.join(f'{m:g}' for m in self.mean)}, std {' '.join(f'{s:g}' for s in self.std)}"
        )


def frame(pictures: Tensor, framing: Framing) -> Tensor:
    """Resize and normalise pictures [B, 3, H, W] in [-1, 1] to [B, 3, size, size], in at least fp32.

    The scorers' own programs read 8-bit files, and most resize with PIL, which rounds to 8 bits after each of its two
    passes. Here nothing is rounded, because rounding has no gradient: pixels differ by up to 1.1/255 from PIL's. As
    there, values are clamped to [0, 1] before resizing and after each pass (bicubic overshoots at edges), so that a
    student is not rewarded for colours outside the range and gets no gradient there.

    Raises:
        ValueError: other than floating-point pictures of three channels.
    """
    if pictures.ndim != 4 or pictures.shape[1] != 3 or not pictures.is_floating_point():
        raise ValueError(f"pictures are {pictures.dtype} {list(pictures.shape)}, not floating-point [B, 3, H, W]")
    x = pictures if pictures.dtype == torch.float64 else pictures.float()
    x = (x.clamp(-1, 1) + 1) / 2
    size = framing.size
    height, width = resized_size(x.shape[-2], x.shape[-1], framing)
    for target in ((x.shape[-2], width), (height, width)):  # rows first, then columns, as PIL does it
        if target != tuple(x.shape[-2:]):
            x = F.interpolate(x, target, mode="bicubic", align_corners=False, antialias=True).clamp(0, 1)
    if framing.fit == "crop":
        top, left = (height - size) // 2, (width - size) // 2
        x = x[..., top : top + size, left : left + size]
    else:
        below, right = size - height, size - width
        x = F.pad(x, (right // 2, right - right // 2, below // 2, below - below // 2))
    # plain numbers, channel by channel: copying a tensor of them would synchronise with the device
    channels = zip(x.unbind(1), framing.mean, framing.std, strict=True)
    return torch.stack([(channel - mean) / std for channel, mean, std in channels], 1)


def resized_size(height: int, width: int, framing: Framing) -> tuple[int, int]:
    """Return the size before cropping or padding; the other side is rounded down ("crop") or to nearest ("pad")."""
    short, long = min(height, width), max(height, width)
    if framing.fit == "crop":
        return (framing.size * height // short, framing.size * width // short)
    return (max(1, round(height * framing.size / long)), max(1, round(width * framing.size / long)))
