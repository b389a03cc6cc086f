"""Exponential moving averages of parameters."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fewstep.common.sharding import copy_into


class Ema:
    """A moving average of named parameters: theta_ema <- mu theta_ema + (1 - mu) theta.

    With `warm_up` the decay is mu_n = min(mu, (1 + n) / (10 + n)), so that the start is forgotten early. Consistency
    targets use the plain decay, as in the papers.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        decay: float,
        shadow: Mapping[str, Tensor] | None = None,
        warm_up: bool = True,
    ) -> None:
        """Start from `parameters`; with `shadow`, the average is kept in those tensors (another role's weights)."""
        self.decay = decay
        self.warm_up = warm_up
        self.updates = 0
        if shadow is None:
            self.shadow = {name: p.detach().clone() for name, p in parameters.items()}
        else:
            self.shadow = {name: shadow[name].detach() for name in parameters}
            self.copy_from(parameters)

    @torch.no_grad()
    def update(self, parameters: Mapping[str, Tensor]) -> None:
        """Move the average one step towards `parameters` (same names and shapes)."""
        self.updates += 1
        mu = min(self.decay, (1 + self.updates) / (10 + self.updates)) if self.warm_up else self.decay
        names = list(self.shadow)
        torch._foreach_lerp_([self.shadow[n] for n in names], [parameters[n].detach() for n in names], 1 - mu)

    @torch.no_grad()
    def copy_from(self, parameters: Mapping[str, Tensor]) -> None:
        """Set the average to `parameters`."""
        for name, value in self.shadow.items():
            copy_into(value, parameters[name])
