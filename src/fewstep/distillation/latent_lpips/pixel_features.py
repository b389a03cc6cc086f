"""The training target: distances of decoded pictures in the features of a network on pixels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from fewstep.evaluation.features import NetworkIdentity
from fewstep.evaluation.lite0 import SIZE, make_lite0
from fewstep.evaluation.lite0_weights import CONVERTED_SHA256, LICENCE, load_weights
from fewstep.methods.distances import unit

LARGEST = 256
"""Edge of the network's largest input; larger pictures are resized to it."""
AT_ONCE = 2**19
"""Pixels decoded at a time: 128 pictures of 64 x 64, 2 of 512 x 512."""
Decode = Callable[[Tensor], Tensor]
"""Latents [B, C, h, w] -> pictures in [0, 1], float32 [B, 3, H, W], not rounded, to keep small distances."""


class PixelFeatures(NetworkIdentity, Protocol):
    """A frozen network that maps pictures to feature maps."""

    def __call__(self, pictures: Tensor) -> Sequence[Tensor]:
        """Return feature maps [B, C, h, w] of pictures in [0, 1], [B, 3, H, W], each of that picture alone."""


class Lite0Stages:
    """EfficientNet-Lite0's early and middle stages: 16, 24, 40 and 112 channels at 1/2, 1/4, 1/8 and 1/16.

    FD and KID use the same network's last layer, six blocks further. The first twelve blocks are shared, so these
    metrics are not independent of a student that was trained with this distance; the record states this.

    Raises:
        UserError: the weights can be neither read nor converted.
    """

    name = "EfficientNet-Lite0 (ImageNet), outputs of its stages 1, 2, 3 and 5 of 7"
    weights_sha256 = CONVERTED_SHA256
    licence = LICENCE
    input = f"bicubic with antialiasing to {SIZE} to {LARGEST} pixels a side, (rgb255 - 127) / 128"
    blocks = (1, 3, 5, 11)
    """Blocks whose outputs are used; 0 is the stem."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.network = make_lite0(load_weights()).to(self.device)

    @torch.no_grad()
    def __call__(self, pictures: Tensor) -> list[Tensor]:
        """Return four float32 maps of pictures in [0, 1], [B, 3, H, W]."""
        size = min(max(pictures.shape[-1], SIZE), LARGEST)
        x = pictures.to(self.device, torch.float32)
        if x.shape[-2:] != (size, size):
            x = F.interpolate(x, (size, size), mode="bicubic", antialias=True)
        x = (x.mul(255).sub(127).div(128)).contiguous(memory_format=torch.channels_last)
        outputs = islice(self.network.blocks(x), self.blocks[-1] + 1)
        return [output for number, output in enumerate(outputs) if number in self.blocks]


def decoder(backbone: Any) -> Decode:
    """Return the decoder of a loaded pipeline; it decodes `AT_ONCE` pixels at a time."""

    @torch.no_grad()
    def decode(latents: Tensor) -> Tensor:
        size = latents.shape[-1] * backbone.picture_size // backbone.latent_shape[-1]
        parts = (backbone.decode(part.to(backbone.device)) for part in torch.split(latents, max(1, AT_ONCE // size**2)))
        return torch.cat([(decoded.float() * 0.5 + 0.5).clamp(0, 1) for decoded in parts])

    return decode


def pair_distances(maps: Sequence[Tensor], pairs: Sequence[tuple[int, int]]) -> Tensor:
    """Return `methods.distances.feature_distance` of pairs of pictures, float64 [P]; each map is normalised once.

    Args:
        maps: feature maps of n pictures, [n, C, h, w] each.
    """
    ends = torch.tensor(list(pairs))
    total = torch.zeros(len(ends), dtype=torch.float64)
    for x in maps:
        flat = unit(x.float())
        one, other = (flat[side] for side in ends.to(flat.device).T)
        total += (one - other).square().sum(1).flatten(1).mean(1).double().cpu()
    return total
