"""MPS: CLIP-H whose picture tokens attend to those words of the prompt that a condition is about."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.common.errors import UserError
from fewstep.common.safetensors_header import read_safetensors_header
from fewstep.methods.rewards.clip import clip_config, clip_network, clip_tokenizer, identity_of, read_framing, unit
from fewstep.methods.rewards.folder_layout import ScorerFiles
from fewstep.methods.rewards.licences import MPS
from fewstep.methods.rewards.mps_cross import CrossModel
from fewstep.methods.rewards.preprocess import Framing, frame
from fewstep.methods.rewards.reward import ScorerIdentity
from fewstep.methods.rewards.tokenize import check_rows, in_batches, token_ids
from fewstep.methods.rewards.weights import Source, build

OVERALL = (
    "light, color, clarity, tone, style, ambiance, artistry, shape, face, hair, hands, limbs, structure, instance, "
    "texture, quantity, attributes, position, number, location, word, things."
)
"""The condition of the overall impression, the only one that weights are published for."""
THRESHOLD = 0.3
"""Words whose likeness to the condition is above this part of the likest word's are heard (0.3 in the authors'
evaluation; 0.01 in their model's forward)."""
_CROSS = {
    "cross_norm": "0.fn.norm",
    "cross_query": "0.fn.to_q",
    "cross_key_value": "0.fn.to_kv",
    "cross_out": "0.fn.to_out",
    "cross_in": "0.fn.ff.0",
    "cross_back": "0.fn.ff.2",
    "own_norm": "1.fn.norm",
    "own_in": "1.fn.fused_attn_ff_proj",
    "own_out": "1.fn.attn_out",
    "own_back": "1.fn.ff_out.1",
}
_LAYER = re.compile(r"cross\.layers\.(\d+)\.(\w+)\.(weight|bias)")
_COUNT = re.compile(r"cross_model\.layers\.(\d+)\.")


class MpsNetwork(nn.Module):
    """CLIP and the cross model on top of it."""

    def __init__(self, config: Any, layers: int, sizes: Sequence[int]) -> None:
        super().__init__()
        self.clip = clip_network(config)
        self.cross = CrossModel(layers, sizes)

    def words(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """int64 [K, N] -> the projected state of each token [K, N, D] and of the last one [K, D]."""
        clip: Any = self.clip
        out = clip.text_model(input_ids=ids)
        return clip.text_projection(out.last_hidden_state), clip.text_projection(out.pooler_output)

    def forward(self, seen: Tensor, said: Tensor, heard: Tensor) -> Tensor:
        """Pictures [B, 3, size, size], words [B, N, D], which are heard [B, N] -> embeddings [B, D]."""
        clip: Any = self.clip
        tokens = clip.visual_projection(clip.vision_model(pixel_values=seen).last_hidden_state)
        crossed: Tensor = self.cross(tokens, said, heard)
        return crossed[:, 0]


class MpsScorer:
    """exp(logit scale) * cos(prompt, picture's first token after the cross model) (Zhang et al. 2024).

    Attributes:
        condition: what the judgement is about; `OVERALL` for the published weights.
    """

    def __init__(self, network: MpsNetwork, tokenizer: Any, framing: Framing, identity: ScorerIdentity) -> None:
        self.network = network
        self.tokenizer = tokenizer
        self.framing = framing
        self.identity = identity
        self.condition = OVERALL

    def prepare(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """K prompts -> {"words": [K, 77, D], "heard": bool [K, 77], "text": unit vectors [K, D]} on the CPU.

        At CLIP-H's width that is 312 KiB a prompt in fp32. Padding is among the words, as in training.
        """
        return in_batches(self._encode, prompts)

    def _encode(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        clip: Any = self.network.clip
        length = clip.config.text_config.max_position_embeddings
        ids, _ = token_ids(self.tokenizer, [self.condition, *prompts], length)
        words, ends = self.network.words(ids.to(clip.device))
        likeness = (words[1:] @ words[0].T).amax(-1)
        heard = likeness / likeness.amax(-1, keepdim=True) > THRESHOLD
        return {"words": words[1:], "heard": heard, "text": unit(ends[1:])}

    def score(self, pictures: Tensor, said: Mapping[str, Tensor]) -> Tensor:
        """[B, 3, H, W] in [-1, 1] and rows of `prepare` -> [B]; see `PreferenceScorer.score`."""
        check_rows(pictures, dict(said), ("words", "heard", "text"))
        clip: Any = self.network.clip
        seen = frame(pictures, self.framing).to(clip.device, clip.dtype)
        words = said["words"].to(seen, non_blocking=True)
        picture = unit(self.network(seen, words, said["heard"].to(seen.device, non_blocking=True)))
        cosine = (picture * said["text"].to(picture, non_blocking=True)).sum(-1)
        scored: Tensor = clip.logit_scale.exp() * cosine
        return scored


def load(files: ScorerFiles, device: torch.device, dtype: torch.dtype) -> MpsScorer:
    """The published checkpoint's weights under their own key names.

    Raises:
        UserError: broken config, weights or tokenizer.
    """
    config = clip_config(files)
    layers, sizes = _cross_sizes(files)
    network = build(lambda: MpsNetwork(config, layers, sizes), files, source, _unread, dtype, device)
    framing = read_framing(files, config)
    more = f", cross model of {layers} x {sizes[0]}, {sizes[1]} heads"
    identity = identity_of(MPS, files, config, framing, more)
    return MpsScorer(network, clip_tokenizer(files, config), framing, identity)


def _cross_sizes(files: ScorerFiles) -> tuple[int, tuple[int, int, int, int]]:
    """Layers of the cross model, and (width, heads, head width, inner width) of each, from the file's shapes."""
    header = read_safetensors_header(files.weights[0])[1]
    layers = 1 + max(int(found[1]) for found in map(_COUNT.match, header) if found)
    shapes = []
    for part in ("to_q", "to_kv", "ff.2"):
        key = f"cross_model.layers.0.0.fn.{part}.weight"
        if key not in header:
            raise UserError(f"{files.weights[0]} holds no {key!r}")
        if len(header[key].shape) != 2 or header[key].shape[0] < 2:
            raise UserError(f"{files.weights[0]}: {key!r} has shape {list(header[key].shape)}, which is no matrix")
        shapes.append(header[key].shape)
    many, width = shapes[0]
    head = shapes[1][0] // 2
    return layers, (width, many // head, head, shapes[2][1])


def source(name: str) -> Source:
    """Where a parameter of `MpsNetwork` lies in the published checkpoint."""
    found = _LAYER.fullmatch(name)
    if found:
        return Source(f"cross_model.layers.{found[1]}.{_CROSS[found[2]]}.{found[3]}")
    return Source(f"model.{name.removeprefix('clip.')}")


def _unread(key: str) -> bool:
    """Buffers of counted places and of rotary frequencies, which the sizes decide."""
    return key.endswith(("position_ids", "rotary_emb.inv_freq"))
