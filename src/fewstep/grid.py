"""Every list of times: training grids and inference steps. The only place that makes one.

Training and sampling take their times from here, so that a student is asked at inference for the times it was
trained on (law 1 of the architecture). Times are in the path's own units; for a variance-preserving path of
T = 1000 indices the paper's grid of N = 50 is 19, 39, ..., 999.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.errors import UserError, nearest_divisor
from fewstep.names import End, Spacing
from fewstep.schedule import Path, VariancePreserving


def end_time(path: Path, end: End) -> float:
    """The time of the named end point.

    Raises:
        UserError: `index0` on a path that has no indices.
    """
    if end == "clean":
        return path.clean
    if not isinstance(path, VariancePreserving):
        raise UserError("end = 'index0' needs a variance-preserving path; the nearest legal one is 'clean'")
    return 0.0


def training_grid(path: Path, count: int) -> Tensor:
    """N = `count` times, rising, float64 [N]: T/N - 1, 2T/N - 1, ..., T - 1 for an indexed path (LCM, TCD).

    On a continuous path: noisiest * i/N, i = 1 .. N.

    Raises:
        UserError: count is below 1, or does not divide the number of indices.
    """
    if isinstance(path, VariancePreserving):
        total = int(path.noisiest) + 1
        if not 1 <= count <= total or total % count:
            legal = nearest_divisor(count, total)
            raise UserError(f"grid = {count} does not divide {total} training indices; the nearest is {legal}")
        return torch.arange(1, count + 1, dtype=torch.float64) * (total // count) - 1
    if count < 1:
        raise UserError(f"grid = {count} is below 1; the nearest legal one is 1")
    return path.noisiest * torch.arange(1, count + 1, dtype=torch.float64) / count


def previous(grid: Tensor, index: Tensor, k: int, lowest: float) -> Tensor:
    """The time k grid points below grid[index]; `lowest` where the grid has ended.

    index int64 [B] -> float64 [B].
    """
    below = torch.cat([grid.new_tensor([lowest]), grid])
    return below[(index + 1 - k).clamp(min=0)]


def inference_times(path: Path, steps: int, *, grid: int = 50, spacing: Spacing = "grid") -> Tensor:
    """The times at which the network is called, falling, float64 [steps].

    `grid`: every floor(i N / steps)-th point of the training grid from the noisiest down (LCM's and TCD's
    rule; 4 steps of 50: 999, 759, 499, 259). `trailing`: round(T - i T / steps) - 1, the usual list for ODE
    solvers.

    Raises:
        UserError: steps out of range.
    """
    indices = int(path.noisiest) + 1 if isinstance(path, VariancePreserving) else 1000
    limit = grid if spacing == "grid" else indices
    if not 1 <= steps <= limit:
        legal = min(max(steps, 1), limit)
        raise UserError(f"steps = {steps} is out of range; the nearest legal one is {legal}")
    if spacing == "grid":
        points = training_grid(path, grid).flip(0)
        # floor in integers: floating division would drop a point where i N / steps is whole
        return points[torch.tensor([i * grid // steps for i in range(steps)])]
    share = torch.arange(steps, dtype=torch.float64) / steps
    if isinstance(path, VariancePreserving):
        total = path.noisiest + 1
        return (total - share * total).round() - 1
    return path.noisiest * (1 - share)
