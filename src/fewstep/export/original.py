"""Stable Diffusion's weights under the names of its original code, as single-file checkpoints and ComfyUI hold them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fewstep.export.spellings import original_names

UNET = "model.diffusion_model."
VAE = "first_stage_model."

_VAE_PARTS = (
    (r"down_blocks\.(\d+)\.resnets\.(\d+)", r"down.\1.block.\2"),
    (r"down_blocks\.(\d+)\.downsamplers\.0\.conv", r"down.\1.downsample.conv"),
    (r"up_blocks\.(\d+)\.resnets\.(\d+)", r"up.\1.block.\2"),
    (r"up_blocks\.(\d+)\.upsamplers\.0\.conv", r"up.\1.upsample.conv"),
    (r"mid_block\.attentions\.0", "mid.attn_1"),
    (r"conv_shortcut", "nin_shortcut"),
    (r"conv_norm_out", "norm_out"),
)
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_OPEN_CLIP = {
    "embeddings.position_embedding.weight": "positional_embedding",
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}
_OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


def unet_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A UNet's weights by their original names."""
    names = original_names({name.rpartition(".")[0] for name in weights})
    found = {}
    for name, value in weights.items():
        module, _, kind = name.rpartition(".")
        found[f"{UNET}{names[module]}.{kind}"] = value
    return found


def vae_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An AutoencoderKL's weights by their original names: up blocks are counted from the other end, attention is made
    of 1 x 1 convolutions."""
    last = max(int(m[1]) for name in weights if (m := re.search(r"up_blocks\.(\d+)\.", name)))
    found = {}
    for name, value in weights.items():
        new = re.sub(r"up_blocks\.(\d+)\.", lambda m: f"up_blocks.{last - int(m[1])}.", name)
        new = re.sub(r"mid_block\.resnets\.(\d+)", lambda m: f"mid.block_{int(m[1]) + 1}", new)
        for pattern, instead in _VAE_PARTS:
            new = re.sub(pattern, instead, new)
        if "mid.attn_1" in new:
            place, _, rest = new.partition("mid.attn_1.")
            part, _, kind = rest.rpartition(".")
            new = f"{place}mid.attn_1.{_VAE_ATTENTION[part]}.{kind}"
            if value.dim() == 2:
                value = value[:, :, None, None]
        found[f"{VAE}{new}"] = value
    return found


def clip_weights(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """A CLIP text encoder's weights as OpenAI's are held: transformers' own names, without the projection."""
    plain = {name.removeprefix("text_model."): value for name, value in weights.items()}
    return {
        f"{prefix}transformer.text_model.{name}": value
        for name, value in plain.items()
        if not name.startswith("text_projection") and not name.endswith("position_ids")
    }


def open_clip_weights(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """A CLIP text encoder's weights as OpenCLIP's are held: queries, keys and values in one matrix."""
    plain = {name.removeprefix("text_model."): value for name, value in weights.items()}
    found = {}
    for name, value in plain.items():
        if name in _OPEN_CLIP:
            found[f"{prefix}model.{_OPEN_CLIP[name]}"] = value
        elif name == "text_projection.weight":
            found[f"{prefix}model.text_projection"] = value.T.contiguous()
        elif layer := re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name):
            number, part, kind = layer.groups()
            place = f"{prefix}model.transformer.resblocks.{number}."
            if part == "self_attn.q_proj":
                start = f"encoder.layers.{number}.self_attn."
                found[f"{place}attn.in_proj_{kind}"] = torch.cat([plain[f"{start}{x}_proj.{kind}"] for x in "qkv"])
            elif not part.endswith(("k_proj", "v_proj")):
                found[f"{place}{_OPEN_CLIP_LAYER[part]}.{kind}"] = value
    return found


def text_weights(encoders: list[Any]) -> dict[str, Tensor]:
    """The weights of one encoder (Stable Diffusion 1.x, 2.x) or of two (XL)."""
    states = [encoder.state_dict() for encoder in encoders]
    if len(states) == 1:
        open_clip = encoders[0].config.hidden_act == "gelu"  # 2.x; OpenAI's has quick_gelu
        return (open_clip_weights if open_clip else clip_weights)(states[0], "cond_stage_model.")
    return {
        **clip_weights(states[0], "conditioner.embedders.0."),
        **open_clip_weights(states[1], "conditioner.embedders.1."),
    }


def checkpoint_weights(
    unet: Mapping[str, Tensor], vae: Mapping[str, Tensor], encoders: list[Any], *, prediction: str, zero_snr: bool
) -> dict[str, Tensor]:
    """A whole single-file checkpoint. ComfyUI knows a v network by an empty `v_pred`, zero terminal SNR by `ztsnr`."""
    marks = {"v_pred": prediction == "v", "ztsnr": zero_snr}
    return {
        **unet_weights(unet),
        **vae_weights(vae),
        **text_weights(encoders),
        **{name: torch.zeros(0) for name, held in marks.items() if held},
    }
