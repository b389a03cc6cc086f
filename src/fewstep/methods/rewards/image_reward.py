"""ImageReward v1.0: BLIP's vision transformer, its text encoder looking at the picture, and a small head."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.common.errors import UserError
from fewstep.common.safetensors_header import Shape, read_safetensors_header
from fewstep.methods.rewards.folder_layout import ScorerFiles
from fewstep.methods.rewards.licences import IMAGE_REWARD
from fewstep.methods.rewards.preprocess import Framing, frame
from fewstep.methods.rewards.reward import ScorerIdentity
from fewstep.methods.rewards.tokenize import check_rows, in_batches, load_tokenizer, token_ids
from fewstep.methods.rewards.weights import Source, build, fingerprint, loading

MEAN, DEVIATION = 0.16717362830052426, 1.0333394966054072
"""Constants of the published code: the reward is (output - MEAN)/DEVIATION."""
LENGTH = 35
"""Tokens of a prompt; what is longer is cut off."""
HEAD_WIDTH = 64
"""Width of an attention head of the vision transformer, in BLIP's base and large sizes alike."""
HEAD_LAYERS = (0, 2, 4, 6, 7)
"""The head's linear layers among its dropouts. Nothing bends between them: it is one linear function, in five parts."""
_VISION = {
    "embeddings.class_embedding": "cls_token",
    "embeddings.position_embedding": "pos_embed",
    "embeddings.patch_embedding": "patch_embed.proj",
    "post_layernorm": "norm",
}
_INSIDE = {
    "self_attn.qkv": "attn.qkv",
    "self_attn.projection": "attn.proj",
    "layer_norm1": "norm1",
    "layer_norm2": "norm2",
}
_LAYER = re.compile(r"encoder\.layers\.(\d+)\.(.+)")


class RewardNetwork(nn.Module):
    """A picture and the tokens of a prompt -> the head's output, before it is normalised."""

    def __init__(self, vision: Any, text: Any, widths: Sequence[int]) -> None:
        from transformers import BlipTextModel, BlipVisionModel

        super().__init__()
        self.vision = BlipVisionModel(vision)
        self.text = BlipTextModel(text, add_pooling_layer=False)
        self.head = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))

    def forward(self, seen: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """[B, 3, size, size], int64 [B, 35], int64 [B, 35] -> [B]."""
        tokens = self.vision(pixel_values=seen).last_hidden_state
        states = self.text(input_ids=ids, attention_mask=mask, encoder_hidden_states=tokens).last_hidden_state
        x: Tensor = states[:, 0] if states.dtype == torch.float64 else states[:, 0].float()
        for layer in self.head:
            x = layer(x)
        return x.squeeze(-1)


class ImageRewardScorer:
    """(head(text encoder's first state | picture) - MEAN)/DEVIATION (Xu et al. 2023)."""

    def __init__(self, network: RewardNetwork, tokenizer: Any, framing: Framing, identity: ScorerIdentity) -> None:
        self.network = network
        self.tokenizer = tokenizer
        self.framing = framing
        self.identity = identity

    def prepare(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """K prompts -> {"ids", "mask"}, int64 [K, 35]: the text encoder reads them together with the picture."""

        def encode(some: Sequence[str]) -> dict[str, Tensor]:
            ids, mask = token_ids(self.tokenizer, some, LENGTH)
            return {"ids": ids, "mask": mask}

        return in_batches(encode, prompts)

    def score(self, pictures: Tensor, said: Mapping[str, Tensor]) -> Tensor:
        """[B, 3, H, W] in [-1, 1] and rows of `prepare` -> [B]; see `PreferenceScorer.score`."""
        check_rows(pictures, dict(said), ("ids", "mask"))
        vision = self.network.vision
        seen = frame(pictures, self.framing).to(vision.device, vision.dtype)
        ids, mask = (said[key].to(vision.device, non_blocking=True) for key in ("ids", "mask"))
        output: Tensor = self.network(seen, ids, mask)
        return (output - MEAN) / DEVIATION


def load(files: ScorerFiles, device: torch.device, dtype: torch.dtype) -> ImageRewardScorer:
    """The published checkpoint, under its own key names, in transformers' BLIP classes.

    Raises:
        UserError: broken config, weights or tokenizer.
    """
    shapes = {key: entry.shape for key, entry in read_safetensors_header(files.weights[0])[1].items()}
    vision = _vision_config(shapes, files)
    text = _text_config(files, vision.hidden_size)
    widths = _head_widths(shapes, files)
    network = build(lambda: RewardNetwork(vision, text, widths), files, source, _unread, dtype, device)
    for layer in network.head:
        layer.to(dtype if dtype == torch.float64 else torch.float32)
    tokenizer = load_tokenizer(files.folder, "bert", text.vocab_size)
    framing = Framing(vision.image_size)
    backbone = (
        f"BLIP: ViT of {vision.num_hidden_layers} x {vision.hidden_size}, patch {vision.patch_size}, and text encoder "
        f"of {text.num_hidden_layers} x {text.hidden_size} with cross attention, head {' '.join(map(str, widths))}"
    )
    identity = IMAGE_REWARD.identity(backbone, fingerprint(files), framing.words())
    return ImageRewardScorer(network, tokenizer, framing, identity)


def _shape(shapes: Mapping[str, Shape], key: str, dimensions: int, files: ScorerFiles) -> Shape:
    if key not in shapes:
        raise UserError(f"{files.weights[0]} holds no {key!r}")
    if len(shapes[key]) != dimensions:
        raise UserError(f"{files.weights[0]}: {key!r} has shape {list(shapes[key])}, not {dimensions} dimensions")
    return shapes[key]


def _vision_config(shapes: Mapping[str, Shape], files: ScorerFiles) -> Any:
    """The vision transformer's sizes, from the checkpoint's shapes. Its layer norms add 1e-6, not BLIP's default."""
    from transformers import BlipVisionConfig

    side = "blip.visual_encoder"
    _, places, width = _shape(shapes, f"{side}.pos_embed", 3, files)
    patch = _shape(shapes, f"{side}.patch_embed.proj.weight", 4, files)[-1]
    inner = _shape(shapes, f"{side}.blocks.0.mlp.fc1.weight", 2, files)[0]
    layers = 1 + max(int(key.split(".")[3]) for key in shapes if re.match(rf"{re.escape(side)}\.blocks\.\d+\.", key))
    return BlipVisionConfig(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=width // HEAD_WIDTH,
        image_size=math.isqrt(places - 1) * patch,
        patch_size=patch,
        hidden_act="gelu",
        layer_norm_eps=1e-6,
    )


def _text_config(files: ScorerFiles, seen_width: int) -> Any:
    """What med_config.json says; the picture's width overrules its encoder_width, as in the published code."""
    from transformers import BlipTextConfig

    keys = (
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
        *("max_position_embeddings", "hidden_act", "layer_norm_eps", "pad_token_id"),
    )
    with loading(files.folder / "med_config.json"):
        told = {key: files.config[key] for key in keys}
        return BlipTextConfig(**told, encoder_hidden_size=seen_width, is_decoder=True)


def _head_widths(shapes: Mapping[str, Shape], files: ScorerFiles) -> list[int]:
    matrices = [_shape(shapes, f"mlp.layers.{index}.weight", 2, files) for index in HEAD_LAYERS]
    return [matrices[0][1], *(out for out, _ in matrices)]


def source(name: str) -> Source:
    """Where a parameter of `RewardNetwork` lies in the published checkpoint."""
    side, _, rest = name.partition(".")
    if side == "text":  # the same classes by another name, with the same parameters
        return Source(f"blip.text_encoder.{rest}")
    stem, _, kind = rest.rpartition(".")
    if side == "head":
        return Source(f"mlp.layers.{HEAD_LAYERS[int(stem)]}.{kind}")
    if rest in _VISION:
        return Source(f"blip.visual_encoder.{_VISION[rest]}")
    layer = _LAYER.fullmatch(stem)
    inside = f"blocks.{layer[1]}.{_INSIDE.get(layer[2], layer[2])}" if layer else _VISION[stem]
    return Source(f"blip.visual_encoder.{inside}.{kind}")


def _unread(key: str) -> bool:
    """BLIP's projections for contrastive pretraining, which the reward does not use, and a buffer of counted places."""
    return key.startswith(("blip.vision_proj.", "blip.text_proj.")) or key.endswith("position_ids")
