"""Pairs of latents as a consistency loss compares them, from barely visible differences to unrelated pictures.

They come in groups around one teacher latent each. A group's members are that latent, nine modifications of it,
another latent of its prompt, and the latent of another prompt, which is the partner group's. All pairs of a group are
trained on; those of `KINDS` are also reported by name.

Random numbers are keyed by (seed, purpose, item): a group does not depend on the others or on the batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations

import torch
import torch.nn.functional as F
from torch import Tensor

from fewstep.common.errors import nearest_divisor
from fewstep.common.rng import KeyedRng
from fewstep.diffusion.conditioned import ConditionedDenoiser
from fewstep.diffusion.grid import end_time, previous, training_grid
from fewstep.diffusion.jump import land
from fewstep.diffusion.schedule import Path, VariancePreserving, expand

MEMBERS = (
    "latent",
    "other seed",
    "few steps",
    "estimate",
    "next estimate",
    "unprompted estimate",
    "noise",
    "smooth change",
    "patch",
    "shift",
    "mixture",
    "other prompt",
)
"""Members of a group in their order."""
KINDS: Mapping[str, tuple[int, int]] = {
    "one-step estimate": (0, 3),
    "neighbouring estimates": (3, 4),
    "estimate without prompt": (0, 5),
    "few and many steps": (0, 2),
    "noise": (0, 6),
    "smooth change": (0, 7),
    "patch": (0, 8),
    "shift": (0, 9),
    "mixture": (0, 10),
    "other seed": (0, 1),
    "other prompt": (0, 11),
}
"""Named pairs, by members."""
PAIRS = tuple(combinations(range(len(MEMBERS)), 2))
"""All pairs of a group."""
GRID = 50
"""Points of the training grid of the estimates; on Stable Diffusion's path they are 20 indices apart."""
FARTHEST = 7
"""Most points between neighbouring estimates: 140 of 1,000 indices, the skip of TLCM's second stage."""
FEW = (2, 3, 4)
"""Solver steps of the "few steps" member."""
WIDEST_SHIFT = 1.5
"""Largest shift, in latent pixels."""


def partner(item: int) -> int:
    """Return the item that provides the latent of another prompt; items 2i and 2i + 1 are partners."""
    return item ^ 1


def estimates(
    teacher: ConditionedDenoiser, unprompted: ConditionedDenoiser, latent: Tensor, rng: KeyedRng
) -> list[Tensor]:
    """Return three one-call estimates of x0 from the noised latent, like those that a student's targets are made of.

    1. Guided, at a random t of the grid. 2. Guided, at a random t_n below t, after one guided DDIM step from t to t_n:
    with 1., the two sides of a consistency loss. 3. Without prompt and guidance, at another random t with other noise.
    """
    path = teacher.denoiser.path
    grid = estimate_times(path)
    shape = tuple(latent.shape[1:])
    index = rng.integers("estimate", 0, len(grid))
    t = grid[index]
    t_next = previous(grid, index, rng.integers("skip", 1, FARTHEST + 1), end_time(path, "index0"))

    def noised(time: Tensor, purpose: str) -> Tensor:
        noise = rng.normal(purpose, shape).to(latent.device)
        return expand(path.alpha(time), latent) * latent + expand(path.sigma(time), latent) * noise

    first = teacher.denoise(noised(t, "estimate's noise"), t)
    second = teacher.denoise(land(first, path, t_next), t_next)
    u = grid[rng.integers("unprompted", 0, len(grid))]
    third = unprompted.denoise(noised(u, "unprompted noise"), u)
    return [first.x0, second.x0, third.x0]


def estimate_times(path: Path) -> Tensor:
    """Return the times of the estimates: `GRID` points, or, on an indexed path, a divisor of its number near that."""
    if not isinstance(path, VariancePreserving):
        return training_grid(path, GRID)
    indices = int(path.noisiest) + 1
    return training_grid(path, nearest_divisor(min(GRID, indices), indices))


def changes(latent: Tensor, other_seed: Tensor, far: Tensor, rng: KeyedRng) -> list[Tensor]:
    """Return five modified latents: white noise, smooth noise, a patch of the other seed, a shift, a mixture.

    The size of noise is log-uniform, in units of the latent's standard deviation.
    """
    shape = tuple(latent.shape[1:])
    spread = latent.float().flatten(1).std(1)

    def size(purpose: str, low: float, high: float) -> Tensor:
        wide = rng.uniform(purpose)
        return expand((low ** (1 - wide) * high**wide).to(spread) * spread, latent)

    white = rng.normal("white", shape).to(latent.device)
    coarse = rng.normal("coarse", (shape[0], 3, 3)).to(latent.device)
    smooth = F.interpolate(coarse, shape[1:], mode="bicubic", align_corners=True)
    share = expand(rng.uniform("mixture", 0.02, 0.98).float(), latent)
    return [
        latent + size("white size", 0.02, 0.6) * white,
        latent + size("smooth size", 0.02, 0.6) * smooth,
        torch.where(patches(shape, rng).to(latent.device), other_seed, latent),
        shifted(latent, rng),
        (1 - share) * latent + share * far,
    ]


def patches(shape: tuple[int, ...], rng: KeyedRng) -> Tensor:
    """Return the mask of a random rectangle with sides from one pixel to half of the latent, bool [B, 1, h, w]."""
    rows = []
    for axis, length in (("y", shape[1]), ("x", shape[2])):
        extent = (1 + rng.uniform(f"patch {axis} extent") * (length // 2)).floor().clamp(max=length)
        start = (rng.uniform(f"patch {axis} start") * (length - extent + 1)).floor()
        place = torch.arange(length)
        rows.append((place >= start[:, None]) & (place < (start + extent)[:, None]))
    return (rows[0][:, :, None] & rows[1][:, None, :])[:, None]


def shifted(latent: Tensor, rng: KeyedRng) -> Tensor:
    """Return each latent shifted by up to `WIDEST_SHIFT` pixels in a random direction, bilinear, edges repeated."""
    b, _, h, w = latent.shape
    angle, far = rng.uniform("shift direction", 0, 2 * torch.pi), rng.uniform("shift size", 0.05, WIDEST_SHIFT)
    moved = torch.stack([far * angle.cos() * 2 / w, far * angle.sin() * 2 / h], 1).float()
    identity = torch.eye(2, 3).expand(b, 2, 3)
    theta = torch.cat([identity[:, :, :2], moved[:, :, None]], 2).to(latent.device)
    places = F.affine_grid(theta, [b, 1, h, w], align_corners=False)
    return F.grid_sample(latent.float(), places, mode="bilinear", padding_mode="border", align_corners=False)
