"""A micro-batch, and the pair of points that the two jumps of the consistency loss start from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fewstep.diffusion.conditioned import ConditionedDenoiser
from fewstep.diffusion.denoiser import Condition, Denoiser
from fewstep.diffusion.samplers import JumpFn
from fewstep.methods.config import ConsistencyConfig
from fewstep.methods.times import PairTimes

class StoredTrajectories(Protocol):
    """A trajectory of the teacher for each sample of a micro-batch, in memory or on disk."""

    def point(self, index: Tensor) -> Tensor:
        """Return x at those times of the training grid, int64 [B] -> [B, ...]; -1 is the end point."""
        ...

    def outputs(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Return the teacher's outputs there, with and without the prompt, [B, ...] each."""
        ...


@dataclass(frozen=True)
class HeldTrajectories:
    """Trajectories in memory: the end point first, then the points at the grid's rising times, [B, N + 1, ...].

    Attributes:
        network_outputs: at the grid's times, with and without the prompt, [B, N, ...] each; None where not stored.
    """

    points: Tensor
    network_outputs: tuple[Tensor, Tensor] | None = None

    def point(self, index: Tensor) -> Tensor:
        """Return x at those times."""
        return self.points[torch.arange(len(index)), index + 1]

    def outputs(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Return the teacher's outputs at those times."""
        assert self.network_outputs is not None
        rows = torch.arange(len(index))
        return self.network_outputs[0][rows, index], self.network_outputs[1][rows, index]


@dataclass(frozen=True)
class MicroBatch:
    """Stored data of one micro-batch.

    Attributes:
        data: clean latents x_0, fp32 [B, ...]; of starts without data only the shape is used.
        condition, null: inputs of the network with and without the prompt, [B, ...] each.
        omega: guidance that the stored trajectories were drawn with, [B]; None for data.
        stored: those trajectories.
        prompts: number of each sample's prompt, int64 [B]; the count of prompts means the empty one.
        times: drawn already, where `stored` was read for them; else None.
    """

    data: Tensor
    condition: Condition
    null: Condition
    omega: Tensor | None = None
    stored: StoredTrajectories | None = None
    prompts: Tensor | None = None
    times: PairTimes | None = None


@dataclass(frozen=True)
class Pair:
    """Times and guidance of a micro-batch, x_{t_n+k}, and the networks that jump.

    Attributes:
        omega: guidance of each sample, float64 [B].
        student: the student's jump, with gradient.
        target: the target's jump.
        teacher: the frozen teacher, guided by omega unless the recipe has no guidance.
        x_nk: x_{t_n+k}, where both jumps start, [B, ...].
        clean, clean_at: data or samples that x_nk was noised from, [B, ...], and their time; None where there are none.
        noise: eps of noised data, [B, ...]; else None.
    """

    config: ConsistencyConfig
    denoiser: Denoiser
    batch: MicroBatch
    times: PairTimes
    omega: Tensor
    student: JumpFn
    target: JumpFn
    teacher: ConditionedDenoiser
    x_nk: Tensor
    clean: Tensor | None = None
    clean_at: float | None = None
    noise: Tensor | None = None
