"""The network of the preference scorer: a prompt becomes queries of a picture's cells, and their answers are compared.

It shares no weights, loss or seed with the reader, and no text with the teacher: it has its own words and transformer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewstep_worlds.stickers.scene import SIDE
from fewstep_worlds.stickers.settings import RewardConfig

CELLS = SIDE // 4
"""Cells along a side of the map that is queried."""
LENGTH = 24
"""Words of a prompt; the longest sentence of the grammar has fewer."""
HEADS = 4
ANSWERS = 6
"""Numbers of a query's answer."""
WORD = re.compile(r"[a-z0-9-]+|,")


def words_of(text: str) -> list[str]:
    """Return the words, numbers and commas of a text, in lower case."""
    return WORD.findall(text.lower())


def word_numbers(prompts: Sequence[str], vocabulary: Mapping[str, int]) -> Tensor:
    """Return the numbers of each prompt's words, int64 [K, LENGTH], 0 after the last; unknown words are left out."""
    rows = torch.zeros(len(prompts), LENGTH, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        known = [vocabulary[word] for word in words_of(prompt) if word in vocabulary][:LENGTH]
        rows[row, : len(known)] = torch.tensor(known, dtype=torch.int64)
    return rows


class Residual(nn.Module):
    """Two 3x3 convolutions beside the identity, which a new block is."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels)
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(self.second.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Return features of the shape of x, [B, C, h, w]."""
        result: Tensor = x + self.second(F.silu(self.first(F.silu(self.norm(x)))))
        return result


class PictureCells(nn.Module):
    """Pictures [B, 3, 64, 64] in [-1, 1] -> features of their cells, [B, 256, C]."""

    def __init__(self, config: RewardConfig) -> None:
        super().__init__()
        fine, middle, coarse = config.channels
        self.stem = nn.Sequential(nn.Conv2d(3, fine, 4, 2, 1), nn.SiLU(), nn.Conv2d(fine, middle, 3, 2, 1))
        self.middle = nn.Sequential(*(Residual(middle, config.groups) for _ in range(config.blocks[0])))
        self.down = nn.Conv2d(middle, coarse, 3, 2, 1)
        self.coarse = nn.Sequential(*(Residual(coarse, config.groups) for _ in range(config.blocks[1])))
        self.up = nn.Conv2d(coarse, middle, 1)
        self.joined = nn.Sequential(Residual(middle, config.groups), nn.GroupNorm(config.groups, middle))

    def forward(self, pictures: Tensor) -> Tensor:
        """Return the features that the class describes."""
        middle = self.middle(self.stem(pictures))
        coarse = self.up(self.coarse(self.down(middle)))
        joined: Tensor = self.joined(middle + F.interpolate(coarse, scale_factor=2.0))
        return joined.flatten(2).mT


class TextLayer(nn.Module):
    """One layer of a transformer, normalised before its two parts."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.words = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Return states of the shape of x, [K, L, width]; `mask` [K, 1, 1, L] is -inf where no word is."""
        parts = self.attention(self.norm(x)).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        query, key, value = parts.unbind(0)
        weights = (query @ key.mT * query.shape[-1] ** -0.5 + mask).softmax(-1)
        x = x + self.out((weights @ value).transpose(1, 2).flatten(2))
        result: Tensor = x + self.words(x)
        return result


class TextQueries(nn.Module):
    """Word numbers [K, L] -> `queries` [K, Q, C + 1] of cells, and `gates` [K, 3, hidden] of their comparison."""

    def __init__(self, config: RewardConfig, words: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words + 1, config.width, padding_idx=0)
        self.place = nn.Parameter(0.1 * torch.randn(LENGTH, config.width))
        self.layers = nn.ModuleList(TextLayer(config.width) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.slots = nn.Parameter(torch.randn(config.queries, config.width))
        self.queries = nn.Linear(config.width, config.channels[1] + 1)
        self.own = nn.Parameter(torch.zeros(config.queries, config.channels[1] + 1))
        self.gates = nn.Linear(config.queries * config.width, 3 * config.hidden)
        nn.init.constant_(self.own[:, -1], -3.0)  # a thing fills few cells

    def forward(self, numbers: Tensor) -> dict[str, Tensor]:
        """Return the outputs that the class describes."""
        mask = torch.zeros(numbers.shape, device=numbers.device).masked_fill(numbers == 0, -1e4)[:, None, None]
        states = self.embedding(numbers) + self.place[: numbers.shape[1]]
        for layer in self.layers:
            states = layer(states, mask)
        states = self.norm(states)
        weights = (self.slots @ states.mT * states.shape[-1] ** -0.5 + mask[:, 0]).softmax(-1)
        slots = weights @ states
        return {"queries": self.queries(slots) + self.own, "gates": self.gates(slots.flatten(1)).unflatten(1, (3, -1))}


class RewardNetwork(nn.Module):
    """Logit that a prompt is true of a picture, from cells and queries.

    A query's answer is read from its map of the cells, q f / sqrt(C) + b: its mean, its soft maximum, the sum of its
    sigmoids (a count), and their centre and spread.
    """

    def __init__(self, config: RewardConfig, words: int) -> None:
        super().__init__()
        self.config = config
        self.pictures = PictureCells(config)
        self.text = TextQueries(config, words)
        self.first = nn.Linear(config.queries * ANSWERS, config.hidden)
        self.second = nn.Linear(config.hidden, config.hidden)
        self.last = nn.Linear(config.hidden, 1)
        side = torch.linspace(-1, 1, CELLS)
        places = torch.stack([side.repeat(CELLS), side.repeat_interleave(CELLS)], 1)
        self.register_buffer("places", places, persistent=False)
        self.places: Tensor

    def compare(self, cells: Tensor, queries: Tensor, gates: Tensor) -> Tensor:
        """Return logits, [B, N].

        Args:
            cells: [B, 256, C].
            queries: [B, N, Q, C + 1], of N prompts a picture.
            gates: [B, N, 3, hidden].
        """
        b, n, q, _ = queries.shape
        weight, bias = queries[..., :-1].flatten(1, 2), queries[..., -1].flatten(1, 2)
        maps = weight @ cells.mT * weight.shape[-1] ** -0.5 + bias[..., None]
        shares = maps.sigmoid()
        count = shares.sum(-1, keepdim=True)
        centre = shares @ self.places / (count + 0.1)
        spread = shares @ self.places.square().sum(1, keepdim=True) / (count + 0.1) - centre.square().sum(
            -1, keepdim=True
        )
        most = maps.logsumexp(-1, keepdim=True) - 4
        answers = torch.cat([maps.mean(-1, keepdim=True), most, count / 16, centre, spread], -1).view(b, n, q * ANSWERS)
        scale, shift, other = gates.unbind(2)
        hidden = F.silu(self.first(answers) * (1 + scale) + shift)
        result: Tensor = self.last(F.silu(self.second(hidden) + other))[..., 0]
        return result
