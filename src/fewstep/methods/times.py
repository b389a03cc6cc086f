"""The times that a batch is trained at: rules for t_{n+k}, t_n and s.

Times are grid points or the end point; t_n and s stay in the segment of t_{n+k}.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import gcd

import torch
from torch import Tensor

from fewstep.common.choices import SRule
from fewstep.common.rng import KeyedRng
from fewstep.diffusion.grid import edge_below, end_time, inference_times, previous, training_grid
from fewstep.diffusion.schedule import Path
from fewstep.methods.config import ConsistencyConfig

NOWHERE = -2
"""Below every index of a grid, the end point's -1 included."""


@dataclass(frozen=True)
class PairTimes:
    """The times of a batch, float64 [B] each: t_{n+k} >= t_n >= s (equal at index 0 of a grid that has it).

    `top` is their segment's upper edge. `index_nk` and `index_n`, int64 [B], are grid indices; -1 is the end point.
    """

    t_nk: Tensor
    t_n: Tensor
    s: Tensor
    top: Tensor
    index_nk: Tensor
    index_n: Tensor


@dataclass(frozen=True)
class GridTimes:
    """The grid's times by index, and the end point as index -1."""

    grid: Tensor
    end: float

    def at(self, index: Tensor) -> Tensor:
        """Return the times at some indices, float64, the shape of `index`."""
        return previous(self.grid, index, 0, self.end)


def stride(count: int) -> int:
    """Return the step between the parts of samples in a row, which visits all `count` parts.

    It is the number coprime to `count` that is nearest to its golden section, so that few samples are well spread.
    """
    return min((n for n in range(1, count + 1) if gcd(n, count) == 1), key=lambda n: abs(n - 0.618 * count))


def in_turn(rng: KeyedRng, count: int, points: int) -> Tensor:
    """Draw grid indices of `points` stratified over `count` parts, int64 [B], for roll-outs and simulations.

    Processes with sharded weights must call the network equally often, and a compiled network has a graph for each
    number of rows. Samples therefore take the R parts of the grid in turn: R samples in a row have every length once
    (where R divides the grid's points), fewer of them well spread lengths. Each training step begins at a random part,
    so that each sample's index is uniform.
    """
    turn = torch.tensor(rng.indices) * stride(count) + rng.shared("part", 0, count)
    return (turn % count * points + rng.integers("n", 0, points)) // count


def draw_times(config: ConsistencyConfig, path: Path, rng: KeyedRng) -> PairTimes:
    """Draw t_{n+k} uniformly over the grid, then t_n, then s. Where start = noise, t_{n+k} is the noisiest time.

    t_{n+k} is stratified for roll-outs and simulations (`in_turn`), else independent.

    t_n lies k points below, or at the lower edge of the segment where fewer are left; with one segment the end point.
    With k_low, k is uniform from it to k or to what is left. In a limit t_n is t_{n+k}.

    While the grid grows (`config.grid_start`), only every m-th point from the noisiest down is used, and k counts
    these: the times of a coarse grid are times of the last one.
    """
    grid = training_grid(path, config.grid)
    apart = len(grid) // config.points_at(rng.step, rng.steps)
    if config.start in ("rollout", "simulation"):
        index = in_turn(rng, config.rollout if config.start == "rollout" else len(grid), len(grid))
    elif config.start == "noise":
        index = torch.full((len(rng.indices),), len(grid) - 1)
    else:
        index = (rng.integers("n", 0, len(grid) // apart) + 1) * apart - 1
    edge = edge_below(index, len(grid), config.segments)
    k = torch.full_like(index, config.k)
    if config.k_low is not None:
        left = -((edge - index) // apart)  # an edge between two coarse points counts as one
        most = torch.minimum(k, left)
        least = most.clamp(max=config.k_low)
        k = least + (rng.uniform("k") * (most - least + 1)).long()
    if config.continuous:
        k = torch.zeros_like(index)
    grid_times = GridTimes(grid, end_time(path, config.end))
    below = torch.maximum(index - k * apart, edge)
    s = S_RULES[config.s](config, path, grid_times, edge, below, rng)
    top = grid_times.at(edge + len(grid) // config.segments)
    return PairTimes(grid_times.at(index), grid_times.at(below), s, top, index, below)


def _edge(
    config: ConsistencyConfig, path: Path, grid_times: GridTimes, edge: Tensor, below: Tensor, rng: KeyedRng
) -> Tensor:
    """Return the segment's lower edge, with one segment the end point (CD, CT, LCM; MCM, PCM, TLCM's stage 1)."""
    return grid_times.at(edge)


def _uniform(
    config: ConsistencyConfig, path: Path, grid_times: GridTimes, edge: Tensor, below: Tensor, rng: KeyedRng
) -> Tensor:
    """Draw uniformly from the grid's points from the edge to t_n, both included (TCD, CTM; TSCD).

    At s = t_n the target is the solver's own point, which rules out the collapsed solution; at the end point the term
    is LCM's. A share `anchor` of the samples lands there (MeanFlow, arXiv 2505.13447, section 4.3: r = t).
    """
    place = edge + (rng.uniform("s") * (below - edge + 1).double()).long()
    return grid_times.at(torch.where(rng.chance("anchor", config.anchor), below, place) if config.anchor else place)


def _inference(
    config: ConsistencyConfig, path: Path, grid_times: GridTimes, edge: Tensor, below: Tensor, rng: KeyedRng
) -> Tensor:
    """Draw an inference time, times 1 - U[0, spread] as SSS shrinks it (TDD, arXiv 2409.01347).

    Candidates are the times of all step counts in `inference_steps` and the segment's lower edge, at or below t_n and
    at most the share `reach` of the grid's points below it; else the nearest one below. The edge is not shrunk: s lies
    in [edge, t_n], and the end point itself is trained.
    """
    low, high = config.inference_steps
    lists = [inference_times(path, steps, grid=config.grid) for steps in range(low, high + 1)]
    wanted = torch.cat(lists).unique()  # type: ignore[no-untyped-call]
    points = torch.searchsorted(grid_times.grid, wanted)  # by index: EDM's times are not even
    lowest, highest = edge[:, None], below[:, None]
    every = torch.cat([lowest, torch.where(points > lowest, points, NOWHERE)], 1)
    inside = (every >= lowest) & (every <= highest)
    nearest = torch.where(inside, every, NOWHERE).argmax(1)
    open_to = inside & (every >= highest - config.reach * len(grid_times.grid))
    open_to[torch.arange(len(edge)), nearest] = True
    place = (rng.uniform("s") * open_to.sum(1)).long()[:, None]
    chosen = grid_times.at(every.gather(1, (open_to.cumsum(1) > place).int().argmax(1, keepdim=True))[:, 0])
    shrunk: Tensor = (1 - rng.uniform("spread", 0, config.spread)) * chosen
    # a factor below 1 raises the times below 0, such as clean data's on an indexed path, and so the end point
    return torch.minimum(torch.maximum(shrunk, grid_times.at(edge)), chosen)


def _next(
    config: ConsistencyConfig, path: Path, grid_times: GridTimes, edge: Tensor, below: Tensor, rng: KeyedRng
) -> Tensor:
    """Return t_n itself: the next point is regressed onto (KD, SMD, DP-DMD)."""
    return grid_times.at(below)


SRules = Mapping[SRule, Callable[[ConsistencyConfig, Path, GridTimes, Tensor, Tensor, KeyedRng], Tensor]]
S_RULES: SRules = {"edge": _edge, "uniform": _uniform, "inference": _inference, "next": _next}
"""(config, path, grid times, index of the segment's lower edge, index of t_n, rng) -> s."""
