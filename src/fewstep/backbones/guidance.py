"""The guidance embedding of a UNet: omega as an input of the network, diffusers' `time_cond_proj_dim`.

LCM's full weights have it (arXiv 2310.04378, section 4.3): a sinusoid of omega goes through a linear layer without bias
and is added to the sinusoid of the time, before the time embedding's first layer.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.backbones.families import GUIDANCE_WIDTH
from fewstep.diffusion.denoiser import Condition


def guidance_width(network: nn.Module) -> int | None:
    """Return the width of a UNet's sinusoid of omega; None for one without a guidance embedding."""
    config: Any = network.config
    width = config.time_cond_proj_dim
    return None if width is None else int(width)


def guidance_sinusoid(w: Tensor, width: int) -> Tensor:
    """Return sin and cos of 1000 w times frequencies from 1 down to 1e-4, fp32 [B, width]; w [B].

    The order and fp32 are those of diffusers' `get_guidance_scale_embedding`: at large w the sinusoid's first half
    differs by 1e-3 in other arithmetic.
    """
    half = width // 2
    steps = torch.arange(half, dtype=torch.float32, device=w.device)
    angles = (1000 * w.float())[:, None] * torch.exp(steps * -(math.log(10_000) / (half - 1)))
    return nn.functional.pad(torch.cat([angles.sin(), angles.cos()], dim=1), (0, width % 2))


def guidance_input(network: nn.Module, x: Tensor, condition: Condition) -> Tensor | None:
    """Return a UNet's `timestep_cond` [B, width] for a call on x [B, ...]; None for one without a guidance embedding.

    omega is the condition's `w` [B] (students), else its `guidance` [B] less 1 (teachers), else 0.

    Raises:
        KeyError: the condition has w, and the network no input for it.
    """
    width = guidance_width(network)
    w = condition.get("w")
    if width is None:
        if w is not None:
            raise KeyError("the condition has w, the UNet no time_cond_proj_dim")
        return None
    if w is None:
        w = condition["guidance"] - 1 if "guidance" in condition else x.new_zeros(len(x))
    return guidance_sinusoid(w.to(x.device, non_blocking=True), width).to(x.dtype)


def add_embedding(network: nn.Module) -> None:
    """Add a guidance embedding of zeros to a UNet and its config: its output stays the same at every omega.

    LCM's released script initialises the layer at random.
    """
    unet: Any = network
    time = unet.time_embedding
    place = time.linear_1.weight
    layer = nn.Linear(GUIDANCE_WIDTH, time.linear_1.in_features, bias=False, device=place.device, dtype=place.dtype)
    nn.init.zeros_(layer.weight)
    time.cond_proj = layer.requires_grad_(place.requires_grad)
    unet.register_to_config(time_cond_proj_dim=GUIDANCE_WIDTH)
