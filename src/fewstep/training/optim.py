"""Optimisers and gradient clipping."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from fewstep.common.sharding import full_tensor
from fewstep.training.config import OptimConfig


def make_optimizer(parameters: Iterable[nn.Parameter], config: OptimConfig) -> torch.optim.Optimizer:
    """Return fused AdamW, or AdamW with moments in 8 bits (bitsandbytes) for `adamw_8bit`."""
    chosen, settings = list(parameters), config.model_dump(include={"lr", "betas", "eps", "weight_decay"})
    if config.kind == "adamw_8bit":
        import bitsandbytes as bnb

        narrow: torch.optim.Optimizer = bnb.optim.AdamW8bit(chosen, **settings)
        return narrow
    fused = not any(parameter.is_meta for parameter in chosen)  # meta tensors have no fused kernel
    return torch.optim.AdamW(chosen, **settings, fused=fused)


def clip_gradients(parameters: Iterable[nn.Parameter], limit: float | None) -> Tensor:
    """Scale all gradients so that their global norm is at most `limit`; return the norm before, as a tensor."""
    chosen = [p for p in parameters if p.grad is not None]
    norm = full_tensor(nn.utils.get_total_norm([p.grad for p in chosen if p.grad is not None]))
    if limit is not None:
        nn.utils.clip_grads_with_norm_(chosen, limit, norm)
    return norm
