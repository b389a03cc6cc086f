"""The base of families with a UNet: features of the encoder, time and guidance embeddings, CLIP's tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.backbones.base import Backbone, outputs_of
from fewstep.backbones.guidance import add_embedding, guidance_width
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
        return guidance_width(network) is not None

    def add_guidance_embedding(self, network: nn.Module) -> None:
        """Add diffusers' guidance embedding to a UNet that has none, as `guidance.add_embedding`."""
        if not self.embeds_guidance(network):
            add_embedding(network)


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
