"""A denoiser with its role, condition, extra conditioning and guidance fixed: what jumps and solvers call."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

from torch import Tensor

from fewstep.common.choices import ExtraCondition
from fewstep.diffusion.denoiser import Condition, Denoiser, extended
from fewstep.diffusion.jump import Denoise, Step
from fewstep.diffusion.samplers import JumpFn
from fewstep.diffusion.schedule import Estimate, index_of


@dataclass(frozen=True)
class ConditionedDenoiser:
    """One role of a denoiser under a fixed condition.

    Attributes:
        extra_conditioning: the network's inputs beside x_t, t and the prompt.
        w: guidance omega [B], for networks with w among them.
        null, omega: condition of the unconditional branch and guidance [B]; None for no guidance.
    """

    denoiser: Denoiser
    condition: Condition
    role: str
    extra_conditioning: Collection[ExtraCondition] = ()
    w: Tensor | None = None
    null: Condition | None = None
    omega: Tensor | None = None

    def estimate(self, x_t: Tensor, t: Tensor, s: Tensor) -> Estimate:
        """Return x0 and eps at x_t, for a jump to s."""
        landing = index_of(self.denoiser.path, s) if "s" in self.extra_conditioning else None
        w = self.w if "w" in self.extra_conditioning else None
        condition = extended(self.condition, s=landing, w=w)
        if self.null is None or self.omega is None:
            return self.denoiser.estimate(x_t, t, condition, self.role)
        return self.denoiser.guided(x_t, t, condition, extended(self.null, s=landing, w=w), self.omega, self.role)

    def denoise(self, x_t: Tensor, t: Tensor) -> Estimate:
        """Return x0 and eps at x_t for a solver, which needs the slope at t: s = t."""
        return self.estimate(x_t, t, t)

    def jump(self, step: Step) -> JumpFn:
        """Return the jump (x_t, t, s) -> x_s by the given jump function."""

        def jump(x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
            denoise: Denoise = lambda x, now: self.estimate(x, now, s)  # noqa: E731
            return step(denoise, self.denoiser.path, x_t, t, s)

        return jump

    def rows(self, index: Tensor) -> ConditionedDenoiser:
        """Return the denoiser for some rows of its batch, int64 [b] on the CPU."""

        def pick(condition: Condition) -> Condition:
            return {name: value[index.to(value.device, non_blocking=True)] for name, value in condition.items()}

        return replace(
            self,
            condition=pick(self.condition),
            w=None if self.w is None else self.w[index],
            null=None if self.null is None else pick(self.null),
            omega=None if self.omega is None else self.omega[index],
        )
