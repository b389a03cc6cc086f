"""A network on a noise path: its estimate of x0 and eps, with and without guidance.

The network computes in its own precision; conversions are in fp32, since x0 = (x - sigma eps)/alpha multiplies an error
of eps by 14.6 at t = 999 of Stable Diffusion's schedule.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.common.choices import Prediction
from fewstep.common.errors import UserError
from fewstep.diffusion.schedule import PURE_NOISE, Estimate, Path, expand, interpret

BASE = "teacher"
"""The role without adapter."""
FAKE = "fake"
"""The role of the fake score (distribution matching). It starts as the teacher."""

START = "start"
"""The role of a frozen copy of the student that a run starts from, whose jumps may be followed."""

Condition = Mapping[str, Tensor]
"""A network's inputs beside x and t, by name; every tensor is [B, ...]."""

Call = Callable[[Tensor, Tensor, Condition, str], Tensor]
"""network(x_t [B, ...], t [B], condition, role) -> output [B, ...]."""


def computed_in(call: Call, role: str, dtype: torch.dtype) -> Call:
    """Return the call with one role's network under autocast to `dtype`, independent of the other roles'."""

    def typed(x: Tensor, t: Tensor, condition: Condition, called: str) -> Tensor:
        if called != role:
            return call(x, t, condition, called)
        with torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
            return call(x, t, condition, called)

    return typed


def join(first: Condition, second: Condition) -> Condition:
    """Return two conditions as one batch."""
    return {name: torch.cat([first[name], second[name]]) for name in first}


def extended(condition: Condition, **extra: Tensor | None) -> Condition:
    """Return the condition with further inputs, [B] each: s (landing), w (guidance omega). None adds nothing."""
    return {**condition, **{name: value for name, value in extra.items() if value is not None}}


def _widened(x: Tensor) -> Tensor:
    """Return x in fp32, or in its own type where that is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


@dataclass(frozen=True)
class Denoiser:
    """A network, its noise path and what it predicts.

    Attributes:
        embedded: the network takes its guidance as an input and has no unconditional branch (Flux).

    Raises:
        UserError: an eps network on a path that ends in pure noise (alpha = 0), where x0 = (x - sigma eps)/alpha does
            not exist.
    """

    call: Call
    path: Path
    prediction: Prediction
    embedded: bool = False

    def __post_init__(self) -> None:
        noisiest = torch.tensor(self.path.noisiest, dtype=torch.float64)
        if self.prediction == "eps" and float(self.path.alpha(noisiest)) < PURE_NOISE:
            raise UserError(
                "prediction = 'eps' has no x0 with zero terminal SNR (alpha = 0 at the noisiest time); use a 'v' "
                "network, or a schedule without rescale_betas_zero_snr"
            )

    def interpret(self, output: Tensor, x_t: Tensor, t: Tensor) -> Estimate:
        """Return x0 and eps by an output of the network at x_t."""
        x = _widened(x_t)
        alpha_t, sigma_t = expand(self.path.alpha(t), x), expand(self.path.sigma(t), x)
        return interpret(self.prediction, output.to(x.dtype), x, alpha_t, sigma_t)

    def estimate(self, x_t: Tensor, t: Tensor, condition: Condition, role: str) -> Estimate:
        """Return x0 and eps at x_t [B, ...], t float64 [B]; one network call of batch B."""
        return self.interpret(self.call(x_t, t, condition, role), x_t, t)

    def guided(
        self, x_t: Tensor, t: Tensor, condition: Condition, null: Condition, omega: Tensor, role: str
    ) -> Estimate:
        """Return the estimate of (1 + omega) output(c) - omega output(null), omega [B]; one call of batch 2B.

        Guidance commutes with the conversion, which is linear in the output. A network with embedded guidance takes
        1 + omega in one call of batch B. The unconditional half is left out where omega is 0 for all samples.

        Samples with a dropped prompt (`data.empty_prompts`) are evaluated twice with the same result. Batches of their
        own would change what a micro-batch's gradient averages over, or the shape of each call.
        """
        if self.embedded:
            return self.estimate(x_t, t, extended(condition, guidance=1 + omega), role)
        if not omega.any():  # omega is on the CPU: no host sync
            return self.estimate(x_t, t, condition, role)
        both = self.call(torch.cat([x_t, x_t]), torch.cat([t, t]), join(condition, null), role)
        with_prompt, without_prompt = _widened(both).chunk(2)
        w = expand(omega, with_prompt)
        return self.interpret(with_prompt + w * (with_prompt - without_prompt), x_t, t)
