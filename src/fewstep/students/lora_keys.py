"""How LoRA files name the layers of a network: every spelling is resolved here, from the names alone.

A key is a prefix, a layer and an ending. The A matrix of one layer, in each spelling:

    unet.down_blocks.0.attentions.0.proj_in.lora_A.weight               diffusers today, and what fewstep writes
    unet.down_blocks.0.attentions.0.proj_in.lora.down.weight            diffusers before PEFT (or `lora_linear_layer`)
    unet.[...].attn1.processor.to_q_lora.down.weight                    diffusers' attention processors, still older
    down_blocks.0.attentions.0.proj_in.lora_A.weight                    any of these without `unet.`
    base_model.model.down_blocks.0.attentions.0.proj_in.lora_A.weight   PEFT
    lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight       kohya
    lora_unet_input_blocks_1_1_proj_in.lora_down.weight                 kohya, blocks numbered as in the original code
    lycoris_down_blocks_0_attentions_0_proj_in.lora_down.weight         LyCORIS, SimpleTuner
    diffusion_model.input_blocks.1.1.proj_in.lora_down.weight           ComfyUI, with the original code's names
    lora_transformer_transformer_blocks_0_attn_to_q.lora_down.weight    OneTrainer, for transformers
    diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight          ai-toolkit, with the original code's names

Any prefix goes with any ending and with either code's names of the layers. `.lora_A.default.weight` (an adapter's name
inside the key) and `.lora_A` (no `.weight`) are read too. Where the original code holds several of diffusers' layers in
one (queries, keys and values of a transformer), its A is that of each of them, and its B holds theirs row by row.

`.alpha` beside A and B is a number: the scale of that layer is alpha / rank (diffusers 0.42 gives attention
layers of a kohya file the alpha that most layers have; the two agree where all are equal, as they mostly are). Which
underscores of a kohya name are dots cannot be told from the name: it is looked up among the layers of the base that
it shall be merged into.

Not read, and refused in one line that names the key: anything that adapts a text encoder too (its prompts would be
encoded without it: a half-applied LoRA is another model), other adapters (LoKr, LoHa, DoRA, OFT, Tucker-decomposed
convolutions), whole weights or biases beside the LoRA, and keys of no known spelling.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fewstep.backbones.single_file.sd_names import original_names
from fewstep.common.errors import UserError

Part = Literal["A", "B", "alpha"]

PEFT_PREFIX = "base_model.model."
COMPONENTS = ("unet.", "transformer.")
"""What keys of a whole pipeline begin with: the component that denoises."""
_DOTTED_PREFIXES = (*COMPONENTS, PEFT_PREFIX, "model.diffusion_model.", "diffusion_model.")
"""Prefixes of a layer's name with dots; several may follow each other."""
_FLAT_PREFIXES = ("lora_unet_", "lora_transformer_", "lycoris_")
"""Prefixes of a layer's name with underscores for dots."""
_TEXT_PREFIXES = (
    *("text_encoder", "text_model.", f"{PEFT_PREFIX}text_", "clip_l.", "clip_g.", "t5xxl."),
    *(f"lora_te{number}_" for number in ("", 1, 2, 3)),
)

_MATRICES: tuple[tuple[str, Part], ...] = (("down", "A"), ("up", "B"))
_PROCESSOR_LAYERS = {"to_q_lora": "to_q", "to_k_lora": "to_k", "to_v_lora": "to_v", "to_out_lora": "to_out.0"}
_ENDINGS: dict[str, tuple[str, Part]] = {
    ".lora_A.weight": ("", "A"),
    ".lora_B.weight": ("", "B"),
    ".alpha": ("", "alpha"),
    **{f".lora_{way}.weight": ("", part) for way, part in _MATRICES},
    **{f".lora.{way}.weight": ("", part) for way, part in _MATRICES},
    **{f".lora_linear_layer.{way}.weight": ("", part) for way, part in _MATRICES},
    **{f".{k}.{way}.weight": (f".{v}", part) for k, v in _PROCESSOR_LAYERS.items() for way, part in _MATRICES},
}
"""The end of a key -> what it adds to the layer's name, and which part of the LoRA it holds."""
_NAMED = re.compile(r"(?P<layer>.+)\.lora_(?P<part>[AB])(?:\.[A-Za-z0-9_-]+(?:\.weight)?)?")
"""PEFT's endings with the name of an adapter in them, or without `.weight`."""

_OTHER_ADAPTERS = {
    ".lokr_": "a LoKr",
    ".hada_": "a LoHa",
    ".dora_scale": "a DoRA",
    ".lora_magnitude_vector": "a DoRA",
    ".lora_mid.": "a Tucker-decomposed LoRA",
    ".oft_": "an OFT",
}


_JOINT = "transformer_blocks.{i}."
_SINGLE = "single_transformer_blocks.{i}."
_IMAGE_QKV = tuple(f"{_JOINT}attn.to_{x}" for x in "qkv")
_TEXT_QKV = tuple(f"{_JOINT}attn.add_{x}_proj" for x in "qkv")
_FLUX_NAMES: dict[str, tuple[str, ...]] = {
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    "time_in.in_layer": ("time_text_embed.timestep_embedder.linear_1",),
    "time_in.out_layer": ("time_text_embed.timestep_embedder.linear_2",),
    "vector_in.in_layer": ("time_text_embed.text_embedder.linear_1",),
    "vector_in.out_layer": ("time_text_embed.text_embedder.linear_2",),
    "guidance_in.in_layer": ("time_text_embed.guidance_embedder.linear_1",),
    "guidance_in.out_layer": ("time_text_embed.guidance_embedder.linear_2",),
    "double_blocks.{i}.img_mod.lin": (f"{_JOINT}norm1.linear",),
    "double_blocks.{i}.txt_mod.lin": (f"{_JOINT}norm1_context.linear",),
    "double_blocks.{i}.img_attn.qkv": _IMAGE_QKV,
    "double_blocks.{i}.txt_attn.qkv": _TEXT_QKV,
    "double_blocks.{i}.img_attn.proj": (f"{_JOINT}attn.to_out.0",),
    "double_blocks.{i}.txt_attn.proj": (f"{_JOINT}attn.to_add_out",),
    "double_blocks.{i}.img_mlp.0": (f"{_JOINT}ff.net.0.proj",),
    "double_blocks.{i}.img_mlp.2": (f"{_JOINT}ff.net.2",),
    "double_blocks.{i}.txt_mlp.0": (f"{_JOINT}ff_context.net.0.proj",),
    "double_blocks.{i}.txt_mlp.2": (f"{_JOINT}ff_context.net.2",),
    "single_blocks.{i}.modulation.lin": (f"{_SINGLE}norm.linear",),
    "single_blocks.{i}.linear1": (*(f"{_SINGLE}attn.to_{x}" for x in "qkv"), f"{_SINGLE}proj_mlp"),
    "single_blocks.{i}.linear2": (f"{_SINGLE}proj_out",),
    "final_layer.linear": ("proj_out",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
}
"""A layer of the original code -> the layers of diffusers that hold it, in the order of its rows."""
_SD3_NAMES: dict[str, tuple[str, ...]] = {
    "x_embedder.proj": ("pos_embed.proj",),
    "t_embedder.mlp.0": ("time_text_embed.timestep_embedder.linear_1",),
    "t_embedder.mlp.2": ("time_text_embed.timestep_embedder.linear_2",),
    "y_embedder.mlp.0": ("time_text_embed.text_embedder.linear_1",),
    "y_embedder.mlp.2": ("time_text_embed.text_embedder.linear_2",),
    "joint_blocks.{i}.x_block.adaLN_modulation.1": (f"{_JOINT}norm1.linear",),
    "joint_blocks.{i}.context_block.adaLN_modulation.1": (f"{_JOINT}norm1_context.linear",),
    "joint_blocks.{i}.x_block.attn.qkv": _IMAGE_QKV,
    "joint_blocks.{i}.x_block.attn2.qkv": tuple(f"{_JOINT}attn2.to_{x}" for x in "qkv"),
    "joint_blocks.{i}.context_block.attn.qkv": _TEXT_QKV,
    "joint_blocks.{i}.x_block.attn.proj": (f"{_JOINT}attn.to_out.0",),
    "joint_blocks.{i}.x_block.attn2.proj": (f"{_JOINT}attn2.to_out.0",),
    "joint_blocks.{i}.context_block.attn.proj": (f"{_JOINT}attn.to_add_out",),
    "joint_blocks.{i}.x_block.mlp.fc1": (f"{_JOINT}ff.net.0.proj",),
    "joint_blocks.{i}.x_block.mlp.fc2": (f"{_JOINT}ff.net.2",),
    "joint_blocks.{i}.context_block.mlp.fc1": (f"{_JOINT}ff_context.net.0.proj",),
    "joint_blocks.{i}.context_block.mlp.fc2": (f"{_JOINT}ff_context.net.2",),
    "final_layer.linear": ("proj_out",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
}
_PIXART_NAMES: dict[str, tuple[str, ...]] = {
    "x_embedder.proj": ("pos_embed.proj",),
    "t_embedder.mlp.0": ("adaln_single.emb.timestep_embedder.linear_1",),
    "t_embedder.mlp.2": ("adaln_single.emb.timestep_embedder.linear_2",),
    "t_block.1": ("adaln_single.linear",),
    "y_embedder.y_proj.fc1": ("caption_projection.linear_1",),
    "y_embedder.y_proj.fc2": ("caption_projection.linear_2",),
    "blocks.{i}.attn.qkv": tuple(f"{_JOINT}attn1.to_{x}" for x in "qkv"),
    "blocks.{i}.attn.proj": (f"{_JOINT}attn1.to_out.0",),
    "blocks.{i}.cross_attn.q_linear": (f"{_JOINT}attn2.to_q",),
    "blocks.{i}.cross_attn.kv_linear": tuple(f"{_JOINT}attn2.to_{x}" for x in "kv"),
    "blocks.{i}.cross_attn.proj": (f"{_JOINT}attn2.to_out.0",),
    "blocks.{i}.mlp.fc1": (f"{_JOINT}ff.net.0.proj",),
    "blocks.{i}.mlp.fc2": (f"{_JOINT}ff.net.2",),
    "final_layer.linear": ("proj_out",),
}


@dataclass
class Keys:
    """The keys of one layer in a file.

    Attributes:
        share: layers whose rows B holds one below the other, this one among them; empty where B is this layer's alone.
        swapped: whether the halves of B's rows stand the other way round.
    """

    A: str = ""
    B: str = ""
    alpha: str = ""
    share: tuple[str, ...] = ()
    swapped: bool = False


def split_key(key: str) -> tuple[str, Part] | None:
    """Return the layer of a key with its prefix, and the part of the LoRA it holds; None for an unknown spelling."""
    for ending, (tail, part) in _ENDINGS.items():
        if key.endswith(ending):
            return (key.removesuffix(ending) + tail).replace(".processor.", "."), part
    if (named := _NAMED.fullmatch(key)) and not key.endswith(".bias"):
        return named["layer"], "A" if named["part"] == "A" else "B"
    return None


def find_keys(keys: Iterable[str], modules: Collection[str], file: Path) -> dict[str, Keys]:
    """Return the keys of a LoRA file by the base's own names of the layers.

    Args:
        keys: names of all tensors of the file.
        modules: names of all layers with weights of the base's network.
        file: for messages.

    Raises:
        UserError: naming the first key that is not the LoRA of a denoiser, whose layer this base lacks, or that comes
            twice.
    """
    dotted, flat = _names(modules)
    found: dict[str, Keys] = {}
    for key, name, part in [(key, *_read_key(key, file)) for key in keys]:
        prefix = next((prefix for prefix in _FLAT_PREFIXES if name.startswith(prefix)), "")
        place = flat.get(name.removeprefix(prefix)) if prefix else dotted.get(_plain_name(name))
        if place is None:
            raise UserError(
                f"lora = {str(file)!r}: {key!r} names no layer of this base; it is for another base, or in a spelling "
                "that is not read: export it as diffusers, kohya or PEFT write it"
            )
        for module in place.modules:
            share = place.modules if len(place.modules) > 1 else ()
            layer = found.setdefault(module, Keys(share=share, swapped=place.swapped))
            if getattr(layer, part):
                raise UserError(f"{file} holds the {part} of {module} twice: {getattr(layer, part)!r} and {key!r}")
            setattr(layer, part, key)
    return found


def _plain_name(name: str) -> str:
    """Return a layer's name without its prefixes."""
    while prefix := next((prefix for prefix in _DOTTED_PREFIXES if name.startswith(prefix)), ""):
        name = name.removeprefix(prefix)
    return name


@dataclass(frozen=True)
class _Place:
    """What a name in a file stands for: one layer, or several that the original code holds in one.

    Attributes:
        swapped: whether the original code holds the halves of the rows the other way round.
    """

    modules: tuple[str, ...]
    swapped: bool = False


def _names(modules: Collection[str]) -> tuple[dict[str, _Place], dict[str, _Place]]:
    """Return every name of the layers of a network, with dots and with underscores, diffusers' names first.

    A name that could mean two places is left out.
    """
    own = {module: _Place((module,)) for module in modules}
    theirs = _transformer_names(modules)
    if any(module.startswith("down_blocks.") for module in modules):
        theirs = {alias: _Place((module,)) for module, alias in original_names(modules).items()}
    flat: dict[str, set[_Place]] = {}
    for name, place in itertools.chain(own.items(), theirs.items()):
        flat.setdefault(name.replace(".", "_"), set()).add(place)
    return theirs | own, {name: next(iter(places)) for name, places in flat.items() if len(places) == 1}


def _transformer_names(modules: Collection[str]) -> dict[str, _Place]:
    """Map names in the original code of Flux, SD 3, PixArt and SANA to layers of a diffusers transformer.

    A name is known where the network has all layers that it stands for.
    """
    every = set(modules)
    flux = any(module.startswith("single_transformer_blocks.") for module in modules)
    joint = "transformer_blocks.0.attn.add_q_proj" in every
    table = _FLUX_NAMES if flux else _SD3_NAMES if joint else _PIXART_NAMES
    numbers = sorted({int(m.split(".")[1]) for m in modules if re.match(r"(single_)?transformer_blocks\.\d+\.", m)})
    found = {}
    for theirs, ours in table.items():
        for i in numbers if "{i}" in theirs else [0]:
            names = tuple(name.format(i=i) for name in ours)
            # where the original modulates by (shift, scale) and diffusers by (scale, shift)
            last = joint and not flux and names == (f"transformer_blocks.{numbers[-1]}.norm1_context.linear",)
            if every.issuperset(names):
                found[theirs.format(i=i)] = _Place(names, last or names == ("norm_out.linear",))
    return found


def _read_key(key: str, file: Path) -> tuple[str, Part]:
    for mark, adapter in _OTHER_ADAPTERS.items():
        if mark in key:
            raise UserError(f"{file} is {adapter}: it holds {key!r}; the nearest adapter that is read here is a LoRA")
    if key.startswith(_TEXT_PREFIXES):
        raise UserError(
            f"{file} adapts a text encoder too: it holds {key!r}; only a LoRA of the denoiser alone is read"
        )
    split = split_key(key)
    if split is None:
        raise UserError(f"{file} is not a LoRA of a denoiser in a known spelling: it holds {key!r}")
    return split
