"""A sampler's loop turned inside out: what is asked of a network between two calls, for those who own the loop.

A jump of several calls is run again with the answers that are known, until it asks for no more.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fewstep.diffusion.jump import Denoise, Step
from fewstep.diffusion.schedule import Estimate, Path


def as_batch(t: float) -> Tensor:
    """A time as a batch of one, float64 [1]."""
    return torch.tensor([t], dtype=torch.float64)


class ReplayError(Exception):
    """A jump asks its network once more: for x at time t."""

    def __init__(self, x: Tensor, t: Tensor) -> None:
        super().__init__()
        self.x, self.t = x, t


def replay_outputs(answers: Sequence[Estimate]) -> Denoise:
    """A network that has given its answers already; the next question is raised to whoever runs it."""
    given = iter(answers)

    def denoise(x: Tensor, t: Tensor) -> Estimate:
        answer = next(given, None)
        if answer is None:
            raise ReplayError(x, t)
        return answer

    return denoise


def replayed_times(step: Step, path: Path, t: Tensor, s: Tensor) -> list[float]:
    """The times at which a jump from t to s [1] calls its network, in order."""
    asked: list[float] = []

    def denoise(x: Tensor, now: Tensor) -> Estimate:
        asked.append(float(now))
        return Estimate(torch.zeros_like(x), torch.zeros_like(x))

    step(denoise, path, torch.zeros(1, 1, dtype=torch.float64), t, s)
    return asked
