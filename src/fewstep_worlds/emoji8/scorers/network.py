"""A picture-text scorer: two networks into one space, with the cosine of picture and prompt as score.

Pictures go through a small residual network trained from scratch, which shares nothing with the backbones of other
metrics. Prompts go through a frozen `SentenceEncoder` and a head of two layers.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewstep_worlds.emoji8.config import ScorerConfig

SIZE = 64
"""Edge of the input of the picture encoder, in pixels."""


class Residual(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x))))))."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Return features of the shape of x, [B, C, H, W]."""
        h = self.conv1(F.silu(self.norm1(x)))
        result: Tensor = x + self.conv2(F.silu(self.norm2(h)))
        return result


class PictureEncoder(nn.Module):
    """Pictures [B, 3, 64, 64] in [-1, 1] -> [B, width]."""

    def __init__(self, config: ScorerConfig) -> None:
        super().__init__()
        # 2x2 pixels become channels: no layer runs at 64x64, where a small network would spend most of its time.
        layers: list[nn.Module] = [nn.PixelUnshuffle(2), nn.Conv2d(12, config.channels[0], 3, padding=1)]
        for level, (channels, blocks) in enumerate(zip(config.channels, config.blocks, strict=True)):
            if level:
                layers.append(nn.Conv2d(config.channels[level - 1], channels, 3, stride=2, padding=1))
            layers += [Residual(channels, config.groups) for _ in range(blocks)]
        self.body = nn.Sequential(*layers)
        self.norm = nn.GroupNorm(config.groups, config.channels[-1])
        self.out = nn.Linear(config.channels[-1], config.width)

    def forward(self, x: Tensor) -> Tensor:
        """Return features [B, width] of pictures [B, 3, 64, 64]."""
        result: Tensor = self.out(F.silu(self.norm(self.body(x))).mean((2, 3)))
        return result


class Scorer(nn.Module):
    """Picture encoder, text head and temperature. Differentiable in pictures.

    Args:
        text_width: of the text backbone's vectors.
    """

    def __init__(self, config: ScorerConfig, text_width: int) -> None:
        super().__init__()
        self.pictures = PictureEncoder(config)
        self.text = nn.Sequential(
            nn.LayerNorm(text_width),
            nn.Linear(text_width, config.hidden),
            nn.GELU(),
            nn.Linear(config.hidden, config.width),
        )
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def embed_pictures(self, x: Tensor) -> Tensor:
        """Return unit vectors, float32 [B, width], of pictures [B, 3, 64, 64] in [-1, 1]."""
        return F.normalize(self.pictures(x).float(), dim=-1)

    def embed_text(self, states: Tensor) -> Tensor:
        """Return unit vectors, float32 [B, width], of the text backbone's vectors [B, text_width]."""
        return F.normalize(self.text(states).float(), dim=-1)

    def scale(self) -> Tensor:
        """Return the factor of the cosines in the loss, at most 100."""
        return self.log_scale.clamp(max=math.log(100.0)).exp()
