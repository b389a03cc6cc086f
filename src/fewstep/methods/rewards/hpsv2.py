"""HPS v2 and v2.1: an open_clip ViT-H-14, fine-tuned on HPD v2, in transformers' CLIPModel."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fewstep.common.errors import UserError
from fewstep.common.safetensors_header import read_safetensors_header
from fewstep.methods.rewards.clip import HUNDRED, CosineScorer, clip_network, identity_of, load_published
from fewstep.methods.rewards.folder_layout import ScorerFiles
from fewstep.methods.rewards.licences import HPSV2
from fewstep.methods.rewards.preprocess import Framing
from fewstep.methods.rewards.tokenize import load_tokenizer
from fewstep.methods.rewards.weights import Source, build, loading

VIT_H_14 = {
    "embed_dim": 1024,
    "vision_cfg": {"image_size": 224, "layers": 32, "width": 1280, "head_width": 80, "patch_size": 14},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 1024, "heads": 16, "layers": 24},
}
"""open_clip's ViT-H-14, which every published HPS v2 is."""
_WHOLE = {
    "logit_scale": "logit_scale",
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm": "ln_final",
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.pre_layrnorm": "visual.ln_pre",
    "vision_model.post_layernorm": "visual.ln_post",
}
_TURNED = {"text_projection.weight": "text_projection", "visual_projection.weight": "visual.proj"}
_INSIDE = {
    "self_attn.out_proj": "attn.out_proj",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
_LAYER = re.compile(r"(text|vision)_model\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)")


def load(files: ScorerFiles, device: torch.device, dtype: torch.dtype) -> CosineScorer:
    """100 * cos(picture, prompt) (Wu et al. 2023).

    A picture's longer side is resized and the rest is black, as the authors' own program does it.

    Raises:
        UserError: broken config, weights or tokenizer.
    """
    if files.published:
        with loading(files.folder / "config.json"):
            size = int(files.config.get("vision_config", {}).get("image_size", 224))
        return load_published(files, device, dtype, HPSV2, HUNDRED, Framing(size, "pad"))
    told: dict[str, Any] = files.config or VIT_H_14
    with loading(f"open_clip_config.json of {files.folder}"):
        vocabulary, size = int(told["text_cfg"]["vocab_size"]), int(told["vision_cfg"]["image_size"])
    if not files.config:
        _check_width(files)
    tokenizer = load_tokenizer(files.folder, "clip", vocabulary)
    with loading(f"open_clip_config.json of {files.folder}"):
        config = _config(told, tokenizer)
    network = build(lambda: clip_network(config), files, source, lambda key: key == "attn_mask", dtype, device)
    framing = Framing(size, "pad")
    return CosineScorer(network, tokenizer, framing, HUNDRED, identity_of(HPSV2, files, config, framing))


def _check_width(files: ScorerFiles) -> None:
    """Heads cannot be seen in the shapes: a network of another width needs its config."""
    entry = read_safetensors_header(files.weights[0])[1].get("visual.class_embedding")
    width = entry.shape[-1] if entry and entry.shape else 0
    if width != 1280:
        raise UserError(
            f"{files.weights[0]} is of width {width}, ViT-H-14 of 1280; put its open_clip_config.json into the folder"
        )


def _config(told: Any, tokenizer: Any) -> Any:
    """transformers' CLIPConfig of an open_clip model_cfg."""
    from transformers import CLIPConfig

    vision, text = told["vision_cfg"], told["text_cfg"]
    act = "quick_gelu" if told.get("quick_gelu") else "gelu"
    return CLIPConfig(
        projection_dim=told["embed_dim"],
        vision_config={
            "hidden_size": vision["width"],
            "intermediate_size": int(vision["width"] * vision.get("mlp_ratio", 4)),
            "num_hidden_layers": vision["layers"],
            "num_attention_heads": vision["width"] // vision.get("head_width", 64),
            "image_size": vision["image_size"],
            "patch_size": vision["patch_size"],
            "hidden_act": act,
            "projection_dim": told["embed_dim"],
        },
        text_config={
            "vocab_size": text["vocab_size"],
            "hidden_size": text["width"],
            "intermediate_size": 4 * text["width"],
            "num_hidden_layers": text["layers"],
            "num_attention_heads": text["heads"],
            "max_position_embeddings": text["context_length"],
            "hidden_act": act,
            "projection_dim": told["embed_dim"],
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
    )


def source(name: str) -> Source:
    """Where a CLIPModel's parameter lies in an open_clip checkpoint.

    open_clip keeps queries, keys and values of a layer in one tensor, and its two projections as matrices that are
    multiplied from the right.

    Raises:
        KeyError: no CLIPModel has such a parameter.
    """
    if name in _TURNED:
        return Source(_TURNED[name], lambda tensor: tensor.T)
    if name in _WHOLE:
        return Source(_WHOLE[name])
    found = _LAYER.fullmatch(name)
    if not found:
        stem, _, kind = name.rpartition(".")
        return Source(f"{_WHOLE[stem]}.{kind}")
    side, number, part, kind = found.groups()
    layer = f"{'visual.' if side == 'vision' else ''}transformer.resblocks.{number}"
    if part in _INSIDE:
        return Source(f"{layer}.{_INSIDE[part]}.{kind}")
    third = {"self_attn.q_proj": 0, "self_attn.k_proj": 1, "self_attn.v_proj": 2}[part]
    return Source(f"{layer}.attn.in_proj_{kind}", _third(third))


def _third(index: int) -> Callable[[Tensor], Tensor]:
    def take(tensor: Tensor) -> Tensor:
        edge = math.ceil(len(tensor) / 3)  # one that is not whole gives a wrong shape, which is refused by name
        return tensor[index * edge : (index + 1) * edge]

    return take
