"""The base of families with a UNet: features of the encoder, CLIP's tokens, and the guidance embedding.

The guidance embedding is omega as an input of the network, diffusers' `time_cond_proj_dim`. LCM's full weights have it
(arXiv 2310.04378, section 4.3): a sinusoid of omega goes through a linear layer without bias and is added to that of
the time, before the time embedding's first layer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.backbones.base import Backbone, outputs_of
from fewstep.backbones.families import GUIDANCE_WIDTH
from fewstep.diffusion.denoiser import Condition


class UNetBackbone(Backbone):
    """A pipeline around a UNet2DConditionModel."""

    outlets = ("conv_out", "up_blocks")
    time_embedder = "time_embedding"
    layout = torch.channels_last

    def features(self, network: nn.Module, x: Tensor, t: Tensor, condition: Condition) -> list[Tensor]:
        """Return the outputs of a UNet's down blocks and of its middle block, if it has one, [B, C, h, w] each.

        The up blocks are not evaluated.
        """
        found = outputs_of(encoder_blocks(network), lambda: self.call(network, x, t, condition))
        return [output[0] if isinstance(output, tuple) else output for output in found]

    @property
    def feature_channels(self) -> list[int]:
        """Channels of each of its `features`."""
        channels = list(self.network.config.block_out_channels)  # type: ignore[union-attr,arg-type]
        return [*channels, channels[-1]][: len(encoder_blocks(self.network))]

    def embeds_guidance(self, network: nn.Module) -> bool:
        """Return whether a UNet has diffusers' guidance embedding, `time_cond_proj_dim`."""
        config: Any = network.config
        return config.time_cond_proj_dim is not None

    def add_guidance_embedding(self, network: nn.Module) -> None:
        """Add a guidance embedding of zeros to a UNet that has none, and to its config: its output stays the same.

        LCM's released script initialises the layer at random.
        """
        if self.embeds_guidance(network):
            return
        unet: Any = network
        first = unet.time_embedding.linear_1
        place = {"device": first.weight.device, "dtype": first.weight.dtype}
        layer = nn.Linear(GUIDANCE_WIDTH, first.in_features, bias=False, **place)
        nn.init.zeros_(layer.weight)
        unet.time_embedding.cond_proj = layer.requires_grad_(first.weight.requires_grad)
        unet.register_to_config(time_cond_proj_dim=GUIDANCE_WIDTH)


def encoder_blocks(network: nn.Module) -> list[nn.Module]:
    """Return a UNet's down blocks and middle block; BK-SDM's smallest UNets have no middle block."""
    blocks: Any = [*network.down_blocks, network.mid_block]  # type: ignore[misc]
    return [block for block in blocks if block is not None]


def padded_tokens(tokenizer: Any, prompts: Sequence[str], device: torch.device) -> Any:
    """Return the tokens of prompts, padded and cut to the tokenizer's length, on the device."""
    return tokenizer(
        list(prompts),
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    ).to(device)


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
    config: Any = network.config
    width, w = config.time_cond_proj_dim, condition.get("w")
    if width is None:
        if w is not None:
            raise KeyError("the condition has w, the UNet no time_cond_proj_dim")
        return None
    if w is None:
        w = condition["guidance"] - 1 if "guidance" in condition else x.new_zeros(len(x))
    return guidance_sinusoid(w.to(x.device, non_blocking=True), width).to(x.dtype)
