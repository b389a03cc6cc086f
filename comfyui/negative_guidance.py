"""A negative prompt at cfg 1, by normalised attention guidance (NAG, arXiv 2505.21179); needs torch alone.

For models with a UNet (Stable Diffusion 1.x, 2.x, XL).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

DOUBLED = "fewstep_doubled"
"""Entry of a block's options: its rows were doubled for the negative prompt."""


def blend(positive: Tensor, negative: Tensor, scale: float, tau: float, alpha: float) -> Tensor:
    """Return alpha z^ + (1 - alpha) z+, z^ = z~ min(|z~|, tau |z+|)/|z~|, z~ = z+ + scale (z+ - z-), lengths in L1."""
    away = positive + scale * (positive - negative)
    ratio = away.abs().sum(-1, keepdim=True) / positive.abs().sum(-1, keepdim=True).clamp(min=1e-7)
    return alpha * away * (ratio.clamp(max=tau) / ratio.clamp(min=1e-7)) + (1 - alpha) * positive


def both(text: Tensor, negative: Tensor) -> Tensor:
    """Return the prompt's rows, then as many of the negative one; a shorter text is repeated, to the same effect."""
    tokens = math.lcm(text.shape[1], negative.shape[1])
    rows = negative.to(text).expand(len(text), -1, -1)
    return torch.cat([each.repeat(1, tokens // each.shape[1], 1) for each in (text, rows)])


def led_away(model: Any, negative: Tensor, scale: float, tau: float, alpha: float) -> Any:
    """Return a model whose cross-attention is led away from a negative prompt's states, [1, tokens, width].

    Raises:
        ValueError: a model without a UNet.
    """
    unet = model.get_model_object("diffusion_model")
    if not hasattr(unet, "input_blocks"):
        raise ValueError(
            f"{type(unet).__name__} is no UNet with cross-attention; use the negative prompt at cfg above 1"
        )

    def double(n: Tensor, context: Tensor, value: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        """Attend to both prompts, where the batch has no unconditional rows (cfg 1)."""
        if 1 in options.get("cond_or_uncond", []):
            return n, context, value
        options[DOUBLED] = True
        return torch.cat([n, n]), both(context, negative), both(value, negative)

    def attend(q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Tensor:
        heads = options["n_heads"]
        split = [each.unflatten(-1, (heads, -1)).transpose(1, 2) for each in (q, k, v)]
        z = torch.nn.functional.scaled_dot_product_attention(*split).transpose(1, 2).flatten(2)
        return blend(*z.chunk(2), scale, tau, alpha) if options.pop(DOUBLED, False) else z

    made = model.clone()
    made.set_model_attn2_patch(double)
    counts = {"input": len(unet.input_blocks), "middle": 1, "output": len(unet.output_blocks)}
    for name, count in counts.items():
        for number in range(count):
            made.set_model_attn2_replace(attend, name, number)
    return made
