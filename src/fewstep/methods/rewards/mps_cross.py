"""MPS's cross model: picture tokens that attend to the prompt's words, then to each other.

Both attentions have many queries and one key and value for all heads, run beside their feed-forward part (SwiGLU) and
are added to their input (Shazeer 2019, arXiv:1911.02150; 2020, arXiv:2002.05202).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def swiglu(x: Tensor) -> Tensor:
    """[..., 2 D] -> [..., D]: the first half, times the SiLU of the second."""
    value, gate = x.chunk(2, -1)
    return F.silu(gate) * value


def rotate(x: Tensor) -> Tensor:
    """Rotary position embedding of [..., N, D] (Su et al. 2021, arXiv:2104.09864), base 10000, halves paired."""
    places, width = x.shape[-2:]
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    steps = torch.arange(0, width, 2, dtype=wide, device=x.device) / width
    angle = torch.outer(torch.arange(places, dtype=wide, device=x.device), 10000.0**-steps).repeat(1, 2)
    first, second = x.chunk(2, -1)
    return x * angle.cos().to(x.dtype) + torch.cat((-second, first), -1) * angle.sin().to(x.dtype)


def attend(query: Tensor, key: Tensor, value: Tensor, heads: int, heard: Tensor | None = None) -> Tensor:
    """[B, N, heads D], [B, M, D], [B, M, D] -> [B, N, heads D]; `heard` [B, M] says which keys are looked at."""
    mask = None if heard is None else heard[:, None, None, :]
    split = query.reshape(*query.shape[:-1], heads, -1).transpose(1, 2)
    shared = (key[:, None].expand(-1, heads, -1, -1), value[:, None].expand(-1, heads, -1, -1))
    return F.scaled_dot_product_attention(split, *shared, attn_mask=mask).transpose(1, 2).flatten(2)


class CrossLayer(nn.Module):
    """One layer; its parameters are named by what they do, `mps.source` says by which names they are published."""

    def __init__(self, width: int, heads: int, head_width: int, inner: int) -> None:
        super().__init__()
        self.heads = heads
        many = heads * head_width
        self.parts = (many, head_width, head_width, 2 * inner)
        self.cross_norm = nn.LayerNorm(width)
        self.cross_query = nn.Linear(width, many, bias=False)
        self.cross_key_value = nn.Linear(width, 2 * head_width, bias=False)
        self.cross_out = nn.Linear(many, width, bias=False)
        self.cross_in = nn.Linear(width, 2 * inner, bias=False)
        self.cross_back = nn.Linear(inner, width, bias=False)
        self.own_norm = nn.LayerNorm(width)
        self.own_in = nn.Linear(width, sum(self.parts), bias=False)
        self.own_out = nn.Linear(many, width, bias=False)
        self.own_back = nn.Linear(inner, width, bias=False)

    def forward(self, seen: Tensor, said: Tensor, heard: Tensor) -> Tensor:
        """Picture tokens [B, N, D], words [B, M, D], which of them are heard [B, M] -> [B, N, D]."""
        x = self.cross_norm(seen)
        key, value = self.cross_key_value(said).chunk(2, -1)
        attended = attend(self.cross_query(x), key, value, self.heads, heard)
        seen = seen + self.cross_out(attended) + self.cross_back(swiglu(self.cross_in(x)))
        query, key, value, inner = self.own_in(self.own_norm(seen)).split(self.parts, -1)
        turned = rotate(query.reshape(*query.shape[:-1], self.heads, -1).transpose(1, 2)).transpose(1, 2).flatten(2)
        attended = attend(turned, rotate(key), value, self.heads)
        out: Tensor = seen + self.own_out(attended) + self.own_back(swiglu(inner))
        return out


class CrossModel(nn.Module):
    """Layers one after the other."""

    def __init__(self, layers: int, sizes: Sequence[int]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(CrossLayer(*sizes) for _ in range(layers))

    def forward(self, seen: Tensor, said: Tensor, heard: Tensor) -> Tensor:
        """As `CrossLayer.forward`."""
        for layer in self.layers:
            seen = layer(seen, said, heard)
        return seen
