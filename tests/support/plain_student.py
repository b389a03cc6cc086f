"""A student, a teacher and a fake score small enough for a reference step in plain PyTorch: a flow, x_t = (1 - t) x0 +
t eps, whose networks predict u = eps - x0."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fewstep.diffusion.denoiser import Condition, Denoiser
from fewstep.diffusion.schedule import FlowMatching
from fewstep.methods.consistency import make_pair
from fewstep.methods.pair import MicroBatch, Pair
from support.exact import Wide

ROWS, WIDTH = 12, 3


def network(seed: int) -> nn.Module:
    """A network of (x, t, prompt), float64."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(WIDTH + 2, 16), nn.Tanh(), nn.Linear(16, WIDTH)).double()


class Plain:
    """The three roles, and what a step draws."""

    def __init__(self, step: int = 0) -> None:
        self.roles = {role: network(seed) for seed, role in enumerate(("student", "teacher", "fake"))}
        self.prompts, self.rng = torch.linspace(0.5, 1.5, ROWS).double(), Wide(3, step, tuple(range(ROWS)))

    def u(self, role: str, x: Tensor, t: Tensor, omega: Tensor | float = 0.0) -> Tensor:
        """The velocity of a role; (1 + omega) u(c) - omega u(null), where the null prompt is 0."""
        omega = torch.as_tensor(omega).double().expand(len(x))[:, None]
        with_prompt, without = (
            self.roles[role](torch.cat([x.double(), t.double()[:, None], prompt[:, None]], 1))
            for prompt in (self.prompts, 0 * self.prompts)
        )
        return (1 + omega) * with_prompt - omega * without

    def normal(self, purpose: str) -> Tensor:
        """The noise that the step draws."""
        return self.rng.normal(purpose, (WIDTH,))

    def pair(self, method: Any) -> Pair:
        """The pair of the same step in the library."""

        def call(x: Tensor, t: Tensor, condition: Condition, role: str) -> Tensor:
            return self.roles[role](torch.cat([x.double(), t.double()[:, None], condition["text"]], 1))

        text = self.prompts[:, None]
        data = torch.zeros(ROWS, WIDTH, dtype=torch.float64)
        sample = MicroBatch(data, {"text": text}, {"text": 0 * text})
        return make_pair(method, Denoiser(call, FlowMatching(), "flow"), sample, self.rng)

    def check(self, found: Tensor, wanted: Tensor, role: str = "student") -> None:
        """Compare two losses and their gradients at a role's weights to 1e-6, and see that both have some."""
        weights = list(self.roles[role].parameters())
        slopes = [torch.autograd.grad(loss, weights) for loss in (found, wanted)]
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-9)
        for one, other in zip(*slopes, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)
            assert bool(one.any())
