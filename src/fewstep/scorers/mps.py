"""MPS: CLIP-H whose picture tokens attend to those words of the prompt that a condition is about."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewstep.common.safetensors_header import read_safetensors_header
from fewstep.scorers.clip import clip_config, clip_network, clip_tokenizer, identity_of, read_framing
from fewstep.scorers.registry import ScorerFiles
from fewstep.scorers.reward import MPS
from fewstep.scorers.scorer import Scorer, load_frozen, loading, rename_keys, unit

OVERALL = (
    "light, color, clarity, tone, style, ambiance, artistry, shape, face, hair, hands, limbs, structure, instance, "
    "texture, quantity, attributes, position, number, location, word, things."
)
"""The condition of the overall impression, the only one that weights are published for."""
THRESHOLD = 0.3
"""A word is attended to if its similarity to the condition is above this share of the most similar word's (0.3 in the
authors' evaluation; 0.01 in their model's forward)."""
_RULES = (
    (r"^model\.", "clip."),
    (r"^cross_model\.layers\.(\d+)\.([01])\.fn\.", r"cross.\1.\2."),
)
_UNUSED = r"position_ids$|rotary_emb\.inv_freq$"


class SwiGLU(nn.Module):
    """The first half of the channels times the SiLU of the second (Shazeer 2020, arXiv:2002.05202)."""

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., 2 D] to [..., D]."""
        value, gate = x.chunk(2, -1)
        return F.silu(gate) * value


def rotate(x: Tensor) -> Tensor:
    """Apply rotary position embedding to [..., N, D] (Su et al. 2021, arXiv:2104.09864), base 10000, halves paired."""
    places, width = x.shape[-2:]
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    steps = torch.arange(0, width, 2, dtype=wide, device=x.device) / width
    angle = torch.outer(torch.arange(places, dtype=wide, device=x.device), 10000.0**-steps).repeat(1, 2)
    first, second = x.chunk(2, -1)
    return x * angle.cos().to(x.dtype) + torch.cat((-second, first), -1) * angle.sin().to(x.dtype)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attend with many queries and one key and value for all heads (Shazeer 2019, arXiv:1911.02150).

    Args:
        query: [B, heads, N, D].
        key, value: [B, M, D].
        mask: bool [B, M], True for the keys that take part.

    Returns:
        [B, N, heads D].
    """
    key, value = (x[:, None].expand(-1, query.shape[1], -1, -1) for x in (key, value))
    mask = None if mask is None else mask[:, None, None, :]
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2).flatten(2)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """Reshape [B, N, heads D] to [B, heads, N, D]."""
    return x.reshape(*x.shape[:-1], heads, -1).transpose(1, 2)


class CrossBlock(nn.Module):
    """Attention of picture tokens to the prompt's words, beside a feed-forward part; both are added to the input.

    Modules have their published names, here and in `SelfBlock`.
    """

    def __init__(self, width: int, heads: int, head_width: int, inner: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.to_q = nn.Linear(width, heads * head_width, bias=False)
        self.to_kv = nn.Linear(width, 2 * head_width, bias=False)
        self.to_out = nn.Linear(heads * head_width, width, bias=False)
        self.ff = nn.Sequential(nn.Linear(width, 2 * inner, bias=False), SwiGLU(), nn.Linear(inner, width, bias=False))

    def forward(self, tokens: Tensor, words: Tensor, mask: Tensor) -> Tensor:
        """Attend from picture tokens [B, N, D] to words [B, M, D] under a mask [B, M]; return [B, N, D]."""
        x = self.norm(tokens)
        key, value = self.to_kv(words).chunk(2, -1)
        attended = attend(split_heads(self.to_q(x), self.heads), key, value, mask)
        result: Tensor = tokens + self.to_out(attended) + self.ff(x)
        return result


class SelfBlock(nn.Module):
    """Attention of picture tokens to each other, beside a feed-forward part; both are added to the input."""

    def __init__(self, width: int, heads: int, head_width: int, inner: int) -> None:
        super().__init__()
        self.heads = heads
        self.parts = (heads * head_width, head_width, head_width, 2 * inner)
        self.norm = nn.LayerNorm(width)
        self.fused_attn_ff_proj = nn.Linear(width, sum(self.parts), bias=False)
        self.attn_out = nn.Linear(heads * head_width, width, bias=False)
        self.ff_out = nn.Sequential(SwiGLU(), nn.Linear(inner, width, bias=False))

    def forward(self, tokens: Tensor) -> Tensor:
        """Map [B, N, D] to [B, N, D]."""
        query, key, value, inner = self.fused_attn_ff_proj(self.norm(tokens)).split(self.parts, -1)
        attended = attend(rotate(split_heads(query, self.heads)), rotate(key), value)
        result: Tensor = tokens + self.attn_out(attended) + self.ff_out(inner)
        return result


class MpsNetwork(nn.Module):
    """CLIP, with the cross model on top."""

    def __init__(self, config: Any, layers: int, sizes: Sequence[int]) -> None:
        super().__init__()
        self.clip = clip_network(config)
        self.cross = nn.ModuleList(nn.ModuleList([CrossBlock(*sizes), SelfBlock(*sizes)]) for _ in range(layers))

    def words(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return the projected states of tokens int64 [K, N], each [K, N, D] and the last [K, D]."""
        clip: Any = self.clip
        out = clip.text_model(input_ids=ids)
        return clip.text_projection(out.last_hidden_state), clip.text_projection(out.pooler_output)

    def forward(self, pixels: Tensor, words: Tensor, mask: Tensor) -> Tensor:
        """Return embeddings [B, D] of pictures [B, 3, size, size] given words [B, N, D] and their mask [B, N]."""
        clip: Any = self.clip
        tokens: Tensor = clip.visual_projection(clip.vision_model(pixel_values=pixels).last_hidden_state)
        blocks: Any = self.cross
        for cross_block, self_block in blocks:
            tokens = self_block(cross_block(tokens, words, mask))
        return tokens[:, 0]


@dataclass(eq=False)
class MpsScorer(Scorer):
    """exp(logit scale) * cos(prompt, picture's first token after the cross model) (Zhang et al. 2024).

    A prompt is {"words": [77, D], "mask": bool [77], "text": unit vector [D]}: at CLIP-H's width 312 KiB in fp32.
    Padding is among the words, as in training.

    Attributes:
        condition: words of the rated aspect; `OVERALL` for the published weights.
    """

    rows = ("words", "mask", "text")
    condition: str = OVERALL

    def encode(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Encode K prompts to {"words": [K, 77, D], "mask": bool [K, 77], "text": unit vectors [K, D]}."""
        ids, _ = self.token_ids([self.condition, *prompts])
        words, ends = self.network.words(ids.to(self.network.clip.device))
        similarity = (words[1:] @ words[0].T).amax(-1)
        mask = similarity / similarity.amax(-1, keepdim=True) > THRESHOLD
        return {"words": words[1:], "mask": mask, "text": unit(ends[1:])}

    def compare(self, pixels: Tensor, rows: Mapping[str, Tensor]) -> Tensor:
        """Return scores [B]."""
        picture = unit(self.network(pixels, rows["words"].to(pixels), rows["mask"]))
        scored: Tensor = self.network.clip.logit_scale.exp() * (picture * rows["text"].to(picture)).sum(-1)
        return scored


def load(files: ScorerFiles, device: torch.device, dtype: torch.dtype) -> MpsScorer:
    """Load the published checkpoint.

    Raises:
        UserError: broken config, weights or tokenizer.
    """
    config = clip_config(files)
    layers, sizes = _cross_sizes(files)
    convert = partial(rename_keys, rules=_RULES)
    network = load_frozen(lambda: MpsNetwork(config, layers, sizes), files, dtype, device, convert, _UNUSED)
    framing = read_framing(files, config)
    more = f", cross model of {layers} x {sizes[0]}, {sizes[1]} heads"
    identity = identity_of(MPS, files, config, framing, more)
    length = config.text_config.max_position_embeddings
    return MpsScorer(network, clip_tokenizer(files, config), length, framing, identity)


def _cross_sizes(files: ScorerFiles) -> tuple[int, tuple[int, int, int, int]]:
    """Return the number of cross layers, and their (width, heads, head width, inner width), from the file's shapes."""
    shapes = {key: entry.shape for key, entry in read_safetensors_header(files.weights[0])[1].items()}
    with loading(files.weights[0]):
        layers = {key.split(".")[2] for key in shapes if re.match(r"cross_model\.layers\.\d+\.", key)}
        part = "cross_model.layers.0.0.fn."
        queries, width = shapes[f"{part}to_q.weight"]
        head = shapes[f"{part}to_kv.weight"][0] // 2
        return len(layers), (width, queries // head, head, shapes[f"{part}ff.2.weight"][1])
