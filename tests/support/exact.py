"""Exact teachers for several tests."""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.common.rng import KeyedRng
from fewstep.diffusion.schedule import Path
from fewstep_worlds.plane.mixture import Mixture, times_of

__all__ = ["Mixture", "Wide", "gaussian", "three_modes", "times_of", "two_modes_line"]


class Wide(KeyedRng):
    """The same noise in float64."""

    def normal(self, purpose: str, shape: tuple[int, ...]) -> Tensor:
        return super().normal(purpose, shape).double()


def gaussian(path: Path, mean: tuple[float, ...] = (0.7, -0.4), std: float = 0.6) -> Mixture:
    """One Gaussian."""
    return Mixture(path, *(torch.tensor(v, dtype=torch.float64) for v in ([1.0], [mean], [std])))


def three_modes(path: Path) -> Mixture:
    """Three modes of unlike weights and widths in the plane."""
    weights, stds = [0.5, 0.3, 0.2], [0.25, 0.35, 0.2]
    means = [[1.0, 0.5], [-1.2, 0.3], [0.2, -1.1]]
    return Mixture(path, *(torch.tensor(v, dtype=torch.float64) for v in (weights, means, stds)))


def two_modes_line(path: Path) -> Mixture:
    """Two modes on the line, where the exact flow is also known from the distribution function."""
    return Mixture(path, *(torch.tensor(v, dtype=torch.float64) for v in ([0.6, 0.4], [[1.0], [-0.8]], [0.3, 0.4])))
