"""Optimisers and gradient clipping."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.common.sharding import full_tensor
from fewstep.training.config import OptimConfig

MOMENTUM = 0.95
"""Decay of Muon's momentum."""

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic Newton-Schulz iteration; five iterations bring singular values above .01 to .7 to 1.2."""

SMALLEST_SIDE = 16
"""Weights with a shorter side, such as first and last convolutions, stay with AdamW."""


class Muon(torch.optim.AdamW):
    """AdamW whose matrices and convolutions step along their orthogonalised momentum.

    A step has AdamW's usual root mean square, .2 of the learning rate (arXiv 2502.16982, eq. 4), so that both kinds
    of weights share one rate and one decay. A convolution is a matrix of its output channels.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """Move the matrices, then the rest by AdamW."""
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None or weight.dim() < 2:
                    continue
                grad = weight.grad.flatten(1)
                if min(grad.shape) < SMALLEST_SIDE:
                    continue
                state = self.state[weight]
                if not state:
                    state["momentum"] = torch.zeros_like(grad)
                momentum = state["momentum"].lerp_(grad, 1 - MOMENTUM)
                direction = orthogonalize(grad.lerp(momentum, MOMENTUM)).to(weight.dtype).view(weight.shape)
                scale = 0.2 * max(grad.shape) ** 0.5
                weight.mul_(1 - group["lr"] * group["weight_decay"]).sub_(direction, alpha=group["lr"] * scale)
                weight.grad = None
        return super().step(closure)


def orthogonalize(matrix: Tensor) -> Tensor:
    """Return a matrix of the same singular vectors and singular values near 1, fp32 [M, N].

    Newton-Schulz iterations, run on the Gram matrix of the shorter side, which costs less than on the matrix itself.
    """
    a, b, c = NEWTON_SCHULZ
    x = matrix.float() / (matrix.norm() + 1e-7)
    tall = x.shape[0] > x.shape[1]
    x = x.mT if tall else x
    gram = x @ x.mT
    eye = torch.eye(len(gram), device=x.device)
    product: Tensor = eye
    for _ in range(5):
        factor = a * eye + b * gram + c * (gram @ gram)
        product = factor @ product
        gram = factor @ gram @ factor
    result: Tensor = product @ x
    return result.mT if tall else result


def make_optimizer(parameters: Iterable[nn.Parameter], config: OptimConfig) -> torch.optim.Optimizer:
    """Return the optimiser of `config.kind`; AdamW is fused."""
    chosen, settings = list(parameters), config.model_dump(include={"lr", "betas", "eps", "weight_decay"})
    if config.kind == "adamw_8bit":
        import bitsandbytes as bnb

        narrow: torch.optim.Optimizer = bnb.optim.AdamW8bit(chosen, **settings)
        return narrow
    fused = not any(parameter.is_meta for parameter in chosen)  # meta tensors have no fused kernel
    return (Muon if config.kind == "muon" else torch.optim.AdamW)(chosen, **settings, fused=fused)


def clip_gradients(parameters: Iterable[nn.Parameter], limit: float | None) -> Tensor:
    """Scale all gradients so that their global norm is at most `limit`; return the norm before, as a tensor."""
    chosen = [p for p in parameters if p.grad is not None]
    norm = full_tensor(nn.utils.get_total_norm([p.grad for p in chosen if p.grad is not None]))
    if limit is not None:
        nn.utils.clip_grads_with_norm_(chosen, limit, norm)
    return norm
