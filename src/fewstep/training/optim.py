"""Optimisers, learning-rate laws and gradient clipping."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from fewstep.settings import OptimConfig

COOLDOWN = 0.2
"""Share of the steps over which the `cooldown` law falls to 0."""


def make_optimizer(parameters: Iterable[nn.Parameter], config: OptimConfig) -> torch.optim.AdamW:
    """Return AdamW over `parameters`; fused on a GPU, foreach on a CPU (the fused CPU kernel is slower here)."""
    chosen = list(parameters)
    fused = bool(chosen) and chosen[0].device.type == "cuda"
    return torch.optim.AdamW(
        chosen,
        lr=config.lr,
        betas=config.betas,
        weight_decay=config.weight_decay,
        eps=config.eps,
        fused=fused,
        foreach=not fused,
    )


def learning_rate(config: OptimConfig, step: int, steps: int) -> float:
    """Return the rate of update number `step` (0-based) out of `steps`."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    share = (step - config.warmup) / max(1, steps - config.warmup)
    if config.decay == "cosine":
        return config.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, share)))
    if config.decay == "linear":
        return config.lr * max(0.0, 1 - share)
    if config.decay == "cooldown":
        return config.lr * min(1.0, max(0.0, 1 - share) / COOLDOWN)
    return config.lr


def clip_gradients(parameters: Iterable[nn.Parameter], limit: float | None) -> Tensor:
    """Scale all gradients so that their global norm is at most `limit`; return the norm before, as a tensor."""
    chosen = [p for p in parameters if p.grad is not None]
    norm = nn.utils.get_total_norm([p.grad for p in chosen if p.grad is not None])
    if limit is not None:
        nn.utils.clip_grads_with_norm_(chosen, limit, norm)
    return norm
