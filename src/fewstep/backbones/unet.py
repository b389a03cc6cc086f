"""What the families with a UNet share: features of its way down, its time embedding, its last layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fewstep.backbones.base import Backbone, outputs_of
from fewstep.backbones.guidance import add_embedding, guidance_width
from fewstep.diffusion.denoiser import Condition
from fewstep.diffusion.schedule import index_of


class UNetBackbone(Backbone):
    """A pipeline around a UNet2DConditionModel."""

    outlets = ("conv_out", "up_blocks")
    layout = torch.channels_last

    def features(self, network: nn.Module, x: Tensor, t: Tensor, condition: Condition) -> list[Tensor]:
        """Return the outputs of a UNet's down blocks and of its middle block, if it has one, [B, C, h, w] each.

        The up blocks are not evaluated.
        """
        parts = self._looks(network)
        found = outputs_of(parts, lambda: self.call(network, x, t, condition))
        return [output[0] if isinstance(output, tuple) else output for output in found]

    @property
    def feature_channels(self) -> list[int]:
        """Channels of each of its `features`."""
        channels = list(self.network.config.block_out_channels)  # type: ignore[union-attr,arg-type]
        return [*channels, channels[-1]][: len(self._looks(self.network))]

    @staticmethod
    def _looks(network: nn.Module) -> list[nn.Module]:
        """The blocks whose outputs are `features`; BK-SDM's smallest UNets have no middle block."""
        blocks: Any = [*network.down_blocks, network.mid_block]  # type: ignore[misc]
        return [block for block in blocks if block is not None]

    def time_embedding(self, network: nn.Module) -> nn.Module:
        """The part of a UNet that embeds the time."""
        part: nn.Module = network.time_embedding  # type: ignore[assignment]
        return part

    @property
    def embedded_guidance(self) -> bool:
        """Whether the network embeds its guidance (LCM's full weights), and so has no unconditional branch."""
        return self.folder.takes_guidance

    def embeds_guidance(self, network: nn.Module) -> bool:
        """Whether a UNet has diffusers' guidance embedding, `time_cond_proj_dim`."""
        return guidance_width(network) is not None

    def add_guidance_embedding(self, network: nn.Module) -> None:
        """Give a UNet diffusers' guidance embedding where it has none, as `guidance.add_embedding`."""
        if not self.embeds_guidance(network):
            add_embedding(network)

    def told_time(self, x: Tensor, t: Tensor) -> Tensor:
        """Times in the network's indices, fp32 [B]; those below index 0 (clean data) become index 0."""
        # a plain copy would wait for the device
        return index_of(self.path, t).clamp(min=0).float().to(x.device, non_blocking=True)
