"""A student's jump f(x_t, t -> s), as training and sampling ask for it.

Which jump function it is and what its network is told are choices of the recipe. They travel with the student in its
sampling settings, so that it is asked at inference as it was trained.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from torch import Tensor

from fewstep.common.choices import ExtraCondition
from fewstep.diffusion.denoiser import Condition, Denoiser, tell
from fewstep.diffusion.jump import Denoise, Step
from fewstep.diffusion.samplers import JumpFn
from fewstep.diffusion.schedule import Estimate, index_of


@dataclass(frozen=True)
class ConditionedDenoiser:
    """A role of a denoiser that is asked under one condition.

    Attributes:
        told: what the network is told beside x_t and t.
        w: guidance omega [B] that it stands for, where it is told that.
        null, omega: condition of the unconditional branch and guidance [B] of each call; None for no guidance.
    """

    denoiser: Denoiser
    condition: Condition
    role: str
    extra_conditioning: Collection[ExtraCondition] = ()
    w: Tensor | None = None
    null: Condition | None = None
    omega: Tensor | None = None

    def estimate(self, x_t: Tensor, t: Tensor, s: Tensor) -> Estimate:
        """x0 and eps at x_t, for a jump to s."""
        where = index_of(self.denoiser.path, s) if "s" in self.extra_conditioning else None
        w = self.w if "w" in self.extra_conditioning else None
        condition = tell(self.condition, s=where, w=w)
        if self.null is None or self.omega is None:
            return self.denoiser.estimate(x_t, t, condition, self.role)
        return self.denoiser.guided(x_t, t, condition, tell(self.null, s=where, w=w), self.omega, self.role)

    def denoise(self, x_t: Tensor, t: Tensor) -> Estimate:
        """x0 and eps at x_t for a solver, which wants the slope there: s = t."""
        return self.estimate(x_t, t, t)

    def jumper(self, step: Step) -> JumpFn:
        """The jump (x_t, t, s) -> x_s by the given jump function."""

        def jump(x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
            denoise: Denoise = lambda x, now: self.estimate(x, now, s)  # noqa: E731
            return step(denoise, self.denoiser.path, x_t, t, s)

        return jump
