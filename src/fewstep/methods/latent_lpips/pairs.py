"""The pairs: what a consistency loss compares, from differences hardly to be seen to other pictures altogether.

They are made in groups around one teacher latent each. A group's members are that latent, what becomes of it in ten
ways, and another latent of its prompt; the latent of another prompt comes from the group's partner. All pairs of a
group count; those with a law of their own (`KINDS`) have a name, under which figures are told.

Every number is keyed by (seed, purpose, item): a group does not depend on what else is made, or with what.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations

import torch
import torch.nn.functional as F
from torch import Tensor

from fewstep.common.errors import nearest_divisor
from fewstep.common.rng import KeyedRng
from fewstep.diffusion.denoiser import BASE, Condition, Denoiser
from fewstep.diffusion.grid import end_time, previous, training_grid
from fewstep.diffusion.jump import land
from fewstep.diffusion.schedule import Estimate, Path, VariancePreserving, expand

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
"""Pairs with a law of their own, by members."""
PAIRS = tuple(combinations(range(len(MEMBERS)), 2))
"""All pairs of a group."""
GRID = 50
"""Points of the training grid that estimates are taken at; Stable Diffusion's are 20 indices apart."""
FARTHEST = 7
"""Most points between neighbouring estimates: 140 of 1,000 indices, as far as TLCM's second stage skips."""
FEW = (2, 3, 4)
"""Solver steps of a latent of few steps."""
WIDEST_SHIFT = 1.5
"""In latent places."""


def partner(item: int) -> int:
    """The item whose latent is the other prompt's: items come in twos."""
    return item ^ 1


@dataclass(frozen=True)
class Teacher:
    """Who makes the estimates.

    Attributes:
        condition, null: text states of the prompts, [B, ...] each, on the device.
        omega: guidance, 0 for none.
    """

    denoiser: Denoiser
    condition: Condition
    null: Condition
    omega: float

    def guided(self, x_t: Tensor, t: Tensor) -> Estimate:
        """x0 and eps at x_t as the teacher draws."""
        if self.omega == 0:
            return self.denoiser.estimate(x_t, t, self.condition, BASE)
        omega = torch.full((len(x_t),), self.omega)
        return self.denoiser.guided(x_t, t, self.condition, self.null, omega, BASE)


@torch.no_grad()
def make_groups(
    teacher: Teacher, latent: Tensor, other_seed: Tensor, few: Tensor, far: Tensor, rng: KeyedRng
) -> Tensor:
    """Members of each group in the order of `MEMBERS`, float32 [B, 12, C, h, w].

    Args:
        latent: the teacher's latents, [B, C, h, w].
        other_seed: others of the same prompts.
        few: those of the same noise in few steps.
        far: those of other prompts.
        draws: of the items.
    """
    members = [latent, other_seed, few, *estimates(teacher, latent, rng), *changes(latent, other_seed, far, rng)]
    return torch.stack([*members, far], 1).float()


def estimates(teacher: Teacher, latent: Tensor, rng: KeyedRng) -> list[Tensor]:
    """What a student's targets are made of: the latent noised to t and brought back by one call.

    1. at a drawn t of the grid, guided; 2. from there one guided DDIM step to a drawn t_n below, and back from t_n: the
    two sides of a consistency loss; 3. at another drawn t with other noise, without prompt and guidance.
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

    first = teacher.guided(noised(t, "estimate's noise"), t)
    second = teacher.guided(land(first, path, t_next), t_next)
    u = grid[rng.integers("unprompted", 0, len(grid))]
    third = teacher.denoiser.estimate(noised(u, "unprompted noise"), u, teacher.null, BASE)
    return [first.x0, second.x0, third.x0]


def estimate_times(path: Path) -> Tensor:
    """The times that estimates are taken at: `GRID` points, or the nearest number that divides an indexed path's."""
    if not isinstance(path, VariancePreserving):
        return training_grid(path, GRID)
    indices = int(path.noisiest) + 1
    return training_grid(path, nearest_divisor(min(GRID, indices), indices))


def changes(latent: Tensor, other_seed: Tensor, far: Tensor, rng: KeyedRng) -> list[Tensor]:
    """Changes by hand, each of a drawn size: white noise, smooth noise, a patch of the other seed, a shift, a mixture.

    Sizes are drawn even in their logarithm: differences of all sizes are as frequent. A unit is the latent's own
    standard deviation.
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
    """A rectangle in each, of sides drawn from one place to half of the latent, bool [B, 1, h, w]."""
    rows = []
    for axis, length in (("y", shape[1]), ("x", shape[2])):
        extent = (1 + rng.uniform(f"patch {axis} extent") * (length // 2)).floor().clamp(max=length)
        start = (rng.uniform(f"patch {axis} start") * (length - extent + 1)).floor()
        place = torch.arange(length)
        rows.append((place >= start[:, None]) & (place < (start + extent)[:, None]))
    return (rows[0][:, :, None] & rows[1][:, None, :])[:, None]


def shifted(latent: Tensor, rng: KeyedRng) -> Tensor:
    """Each latent moved by a drawn way up to `WIDEST_SHIFT` places in a drawn direction, bilinear; edges repeat."""
    b, _, h, w = latent.shape
    angle, far = rng.uniform("shift direction", 0, 2 * torch.pi), rng.uniform("shift size", 0.05, WIDEST_SHIFT)
    moved = torch.stack([far * angle.cos() * 2 / w, far * angle.sin() * 2 / h], 1).float()
    identity = torch.eye(2, 3).expand(b, 2, 3)
    theta = torch.cat([identity[:, :, :2], moved[:, :, None]], 2).to(latent.device)
    places = F.affine_grid(theta, [b, 1, h, w], align_corners=False)
    return F.grid_sample(latent.float(), places, mode="bilinear", padding_mode="border", align_corners=False)
