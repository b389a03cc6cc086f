"""A critic on the features of a frozen network: small trained heads."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fewstep.diffusion.denoiser import Condition
from fewstep.methods.distances import FeaturesOf


class FeatureCritic(nn.Module):
    """Heads of two 1x1 convolutions on each feature map, as in PCM and LADD (arXiv 2405.18407, 2403.12015).

    The last layers start at zero, so that a fresh critic's logits are 0.

    Args:
        features: of the frozen network, whose weights are no part of this module.
        channels: of each feature map.
    """

    def __init__(self, features: FeaturesOf, channels: Sequence[int], width: int = 64, seed: int = 0) -> None:
        super().__init__()
        self._features = features
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.heads = nn.ModuleList()
            for count in channels:
                last = nn.Conv2d(width, 1, 1).requires_grad_(False)
                last.weight.zero_()
                last.bias.zero_()  # type: ignore[union-attr]
                last.requires_grad_(True)
                self.heads.append(nn.Sequential(nn.Conv2d(count, width, 1), nn.SiLU(), last))

    def forward(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Return logits [B, maps] of x [B, ...] at t float64 [B], the mean over each map's places."""
        maps = self._features(x, t, condition)
        return torch.stack([head(part).flatten(1).mean(1) for head, part in zip(self.heads, maps, strict=True)], 1)
