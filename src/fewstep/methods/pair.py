"""A micro-batch, and the pair of points that the two jumps of the consistency loss start from."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from fewstep.diffusion.conditioned import ConditionedDenoiser
from fewstep.diffusion.denoiser import Condition, Denoiser
from fewstep.diffusion.samplers import JumpFn
from fewstep.methods.config import ConsistencyConfig
from fewstep.methods.times import PairTimes


@dataclass(frozen=True)
class StoredPoints:
    """The points of stored trajectories of the teacher that a pair uses.

    Attributes:
        times: of the pair.
        x_nk, x_n: the points at t_{n+k} and t_n, [B, ...]; x_n is None if the recipe does not use it.
        outputs_nk: the teacher's outputs at t_{n+k}, with and without the prompt, [B, ...] each; None if not used.
    """

    times: PairTimes
    x_nk: Tensor
    x_n: Tensor | None = None
    outputs_nk: tuple[Tensor, Tensor] | None = None

    @classmethod
    def of(cls, points: Tensor, times: PairTimes, outputs: tuple[Tensor, Tensor] | None = None) -> StoredPoints:
        """Take those of whole trajectories in memory.

        Args:
            points: the end point first, then those at the grid's rising times, [B, N + 1, ...].
            outputs: at the grid's times, [B, N, ...] each.
        """
        rows, nk = torch.arange(len(points)), times.index_nk
        outputs_nk = outputs and (outputs[0][rows, nk], outputs[1][rows, nk])
        return cls(times, points[rows, nk + 1], points[rows, times.index_n + 1], outputs_nk)


@dataclass(frozen=True)
class MicroBatch:
    """Stored data of one micro-batch.

    Attributes:
        data: clean latents x_0, fp32 [B, ...]; of starts without data only the shape is used.
        condition, null: inputs of the network with and without the prompt, [B, ...] each.
        omega: guidance that the stored trajectories were drawn with, [B]; None for data.
        stored: points of those trajectories.
        prompts: number of each sample's prompt, int64 [B]; the count of prompts means the empty one.
    """

    data: Tensor
    condition: Condition
    null: Condition
    omega: Tensor | None = None
    stored: StoredPoints | None = None
    prompts: Tensor | None = None


@dataclass(frozen=True)
class Pair:
    """Times and guidance of a micro-batch, x_{t_n+k}, and the networks that jump.

    Attributes:
        omega: guidance of each sample, float64 [B].
        student: the student's jump, with gradient.
        target: the target's jump.
        teacher: the frozen teacher, guided by omega unless the recipe has no guidance.
        followed: whose steps lead from t_{n+k} to t_n, the teacher or another frozen student.
        x_nk: x_{t_n+k}, where both jumps start, [B, ...].
        clean, clean_at: data or samples that x_nk was noised from, [B, ...], and their time; None where there are none.
        noise: eps of noised data, [B, ...]; else None.
        scalars: further scalars of the terms for the log, which the terms add.
    """

    config: ConsistencyConfig
    denoiser: Denoiser
    batch: MicroBatch
    times: PairTimes
    omega: Tensor
    student: JumpFn
    target: JumpFn
    teacher: ConditionedDenoiser
    followed: ConditionedDenoiser
    x_nk: Tensor
    clean: Tensor | None = None
    clean_at: float | None = None
    noise: Tensor | None = None
    scalars: dict[str, Tensor] = field(default_factory=dict)
