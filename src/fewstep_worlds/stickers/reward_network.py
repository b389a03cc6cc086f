"""The network of the preference scorer: each word of a prompt queries a picture's cells, and the answers are compared.

It shares no weights, loss or seed with the reader, and no text with the teacher: it has its own words and transformer.
"""

from __future__ import annotations

import math
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
"""Numbers of a word's answer."""
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
        """Return states of the shape of x, [K, L, width]; `mask` is what `missing` returns."""
        parts = self.attention(self.norm(x)).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        query, key, value = parts.unbind(0)
        weights = (query @ key.mT * query.shape[-1] ** -0.5 + mask).softmax(-1)
        x = x + self.out((weights.to(value) @ value).transpose(1, 2).flatten(2))
        result: Tensor = x + self.words(x)
        return result


class Words(nn.Module):
    """Word numbers [K, L] -> `queries` of cells [K, L, C + 1], `states` [K, L, width] and the numbers as `words`."""

    def __init__(self, config: RewardConfig, words: int) -> None:
        super().__init__()
        width = config.width
        self.embedding = nn.Embedding(words + 1, width, padding_idx=0)
        self.near = nn.Conv1d(width, width, 3, padding=1)
        self.place = nn.Parameter(0.3 * torch.randn(LENGTH, width))
        self.layers = nn.ModuleList(TextLayer(width) for _ in range(config.layers[0]))
        self.norm = nn.LayerNorm(width)
        self.queries = nn.Linear(width, config.channels[1] + 1)

    def forward(self, numbers: Tensor) -> dict[str, Tensor]:
        """Return the outputs that the class describes."""
        states = self.embedding(numbers)
        states = states + self.near(states.mT).mT + self.place[: numbers.shape[1]]
        for layer in self.layers:
            states = layer(states, missing(numbers))
        return {"queries": self.queries(self.norm(states)), "states": states, "words": numbers}


class RewardNetwork(nn.Module):
    """Logit that a prompt is true of a picture.

    Each word has a map of the cells, q f / sqrt(C) + b, whose answer is its mean, its soft maximum, the sum of its
    sigmoids (a count), and their centre and spread. A transformer compares the answers, and the logit is a sum of what
    each word contributes, directly and through the transformer.
    """

    def __init__(self, config: RewardConfig, words: int) -> None:
        super().__init__()
        self.config = config
        self.pictures = PictureCells(config)
        self.text = Words(config, words)
        self.answers = nn.Linear(ANSWERS, config.width)
        self.layers = nn.ModuleList(TextLayer(config.width) for _ in range(config.layers[1]))
        self.last = nn.Sequential(nn.LayerNorm(config.width), nn.Linear(config.width, 1))
        nn.init.normal_(self.last[1].weight, std=0.02)  # type: ignore[arg-type]
        # without a direct path from a word's answer to the logit, training does not leave its first plateau
        self.direct = nn.Parameter(torch.tensor([0.3, 0.3, 0.0, 0.0, 0.0, 0.0]))
        side = torch.linspace(-1, 1, CELLS)
        places = torch.stack([side.repeat(CELLS), side.repeat_interleave(CELLS)], 1)
        self.register_buffer("places", places, persistent=False)
        self.places: Tensor

    def compare(self, cells: Tensor, prompts: Mapping[str, Tensor]) -> Tensor:
        """Return logits, float32 [B, N].

        Args:
            cells: [B, 256, C].
            prompts: what `Words` returns, of N prompts a picture: [B, N, L, C + 1], [B, N, L, width], [B, N, L].
        """
        states, words = prompts["states"].flatten(0, 1), prompts["words"]
        with torch.autocast(cells.device.type, enabled=False):
            answers = self.read(cells.float(), prompts["queries"].float().flatten(1, 2))
        states = states + self.answers(answers).view(states.shape)
        for layer in self.layers:
            states = layer(states, missing(words.flatten(0, 1)))
        parts = self.last(states).float().view(words.shape) + (answers @ self.direct).view(words.shape)
        result: Tensor = (parts * (words > 0)).sum(-1)
        return result

    def read(self, cells: Tensor, queries: Tensor) -> Tensor:
        """Return the answers [B, M, ANSWERS] of cells [B, 256, C] to queries [B, M, C + 1]."""
        maps = queries[..., :-1] @ cells.mT * cells.shape[-1] ** -0.5 + queries[..., -1:]
        shares = (maps - 3).sigmoid()  # a thing fills few cells
        count = shares.sum(-1, keepdim=True)
        centre = shares @ self.places / (count + 0.1)
        spread = shares @ self.places.square().sum(1, keepdim=True) / (count + 0.1) - centre.square().sum(
            -1, keepdim=True
        )
        most = maps.logsumexp(-1, keepdim=True) - math.log(CELLS**2)
        return torch.cat([maps.mean(-1, keepdim=True), most, count / CELLS, centre, spread], -1)


def missing(words: Tensor) -> Tensor:
    """Return what is added to the attention to word numbers [K, L]: [K, 1, 1, L], 0, or -1e4 where no word is."""
    return torch.zeros(words.shape, device=words.device).masked_fill(words == 0, -1e4)[:, None, None]
