"""Every list of times: training grids, segments and inference steps.

Training and sampling both take their times from here, so that a student is sampled at the times that it was trained at.
Times are in the path's own units; on a variance-preserving path of T = 1000 indices the papers' grid of N = 50 is 19,
39, ..., 999.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fewstep.common.choices import End, Spacing
from fewstep.common.errors import UserError
from fewstep.diffusion.config import check_indices, grid_size, rising
from fewstep.diffusion.schedule import Path, VarianceExploding, VariancePreserving, share_of

KARRAS = 7.0
"""rho of EDM's times (arXiv 2206.00364, eq 5), which are even in sigma^(1/rho)."""

Grid = int | Sequence[float]
"""A training grid: N points by the path's own rule, or the points themselves, rising."""


def end_time(path: Path, end: End) -> float:
    """Return the time of an end point: clean data, or the least noise that networks of the path are trained on."""
    return path.clean if end == "clean" else path.least


def training_grid(path: Path, grid: Grid) -> Tensor:
    """Return the times that a student is trained on, rising, float64 [N].

    N points: T/N - 1, 2T/N - 1, ..., T - 1 on an indexed path (LCM, TCD; N = T for all indices); EDM's times between
    sigma_min and sigma_max on a variance exploding one; noisiest * i/N, i = 1 .. N, on a flow.

    Raises:
        UserError: no points, N that does not divide the number of indices, or points that do not rise, leave the path
            or end below pure noise.
    """
    try:
        rising(grid if isinstance(grid, int) else tuple(grid))
    except ValueError as error:
        raise UserError(f"grid = {grid} {error}") from error
    if isinstance(path, VariancePreserving):
        check_indices("grid", grid, int(path.noisiest) + 1)
    if not isinstance(grid, int):
        if not path.clean < grid[0] or grid[-1] != path.noisiest:
            wanted = f"must lie above {path.clean:g} and end at {path.noisiest:g}, where sampling starts"
            raise UserError(f"grid = {list(grid)} {wanted}")
        return torch.tensor(list(grid), dtype=torch.float64)
    steps = torch.arange(1, grid + 1, dtype=torch.float64)
    if isinstance(path, VariancePreserving):
        return steps * ((int(path.noisiest) + 1) // grid) - 1
    if isinstance(path, VarianceExploding):
        low, high = path.sigma_min ** (1 / KARRAS), path.sigma_max ** (1 / KARRAS)
        times: Tensor = (low + (steps - 1) / max(grid - 1, 1) * (high - low)) ** KARRAS
        times[-1] = path.sigma_max
        if grid > 1:
            times[0] = path.sigma_min
        return times
    return path.noisiest * steps / grid


def previous(grid: Tensor, index: Tensor, k: Tensor | int, lowest: float) -> Tensor:
    """Return the time k grid points below grid[index], and `lowest` below the grid; index int64 [B] -> float64 [B]."""
    below = torch.cat([grid.new_tensor([lowest]), grid])
    return below[(index + 1 - k).clamp(min=0)]


def between(path: Path, t: Tensor, s: Tensor, steps: int) -> Tensor:
    """Return the times of `steps` equal steps from t [B] to s [B], both included, float64 [steps + 1, B].

    Steps are equal in time; on a variance exploding path in sigma^(1/7), as its grid is.
    """
    share = torch.arange(steps + 1, dtype=torch.float64)[:, None] / steps
    if isinstance(path, VarianceExploding):
        a, b = t ** (1 / KARRAS), s ** (1 / KARRAS)
        times = (a + share * (b - a)) ** KARRAS
        return torch.cat([t[None], times[1:-1], s[None]])  # the two ends without rounding
    return torch.cat([t[None], (t + share * (s - t))[1:-1], s[None]])


def edge_below(index: Tensor, count: int, segments: int) -> Tensor:
    """Return the index of the lower edge of grid[index]'s segment, int64; -1 for the end point.

    M segments of N/M points each; M divides N. A point on an edge belongs to the segment below it, whose noisiest time
    it is.
    """
    width = count // segments
    return index // width * width - 1


TLCM_TIMES = {
    1: (8,),
    2: (8, 4),
    3: (8, 4, 1),
    4: (8, 6, 4, 1),
    5: (8, 6, 4, 2, 1),
    6: (8, 6, 4, 3, 2, 1),
    7: (8, 6, 5, 4, 3, 2, 1),
    8: (8, 7, 6, 5, 4, 3, 2, 1),
}
"""The released TLCM sampler's times, in eighths of the path, by the number of calls; 1 is ours."""


def _indices(path: Path) -> int:
    """Return the number of training indices; 1000 where the path has none."""
    return int(path.noisiest) + 1 if isinstance(path, VariancePreserving) else 1000


def inference_times(path: Path, steps: int, *, grid: Grid = 50, spacing: Spacing = "grid") -> Tensor:
    """Return the times at which the network is called, falling, float64 [steps].

    `grid`: every floor(i N / steps)-th point of the training grid from the noisiest down (LCM's and TCD's rule; 4 steps
    of 50: 999, 759, 499, 259). `trailing`: round(T - i T / steps) - 1, the usual list for ODE solvers; EDM's times on a
    variance exploding path. `tlcm`: TLCM's own times for up to 8 calls (999, 749, 499, 124 for 4), points of the grid
    of 8 that its second stage trains.

    Raises:
        UserError: steps out of range.
    """
    points = grid_size(grid)
    limit = {"grid": points, "trailing": _indices(path), "tlcm": max(TLCM_TIMES)}[spacing]
    if not 1 <= steps <= limit:
        raise UserError(f"steps = {steps} must be within 1 to {limit}")
    if spacing == "grid":
        falling = training_grid(path, grid).flip(0)
        # floor in integers: floating division would drop a point where i N / steps is whole
        return falling[torch.tensor([i * points // steps for i in range(steps)])]
    if spacing == "tlcm":
        return training_grid(path, 8)[torch.tensor(TLCM_TIMES[steps]) - 1]
    if isinstance(path, VarianceExploding):
        return training_grid(path, steps).flip(0)
    share = torch.arange(steps, dtype=torch.float64) / steps
    if isinstance(path, VariancePreserving):
        total = path.noisiest + 1
        return (total - share * total).round() - 1
    return path.noisiest * (1 - share)


def times_below(path: Path, times: Tensor, strength: float) -> Tensor:
    """Return those of some times that lie at or below a share of the noisiest one."""
    return times[share_of(path, times) <= strength + 1e-9]


def times_within(path: Path, steps: int, strength: float, *, grid: Grid = 50, spacing: Spacing = "grid") -> Tensor:
    """Return the times of `steps` calls from a share of the noisiest time down, falling, float64 [steps].

    Image to image: as `inference_times`, but from the points in (0, strength] of the path alone; 4 steps of a grid of
    50 at strength .5 are 499, 379, 259, 139. All calls are made at any strength. `trailing` takes its points from all
    indices, `tlcm` from its 8 points, evenly where it starts below the noisiest.

    Raises:
        UserError: a strength outside (0, 1], or fewer such points than steps.
    """
    if not 0 < strength <= 1:
        raise UserError(f"strength = {strength} must be above 0 and at most 1")
    if strength == 1:
        return inference_times(path, steps, grid=grid, spacing=spacing)
    every: dict[Spacing, Grid] = {"grid": grid, "trailing": _indices(path), "tlcm": max(TLCM_TIMES)}
    times = training_grid(path, every[spacing])
    below = times_below(path, times, strength).flip(0)
    if not 1 <= steps <= len(below):
        least = float(share_of(path, times)[min(max(steps, 1), len(times)) - 1])
        raise UserError(
            f"steps = {steps} must be within 1 to {len(below)}, the grid's times at strength = {strength}; "
            f"use a strength of at least {least:.3g}"
        )
    return below[torch.tensor([i * len(below) // steps for i in range(steps)])]
