"""Run a multi-call jump one network call at a time, for callers (diffusers pipelines) that own the sampling loop.

The jump is run again with the known outputs of the network until it needs no further one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fewstep.diffusion.jump import Denoise, Step
from fewstep.diffusion.schedule import Estimate, Path


class ReplayError(Exception):
    """A jump needs a further network call: at x, time t."""

    def __init__(self, x: Tensor, t: Tensor) -> None:
        super().__init__()
        self.x, self.t = x, t


def replay_outputs(outputs: Sequence[Estimate]) -> Denoise:
    """Return a denoiser that replays known outputs; its next call raises ReplayError."""
    known = iter(outputs)

    def denoise(x: Tensor, t: Tensor) -> Estimate:
        output = next(known, None)
        if output is None:
            raise ReplayError(x, t)
        return output

    return denoise


def replayed_times(step: Step, path: Path, t: Tensor, s: Tensor) -> list[float]:
    """Return the times of the network calls of a jump from t to s [1], in order."""
    times: list[float] = []

    def denoise(x: Tensor, now: Tensor) -> Estimate:
        times.append(float(now))
        return Estimate(torch.zeros_like(x), torch.zeros_like(x))

    step(denoise, path, torch.zeros(1, 1, dtype=torch.float64), t, s)
    return times
