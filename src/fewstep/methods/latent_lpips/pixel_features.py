"""What the distance is taught: how far two decoded pictures lie apart in the features of a network on pixels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from fewstep.evaluation.lite0 import SIZE, make_lite0
from fewstep.evaluation.lite0_weights import CONVERTED_SHA256, LICENCE, load_weights

LARGEST = 256
"""Edge of the largest pictures that features are taken of; larger ones are brought to it."""
AT_ONCE = 2**19
"""Pixels decoded at a time: 128 pictures of 64 x 64, 2 of 512 x 512."""
Decode = Callable[[Tensor], Tensor]
"""Latents [B, C, h, w] -> pictures in [0, 1], float32 [B, 3, H, W], not rounded: small distances must survive."""


class PixelFeatures(Protocol):
    """A frozen network on pixels, and what identifies it."""

    @property
    def name(self) -> str:
        """The network and its layers."""
        ...

    @property
    def weights_sha256(self) -> str:
        """Of its weights."""
        ...

    @property
    def licence(self) -> str:
        """Of its weights."""
        ...

    @property
    def input(self) -> str:
        """Size and resizing of what it sees."""
        ...

    def __call__(self, pictures: Tensor) -> Sequence[Tensor]:
        """Pictures in [0, 1], [B, 3, H, W] -> feature maps [B, C, h, w]; a picture's depend on that picture alone."""
        ...


class Lite0Stages:
    """EfficientNet-Lite0's early and middle stages: 16, 24, 40 and 112 channels at 1/2, 1/4, 1/8 and 1/16.

    FD and KID are taken from the same network's last layer. What they read was never looked at here: the last six
    blocks, which stand between, are not run. Yet the first twelve are shared, so that a student that is trained with
    this distance is not measured by a stranger; records say so.

    Raises:
        UserError: the weights can be neither read nor converted.
    """

    name = "EfficientNet-Lite0 (ImageNet), outputs of its stages 1, 2, 3 and 5 of 7"
    weights_sha256 = CONVERTED_SHA256
    licence = LICENCE
    input = f"bicubic with antialiasing to {SIZE} to {LARGEST} pixels a side, (rgb255 - 127) / 128"
    blocks = (1, 3, 5, 11)
    """Blocks whose outputs are taken; 0 is the stem."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.network = make_lite0(load_weights()).to(self.device)

    @torch.no_grad()
    def __call__(self, pictures: Tensor) -> list[Tensor]:
        """Pictures in [0, 1], [B, 3, H, W] -> four maps, float32."""
        size = min(max(pictures.shape[-1], SIZE), LARGEST)
        x = pictures.to(self.device, torch.float32)
        if x.shape[-2:] != (size, size):
            x = F.interpolate(x, (size, size), mode="bicubic", antialias=True)
        x = (x.mul(255).sub(127).div(128)).contiguous(memory_format=torch.channels_last)
        found = []
        for number, output in enumerate(self.network.blocks(x)):
            if number in self.blocks:
                found.append(output)
            if number == self.blocks[-1]:
                break
        return found


def decoder(backbone: Any) -> Decode:
    """A loaded pipeline's own autoencoder as a `Decode`; some pictures at a time."""

    @torch.no_grad()
    def decode(latents: Tensor) -> Tensor:
        size = latents.shape[-1] * backbone.picture_size // backbone.latent_shape[-1]
        parts = []
        batch = max(1, AT_ONCE // size**2)
        for part in (latents[start : start + batch] for start in range(0, len(latents), batch)):
            decoded = backbone.decode(part.to(backbone.device))
            parts.append((decoded.float() * 0.5 + 0.5).clamp(0, 1))
        return torch.cat(parts)

    return decode


def unit(x: Tensor) -> Tensor:
    """A map's vectors at length 1 over the channels, [B, C, ...]; zeros stay zero."""
    return x / (x.square().sum(1, keepdim=True) + 1e-10).sqrt()


def pair_distances(maps: Sequence[Tensor], pairs: Sequence[tuple[int, int]]) -> Tensor:
    """`methods.distances.feature_distance` of the named pairs of pictures, float64 [P]; each map is read once.

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
