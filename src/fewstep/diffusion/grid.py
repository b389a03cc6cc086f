"""Every list of times: training grids, segments and inference steps. The only place that makes one.

Training and sampling take their times from here, so that a student is asked at inference for the times it was
trained on (law 1 of the architecture). Times are in the path's own units; for a variance-preserving path of
T = 1000 indices the paper's grid of N = 50 is 19, 39, ..., 999.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fewstep.common.choices import End, Spacing
from fewstep.common.errors import UserError, nearest_divisor
from fewstep.diffusion.schedule import Path, VarianceExploding, VariancePreserving, share_of

KARRAS = 7.0
"""rho of EDM's times (arXiv 2206.00364, eq 5), which are even in sigma^(1/rho)."""

Grid = int | Sequence[float]
"""A training grid: N points by the path's own law, or the points themselves, rising."""


def end_time(path: Path, end: End) -> float:
    """The time of the named end point: clean data, or the least noise that networks of the path are trained on."""
    return path.clean if end == "clean" else path.least


def training_grid(path: Path, grid: Grid) -> Tensor:
    """The times that a student is trained on, rising, float64 [N].

    N points: T/N - 1, 2T/N - 1, ..., T - 1 for an indexed path (LCM, TCD; N = T for all indices); EDM's times between
    sigma_min and sigma_max for a variance exploding one; noisiest * i/N, i = 1 .. N, for a flow.

    Raises:
        UserError: N is below 1, or does not divide the number of indices; points that do not rise or leave the path.
    """
    if not isinstance(grid, int):
        return _own_points(path, grid)
    if grid < 1:
        raise UserError(f"grid = {grid} is below 1; the nearest legal one is 1")
    steps = torch.arange(1, grid + 1, dtype=torch.float64)
    if isinstance(path, VariancePreserving):
        total = int(path.noisiest) + 1
        if grid > total or total % grid:
            legal = nearest_divisor(grid, total)
            raise UserError(f"grid = {grid} does not divide {total} training indices; the nearest is {legal}")
        return steps * (total // grid) - 1
    if isinstance(path, VarianceExploding):
        low, high = path.sigma_min ** (1 / KARRAS), path.sigma_max ** (1 / KARRAS)
        times: Tensor = (low + (steps - 1) / max(grid - 1, 1) * (high - low)) ** KARRAS
        times[-1] = path.sigma_max
        if grid > 1:
            times[0] = path.sigma_min
        return times
    return path.noisiest * steps / grid


def _own_points(path: Path, points: Sequence[float]) -> Tensor:
    times = torch.tensor(list(points), dtype=torch.float64)
    if len(times) < 1 or bool((times[1:] <= times[:-1]).any()):
        raise UserError(f"grid = {list(points)} does not rise; the nearest is {sorted(set(points)) or [path.noisiest]}")
    for edge, wrong in ((path.clean, times[0] <= path.clean), (path.noisiest, times[-1] > path.noisiest)):
        if wrong:
            raise UserError(f"grid = {list(points)} leaves the path at {edge:g}")
    if times[-1] < path.noisiest:
        legal = [*points[:-1], path.noisiest]
        raise UserError(f"grid = {list(points)} ends below pure noise, where drawing starts; the nearest is {legal}")
    return times


def previous(grid: Tensor, index: Tensor, k: Tensor | int, lowest: float) -> Tensor:
    """The time k grid points below grid[index]; `lowest` where the grid has ended.

    index int64 [B] -> float64 [B].
    """
    below = torch.cat([grid.new_tensor([lowest]), grid])
    return below[(index + 1 - k).clamp(min=0)]


def between(path: Path, t: Tensor, s: Tensor, steps: int) -> Tensor:
    """Times of `steps` equal steps from t [B] to s [B], both included, float64 [steps + 1, B].

    Equal in time; on a variance exploding path in sigma^(1/7), as its grid is.
    """
    share = torch.arange(steps + 1, dtype=torch.float64)[:, None] / steps
    if isinstance(path, VarianceExploding):
        a, b = t ** (1 / KARRAS), s ** (1 / KARRAS)
        times = (a + share * (b - a)) ** KARRAS
        return torch.cat([t[None], times[1:-1], s[None]])  # the two ends without rounding
    return torch.cat([t[None], (t + share * (s - t))[1:-1], s[None]])


def edge_below(index: Tensor, count: int, segments: int) -> Tensor:
    """The index of the grid point at the lower edge of the segment that grid[index] belongs to, int64; -1 for the end.

    M segments of N/M points each. A point on an edge belongs to the segment below it, whose noisiest time it is.

    Raises:
        UserError: M does not divide N: its edges are no points of the grid.
    """
    check_segments(count, segments)
    width = count // segments
    return index // width * width - 1


def check_segments(count: int, segments: int) -> None:
    """Refuse segments whose edges are no points of the grid.

    Raises:
        UserError: naming the nearest number of segments.
    """
    if not 1 <= segments <= count or count % segments:
        legal = nearest_divisor(segments, count)
        raise UserError(f"segments = {segments} does not divide the grid of {count} points; the nearest is {legal}")


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
"""The released TLCM sampler's hand-picked times, in eighths of the path, by the number of calls; 1 is ours."""


def inference_times(path: Path, steps: int, *, grid: Grid = 50, spacing: Spacing = "grid") -> Tensor:
    """The times at which the network is called, falling, float64 [steps].

    `grid`: every floor(i N / steps)-th point of the training grid from the noisiest down (LCM's and TCD's
    rule; 4 steps of 50: 999, 759, 499, 259). `trailing`: round(T - i T / steps) - 1, the usual list for ODE
    solvers; EDM's times on a variance exploding path. `tlcm`: TLCM's own times for up to 8 calls (999, 749, 499, 124
    for 4), points of the grid of 8 that its second stage trains.

    Raises:
        UserError: steps out of range.
    """
    points = grid if isinstance(grid, int) else len(grid)
    indices = int(path.noisiest) + 1 if isinstance(path, VariancePreserving) else 1000
    limit = {"grid": points, "trailing": indices, "tlcm": max(TLCM_TIMES)}[spacing]
    if not 1 <= steps <= limit:
        legal = min(max(steps, 1), limit)
        raise UserError(f"steps = {steps} is out of range; the nearest legal one is {legal}")
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
    """Those of some times that lie at or below a share of the noisiest one."""
    return times[share_of(path, times) <= strength + 1e-9]


def times_within(path: Path, steps: int, strength: float, *, grid: Grid = 50, spacing: Spacing = "grid") -> Tensor:
    """The times of `steps` calls that begin at a share of the noisiest time, falling, float64 [steps]: image to image.

    As `inference_times`, from the points that lie in (0, strength] of the path alone: 4 steps of a grid of 50 at
    strength .5 are 499, 379, 259, 139. All calls are made whatever the strength. `trailing` takes them from all
    indices, `tlcm` from its 8 points, evenly where it begins below the noisiest.

    Raises:
        UserError: a strength outside (0, 1], or fewer such points than steps.
    """
    if not 0 < strength <= 1:
        raise UserError(f"strength = {strength} is outside (0, 1]; the nearest is {min(max(strength, 0.01), 1.0)}")
    if strength == 1:
        return inference_times(path, steps, grid=grid, spacing=spacing)
    indices = int(path.noisiest) + 1 if isinstance(path, VariancePreserving) else 1000
    every: dict[Spacing, Grid] = {"grid": grid, "trailing": indices, "tlcm": max(TLCM_TIMES)}
    times = training_grid(path, every[spacing])
    below = times_below(path, times, strength).flip(0)
    if not 1 <= steps <= len(below):
        least = float(share_of(path, times)[min(max(steps, 1), len(times)) - 1])
        raise UserError(
            f"steps = {steps} is out of range at strength = {strength}, where the grid has {len(below)} times; "
            f"the nearest legal strength is {least:.3g}"
        )
    return below[torch.tensor([i * len(below) // steps for i in range(steps)])]
