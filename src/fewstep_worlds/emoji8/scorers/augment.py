"""Random changes of training pictures, keyed by sample, so that a scorer reads soft or noisy pictures too.

Nothing is mirrored or turned by much: "right arrow" and "clockwise" are concepts here.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fewstep.common.rng import KeyedRng

TAPS = 7


def augment(pictures: Tensor, rng: KeyedRng) -> Tensor:
    """Move, scale, tint and blur pictures [B, 3, H, W] in [-1, 1], and add noise.

    Shift up to 6 % and size 85 to 110 %, always; saturation and levels by up to a fifth, always; Gaussian
    blur of sigma .3 to 1.2 pixels for 40 %; noise of up to 16 8-bit levels for 40 %.
    """
    x = _move(1 - pictures, rng)  # white is 0, so that what comes in from outside is white
    x = _tint(1 - x, rng)
    x = torch.where(_chance(rng, "soft?", 0.4), _blur(x, _column(rng, "soft", 0.3, 1.2)), x)
    sigma = _chance(rng, "noisy?", 0.4) * _column(rng, "noisy", 0.0, 16 / 127.5)
    x = x + sigma * rng.normal("noise", tuple(x.shape[1:]))
    return x.clamp(-1, 1)


def _column(rng: KeyedRng, purpose: str, low: float, high: float) -> Tensor:
    return rng.uniform(purpose, low, high).float().to(rng.device)[:, None, None, None]


def _chance(rng: KeyedRng, purpose: str, probability: float) -> Tensor:
    return rng.chance(purpose, probability).to(rng.device)[:, None, None, None]


def _move(x: Tensor, rng: KeyedRng) -> Tensor:
    zoom = rng.uniform("zoom", 1 / 1.1, 1 / 0.85).float().to(rng.device)
    across, down = (rng.uniform(name, -0.12, 0.12).float().to(rng.device) for name in ("across", "down"))
    zero = torch.zeros_like(zoom)
    theta = torch.stack([torch.stack([zoom, zero, across], 1), torch.stack([zero, zoom, down], 1)], 1)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def _tint(x: Tensor, rng: KeyedRng) -> Tensor:
    grey = x.mean(1, keepdim=True)
    x = grey + _column(rng, "saturation", 0.8, 1.2) * (x - grey)
    # Gains act on the distance from white, so that the background stays white.
    gains = torch.stack([rng.uniform(f"gain {c}", 0.85, 1.1).float() for c in "rgb"], 1)
    gains = gains.to(rng.device)[:, :, None, None]
    return 1 - gains * (1 - x)


def _blur(x: Tensor, sigma: Tensor) -> Tensor:
    """Blur each picture by a Gaussian of its own sigma [B, 1, 1, 1], edges repeated."""
    b, c, h, w = x.shape
    offsets = torch.arange(TAPS, device=x.device) - TAPS // 2
    kernel = torch.exp(-0.5 * (offsets / sigma[:, :, 0, 0][:, :, None]).square())
    kernel = (kernel / kernel.sum(-1, keepdim=True)).repeat_interleave(c, 0)
    flat = F.pad(x, (TAPS // 2,) * 4, mode="replicate").reshape(1, b * c, h + TAPS - 1, w + TAPS - 1)
    flat = F.conv2d(flat, kernel[:, :, None], groups=b * c)
    return F.conv2d(flat, kernel[:, :, :, None], groups=b * c).reshape(b, c, h, w)
