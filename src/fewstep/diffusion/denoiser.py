"""A network on a path: its estimate of x0 and eps, with and without guidance.

The network runs in whatever precision it likes; conversion happens in fp32 (x0 = (x - sigma eps)/alpha
multiplies an error of eps by 14.6 at t = 999 of SD's schedule).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.common.choices import Prediction
from fewstep.common.errors import UserError
from fewstep.diffusion.schedule import PURE_NOISE, Estimate, Path, expand, interpret

Condition = Mapping[str, Tensor]
"""What a network is told beside x and t, by name; every tensor is [B, ...]."""

Call = Callable[[Tensor, Tensor, Condition, str], Tensor]
"""network(x_t [B, ...], t [B], condition, role) -> output [B, ...]."""


def computed_in(call: Call, role: str, kind: torch.dtype) -> Call:
    """The call with the network of one role computed in a type of its own (autocast), whatever the others are in."""

    def typed(x: Tensor, t: Tensor, condition: Condition, asked: str) -> Tensor:
        if asked != role:
            return call(x, t, condition, asked)
        with torch.autocast(x.device.type, kind, enabled=kind != torch.float32):
            return call(x, t, condition, asked)

    return typed


def join(first: Condition, second: Condition) -> Condition:
    """Two conditions as one batch."""
    return {name: torch.cat([first[name], second[name]]) for name in first}


def tell(condition: Condition, **told: Tensor | None) -> Condition:
    """The condition with what else the network is told: s (where the jump lands), w (guidance omega), [B] each."""
    return {**condition, **{name: value for name, value in told.items() if value is not None}}


def _wide(x: Tensor) -> Tensor:
    """x in fp32, or in the wider type that it has."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


@dataclass(frozen=True)
class Denoiser:
    """network + path + what the network predicts.

    Attributes:
        embedded: the network is told its guidance and has no unconditional branch (Flux).

    Raises:
        UserError: an eps network on a path that ends in pure noise (alpha = 0): x0 = (x - sigma eps)/alpha
            does not exist there.
    """

    call: Call
    path: Path
    prediction: Prediction
    embedded: bool = False

    def __post_init__(self) -> None:
        noisiest = torch.tensor(self.path.noisiest, dtype=torch.float64)
        if self.prediction == "eps" and float(self.path.alpha(noisiest)) < PURE_NOISE:
            raise UserError(
                "prediction = 'eps' with zero terminal SNR (alpha = 0 at the noisiest time) has no x0; "
                "the nearest legal one is 'v', or a schedule without rescale_betas_zero_snr"
            )

    def interpret(self, output: Tensor, x_t: Tensor, t: Tensor) -> Estimate:
        """x0 and eps by an output of the network at x_t."""
        x = _wide(x_t)
        alpha_t, sigma_t = expand(self.path.alpha(t), x), expand(self.path.sigma(t), x)
        return interpret(self.prediction, output.to(x.dtype), x, alpha_t, sigma_t)

    def estimate(self, x_t: Tensor, t: Tensor, condition: Condition, role: str) -> Estimate:
        """x0 and eps at x_t [B, ...], t float64 [B]; one network call of batch B."""
        return self.interpret(self.call(x_t, t, condition, role), x_t, t)

    def guided(
        self, x_t: Tensor, t: Tensor, condition: Condition, null: Condition, omega: Tensor, role: str
    ) -> Estimate:
        """The estimate of (1 + omega) output(c) - omega output(null), omega [B]; one call of batch 2B.

        Guidance commutes with the conversion, which is linear in the output. A network that is told its guidance is
        told 1 + omega, in one call of batch B; where no sample has any, the unconditional half is not asked.

        Samples with and without guidance do not meet in a batch: omega is drawn from a range, or is 0 for all. Samples
        whose prompt was dropped (`data.empty_prompts`) do meet others, and are asked twice for one answer, which costs
        half their share of a call. It is not saved: in batches of their own they would make a step's gradient that of
        the empty prompt alone, and among others the call would be of another shape in each batch.
        """
        if self.embedded:
            return self.estimate(x_t, t, tell(condition, guidance=1 + omega), role)
        if not omega.any():  # on the CPU, where guidance is decided
            return self.estimate(x_t, t, condition, role)
        both = self.call(torch.cat([x_t, x_t]), torch.cat([t, t]), join(condition, null), role)
        with_prompt, without = _wide(both).chunk(2)
        w = expand(omega, with_prompt)
        return self.interpret(with_prompt + w * (with_prompt - without), x_t, t)


BASE = "teacher"
"""The role without adapter."""


FAKE = "fake"
"""The role that follows what the student draws (distribution matching); it starts as the teacher and stays apart."""
