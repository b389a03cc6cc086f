"""Pictures as the authors' own programs prepare them: by Pillow in 8 bits, where those use Pillow."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from fewstep.evaluation.metric import Pictures
from fewstep.scorers.preprocess import Framing, resized_size

BATCH = 32
"""Pictures that a network sees at once."""


def resized(picture: Pictures, width: int, height: int, how: Image.Resampling) -> Pictures:
    """Return one picture [H, W, 3], resized by Pillow, uint8."""
    if picture.shape[:2] == (height, width):
        return picture
    return np.asarray(Image.fromarray(picture).resize((width, height), how))


def framed(pictures: Pictures, framing: Framing) -> Tensor:
    """Return pictures [B, H, W, 3] as a scorer's own program frames them, float32 [B, 3, size, size].

    "crop" is Pillow's bicubic on 8-bit pixels and the middle square (CLIPImageProcessor); "pad" is torch's antialiased
    bicubic on floating-point pixels, without a clamp, and black around (HPS v2).
    """
    size = framing.size
    height, width = resized_size(pictures.shape[1], pictures.shape[2], framing)
    if framing.fit == "crop":
        top, left = (height - size) // 2, (width - size) // 2
        rows = [resized(picture, width, height, Image.Resampling.BICUBIC) for picture in pictures]
        x = unit_pixels(np.stack([row[top : top + size, left : left + size] for row in rows]))
    else:
        x = unit_pixels(pictures)
        if x.shape[-2:] != (height, width):
            x = F.interpolate(x, (height, width), mode="bicubic", align_corners=False, antialias=True)
        below, right = size - height, size - width
        x = F.pad(x, (right // 2, right - right // 2, below // 2, below - below // 2))
    return normalised(x, framing.mean, framing.std)


def unit_pixels(pictures: Pictures) -> Tensor:
    """Return uint8 [B, H, W, 3] as float32 [B, 3, H, W] in [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2).float() / 255


def normalised(x: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Return (x - mean) / std by channel."""
    return (x - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


def described(framing: Framing) -> str:
    """Return the words for what `framed` does."""
    how = (
        "Pillow's bicubic on 8-bit pixels to the shorter side, middle square"
        if framing.fit == "crop"
        else "antialiased bicubic in floating point to the longer side, black around"
    )
    mean, std = (" ".join(f"{value:g}" for value in values) for values in (framing.mean, framing.std))
    return f"{framing.size} x {framing.size}, {how}; mean {mean}, std {std}"
