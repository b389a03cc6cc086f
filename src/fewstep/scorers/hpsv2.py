"""HPS v2 and v2.1: an open_clip ViT-H-14, fine-tuned on HPD v2, in transformers' CLIPModel."""

from __future__ import annotations

from typing import Any

import torch

from fewstep.common.errors import UserError
from fewstep.common.safetensors_header import read_safetensors_header
from fewstep.scorers.clip import HUNDRED, CosineScorer, clip_network, cosine_scorer, load_clip_folder
from fewstep.scorers.preprocess import Framing
from fewstep.scorers.registry import ScorerFiles
from fewstep.scorers.reward import HPSV2
from fewstep.scorers.scorer import State, load_frozen, load_tokenizer, loading, rename_keys

VIT_H_14 = {
    "embed_dim": 1024,
    "vision_cfg": {"image_size": 224, "layers": 32, "width": 1280, "head_width": 80, "patch_size": 14},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 1024, "heads": 16, "layers": 24},
}
"""open_clip's ViT-H-14, the network of all published HPS v2 weights."""
_RULES = (
    (r"^visual\.transformer\.resblocks\.", "vision_model.encoder.layers."),
    (r"^transformer\.resblocks\.", "text_model.encoder.layers."),
    (r"\.attn\.out_proj\.", ".self_attn.out_proj."),
    (r"\.ln_([12])\.", r".layer_norm\1."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
    (r"^token_embedding\.", "text_model.embeddings.token_embedding."),
    (r"^positional_embedding$", "text_model.embeddings.position_embedding.weight"),
    (r"^ln_final\.", "text_model.final_layer_norm."),
    (r"^visual\.class_embedding$", "vision_model.embeddings.class_embedding"),
    (r"^visual\.conv1\.", "vision_model.embeddings.patch_embedding."),
    (r"^visual\.positional_embedding$", "vision_model.embeddings.position_embedding.weight"),
    (r"^visual\.ln_pre\.", "vision_model.pre_layrnorm."),
    (r"^visual\.ln_post\.", "vision_model.post_layernorm."),
    (r"^text_projection$", "text_projection.weight"),
    (r"^visual\.proj$", "visual_projection.weight"),
)


def load(files: ScorerFiles, device: torch.device, dtype: torch.dtype) -> CosineScorer:
    """Load 100 * cos(picture, prompt) (Wu et al. 2023).

    As in the authors' own program, a picture's longer side is resized and the rest is black.

    Raises:
        UserError: broken config, weights or tokenizer.
    """
    if files.is_clip_folder:
        return load_clip_folder(files, device, dtype, HPSV2, HUNDRED, fit="pad")
    if not files.config:
        _check_width(files)
    with loading(f"open_clip_config.json of {files.folder}"):
        model: dict[str, Any] = files.config["model_cfg"] if files.config else VIT_H_14
        tokenizer = load_tokenizer(files.folder, "clip", int(model["text_cfg"]["vocab_size"]))
        config = clip_config_of(model, tokenizer)
    network = load_frozen(lambda: clip_network(config), files, dtype, device, clip_state, unused="^attn_mask$")
    framing = Framing(config.vision_config.image_size, "pad")
    return cosine_scorer(network, tokenizer, framing, HUNDRED, HPSV2, files)


def _check_width(files: ScorerFiles) -> None:
    """Raise for another width than ViT-H-14's: the number of heads is in the config alone, not in the shapes."""
    entry = read_safetensors_header(files.weights[0])[1].get("visual.class_embedding")
    width = entry.shape[-1] if entry and entry.shape else 0
    if width != 1280:
        raise UserError(
            f"{files.weights[0]} is of width {width}, ViT-H-14 of 1280; put its open_clip_config.json into the folder",
            field=str(files.weights[0]),
        )


def clip_config_of(model: Any, tokenizer: Any) -> Any:
    """Return transformers' CLIPConfig of an open_clip model_cfg."""
    from transformers import CLIPConfig

    vision, text = model["vision_cfg"], model["text_cfg"]
    both = {"hidden_act": "quick_gelu" if model.get("quick_gelu") else "gelu", "projection_dim": model["embed_dim"]}
    return CLIPConfig(
        projection_dim=model["embed_dim"],
        vision_config=both
        | {
            "hidden_size": vision["width"],
            "intermediate_size": int(vision["width"] * vision.get("mlp_ratio", 4)),
            "num_hidden_layers": vision["layers"],
            "num_attention_heads": vision["width"] // vision.get("head_width", 64),
            "image_size": int(vision["image_size"]),
            "patch_size": vision["patch_size"],
        },
        text_config=both
        | {
            "vocab_size": text["vocab_size"],
            "hidden_size": text["width"],
            "intermediate_size": 4 * text["width"],
            "num_hidden_layers": text["layers"],
            "num_attention_heads": text["heads"],
            "max_position_embeddings": text["context_length"],
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
    )


def clip_state(state: State) -> State:
    """Convert the state of an open_clip checkpoint to that of CLIPModel.

    open_clip stores queries, keys and values of a layer in one tensor, and its two projections as matrices that are
    multiplied from the right.
    """
    converted = rename_keys(state, _RULES)
    for key in [key for key in converted if ".attn.in_proj_" in key]:
        kind = key.rpartition("_")[2]
        for letter, part in zip("qkv", converted.pop(key).chunk(3), strict=True):
            converted[key.replace(f".attn.in_proj_{kind}", f".self_attn.{letter}_proj.{kind}")] = part
    for key in ("text_projection.weight", "visual_projection.weight"):
        if key in converted:
            converted[key] = converted[key].T
    return converted
