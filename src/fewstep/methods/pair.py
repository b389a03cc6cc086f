"""What a micro-batch is made of, and what the two jumps of a pair are made from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from fewstep.diffusion.conditioned import ConditionedDenoiser
from fewstep.diffusion.denoiser import BASE, Condition, Denoiser
from fewstep.diffusion.samplers import JumpFn
from fewstep.methods.config import ConsistencyConfig
from fewstep.methods.times import PairTimes


class Stored(Protocol):
    """A trajectory of the teacher for each sample of a micro-batch, wherever it is kept."""

    def point(self, index: Tensor) -> Tensor:
        """x at those times of the training grid, int64 [B] -> [B, ...]; -1 is the end point."""
        ...

    def outputs(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """What the network said there, with and without the prompt, [B, ...] each."""
        ...


@dataclass(frozen=True)
class HeldTrajectories:
    """Trajectories in memory: the end point first, then the points at the grid's rising times, [B, N + 1, ...].

    Attributes:
        said: the network's outputs at the grid's times with and without the prompt, [B, N, ...] each; None for none.
    """

    points: Tensor
    said: tuple[Tensor, Tensor] | None = None

    def point(self, index: Tensor) -> Tensor:
        """x at those times."""
        return self.points[torch.arange(len(index)), index + 1]

    def outputs(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """What the network said there."""
        assert self.said is not None
        rows = torch.arange(len(index))
        return self.said[0][rows, index], self.said[1][rows, index]


@dataclass(frozen=True)
class Sample:
    """What a micro-batch is made of.

    Attributes:
        data: clean latents x_0, fp32 [B, ...]; where a recipe starts without data, anything of that shape.
        condition, null: what the network is told, with and without the prompt; [B, ...] each.
        omega: the guidance that stored trajectories were drawn with, [B]; None for data.
        stored: those trajectories.
        prompts: which prompts the condition says, int64 [B]; the number of prompts for the empty one.
        times: those that it was read for; None where nothing that was read depends on them.
    """

    data: Tensor
    condition: Condition
    null: Condition
    omega: Tensor | None = None
    stored: Stored | None = None
    prompts: Tensor | None = None
    times: PairTimes | None = None


PathPoint = Callable[[Tensor, Tensor], Tensor]
"""(t float64 [B], its index in the training grid int64 [B]) -> the point x_t of a sample's path, [B, ...]."""


@dataclass(frozen=True)
class Cast:
    """Who jumps, from when to when, under which guidance: what is known before the first point is.

    Attributes:
        omega: guidance of each sample, float64 [B].
        student: the student's jump, with gradient.
        judge: the target's jump.
    """

    config: ConsistencyConfig
    denoiser: Denoiser
    sample: Sample
    omega: Tensor
    times: PairTimes
    student: JumpFn
    judge: JumpFn

    @property
    def teacher(self) -> ConditionedDenoiser:
        """The frozen teacher, guided by omega unless the recipe has no guidance."""
        voice = ConditionedDenoiser(self.denoiser, self.sample.condition, BASE)
        if self.config.guidance.convention == "none":
            return voice
        return replace(voice, null=self.sample.null, omega=self.omega)


@dataclass(frozen=True)
class Scene(Cast):
    """What the two jumps of a batch are made from, and what a law of the next point may look at.

    Attributes:
        x_nk: where both jumps come from.
        path_at: any point of the path that x_nk lies on; None where only x_nk itself is known.
        clean, clean_at: the data or samples that x_nk was noised from, [B, ...], and the time that they lie at; None
            where there are none.
    """

    x_nk: Tensor
    path_at: PathPoint | None
    clean: Tensor | None
    clean_at: float | None
