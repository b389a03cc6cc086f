"""Stable Diffusion's weights under the names of its original code, as single-file checkpoints and ComfyUI hold them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fewstep.backbones.single_file.sd_names import NAMES, original_names
from fewstep.common.errors import UserError

UNET = "model.diffusion_model."
VAE = "first_stage_model."


class Place(NamedTuple):
    """Place of a tensor of diffusers in the original code's state dict.

    Attributes:
        key: its name there, with the prefix.
        third: which third of the rows there it is (0, 1 or 2: queries, keys or values); None for all of them.
        turned: whether it is transposed there.
        square: whether a matrix is a 1 x 1 convolution there.
    """

    key: str
    third: int | None = None
    turned: bool = False
    square: bool = False


def unet_keys(names: Iterable[str], prefix: str = UNET) -> dict[str, Place]:
    """Return the places of a UNet's tensors.

    Raises:
        UserError: a layer that the original code does not have.
    """
    split = {name: name.rpartition(".") for name in names}
    modules = original_names({module for module, _, _ in split.values()})
    lacking = next((module for module, _, _ in split.values() if module not in modules), None)
    if lacking:
        raise UserError(
            f"single-file checkpoints have no name for the UNet's {lacking}; give a pipeline folder instead"
        )
    return {name: Place(f"{prefix}{modules[module]}.{kind}") for name, (module, _, kind) in split.items()}


def vae_keys(names: Iterable[str]) -> dict[str, Place]:
    """Return the places of an AutoencoderKL's tensors.

    In the original code up blocks are counted from the other end, and attention consists of 1 x 1 convolutions.
    """
    names = list(names)
    last = max((int(m[1]) for name in names if (m := re.search(r"up_blocks\.(\d+)\.", name))), default=0)
    found = {}
    for name in names:
        new = re.sub(r"up_blocks\.(\d+)\.", lambda m: f"up_blocks.{last - int(m[1])}.", name)
        new = re.sub(r"mid_block\.resnets\.(\d+)", lambda m: f"mid.block_{int(m[1]) + 1}", new)
        for pattern, instead in NAMES["vae"].items():
            new = re.sub(pattern, instead, new)
        attends = "mid.attn_1" in new
        if attends:
            place, _, rest = new.partition("mid.attn_1.")
            part, _, kind = rest.rpartition(".")
            new = f"{place}mid.attn_1.{NAMES['vae_attention'][part]}.{kind}"
        found[name] = Place(f"{VAE}{new}", square=attends)
    return found


def clip_keys(names: Iterable[str], prefix: str) -> dict[str, Place]:
    """Return the places of a CLIP text encoder's tensors in OpenAI's layout: transformers' names, no projection."""
    plain = {name: name.removeprefix("text_model.") for name in names}
    return {
        name: Place(f"{prefix}transformer.text_model.{own}")
        for name, own in plain.items()
        if not own.startswith("text_projection") and not own.endswith("position_ids")
    }


def open_clip_keys(names: Iterable[str], prefix: str) -> dict[str, Place]:
    """Return the places of a CLIP text encoder's tensors in OpenCLIP's layout: q, k and v in one matrix."""
    found = {}
    for name in names:
        own = name.removeprefix("text_model.")
        if own in NAMES["open_clip"]:
            found[name] = Place(f"{prefix}model.{NAMES['open_clip'][own]}")
        elif own == "text_projection.weight":
            found[name] = Place(f"{prefix}model.text_projection", turned=True)
        elif layer := re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", own):
            number, part, kind = layer.groups()
            place = f"{prefix}model.transformer.resblocks.{number}."
            if joint := re.fullmatch(r"self_attn\.([qkv])_proj", part):
                found[name] = Place(f"{place}attn.in_proj_{kind}", third="qkv".index(joint[1]))
            else:
                found[name] = Place(f"{place}{NAMES['open_clip_layer'][part]}.{kind}")
    return found


def text_keys(encoders: Sequence[tuple[str, Iterable[str]]]) -> list[dict[str, Place]]:
    """Return the places of the tensors of one text encoder (Stable Diffusion 1.x, 2.x) or of two (XL).

    Args:
        encoders: activation (`hidden_act`) and names of each.
    """
    if len(encoders) == 1:
        act, names = encoders[0]
        open_clip = act == "gelu"  # 2.x; OpenAI's has quick_gelu
        return [(open_clip_keys if open_clip else clip_keys)(names, "cond_stage_model.")]
    return [
        clip_keys(encoders[0][1], "conditioner.embedders.0."),
        open_clip_keys(encoders[1][1], "conditioner.embedders.1."),
    ]


def to_original(weights: Mapping[str, Tensor], keys: Mapping[str, Place]) -> dict[str, Tensor]:
    """Convert a network's weights to the original code's names and layout."""
    found: dict[str, Tensor] = {}
    thirds: dict[str, dict[int, Tensor]] = {}
    for name, held in keys.items():
        value = weights[name]
        if held.third is not None:
            thirds.setdefault(held.key, {})[held.third] = value
            found[held.key] = value  # keeps the order; the parts are joined below
        elif held.turned:
            found[held.key] = value.T.contiguous()
        else:
            found[held.key] = value[:, :, None, None] if held.square and value.dim() == 2 else value
    return found | {key: torch.cat([parts[i] for i in range(3)]) for key, parts in thirds.items()}


def checkpoint_weights(
    unet: Mapping[str, Tensor], vae: Mapping[str, Tensor], encoders: list[Any], *, prediction: str, zero_snr: bool
) -> dict[str, Tensor]:
    """Return a whole single-file checkpoint, with the marks of ComfyUI: `v_pred`, and `ztsnr` for zero terminal SNR."""
    marks = {"v_pred": prediction == "v", "ztsnr": zero_snr}
    states = [encoder.state_dict() for encoder in encoders]
    texts = text_keys([(encoder.config.hidden_act, state) for encoder, state in zip(encoders, states, strict=True)])
    whole = to_original(unet, unet_keys(unet)) | to_original(vae, vae_keys(vae))
    for state, keys in zip(states, texts, strict=True):
        whole |= to_original(state, keys)
    return {
        **whole,
        **{name: torch.zeros(0) for name, held in marks.items() if held},
    }
