"""How LoRA files name the layers of a UNet: every spelling is resolved here, from the names alone.

A key is a prefix, a layer and an ending. The A matrix of one layer, in each spelling:

    unet.down_blocks.0.attentions.0.proj_in.lora_A.weight               diffusers today, and what fewstep writes
    unet.down_blocks.0.attentions.0.proj_in.lora.down.weight            diffusers before PEFT (or `lora_linear_layer`)
    unet.[...].attn1.processor.to_q_lora.down.weight                    diffusers' attention processors, still older
    down_blocks.0.attentions.0.proj_in.lora_A.weight                    any of these without `unet.`
    base_model.model.down_blocks.0.attentions.0.proj_in.lora_A.weight   PEFT
    lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight       kohya
    lora_unet_input_blocks_1_1_proj_in.lora_down.weight                 kohya, blocks numbered as in the original code

and `.alpha` beside A and B is a number: the scale of that layer is alpha / rank (diffusers 0.42 gives attention
layers of a kohya file the alpha that most layers have; the two agree where all are equal, as they mostly are). Which
underscores of a kohya name are dots cannot be told from the name: it is looked up among the layers of the base that
it shall be merged into.

Not read, and refused in one line that names the key: anything that adapts a text encoder too (its prompts would be
encoded without it: a half-applied LoRA is another model), other adapters (LoKr, LoHa, DoRA, OFT, Tucker-decomposed
convolutions), whole weights or biases beside the LoRA, and keys of no known spelling.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fewstep.errors import UserError

Part = Literal["A", "B", "alpha"]

PEFT_PREFIX = "base_model.model."
COMPONENTS = ("unet.", "transformer.")
"""What keys of a whole pipeline begin with: the component that denoises."""
_FLAT_PREFIX = "lora_unet_"
_TEXT_PREFIXES = ("text_encoder", "text_model.", "lora_te_", "lora_te1_", "lora_te2_", f"{PEFT_PREFIX}text_")

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

_OTHER_ADAPTERS = {
    ".lokr_": "a LoKr",
    ".hada_": "a LoHa",
    ".dora_scale": "a DoRA",
    ".lora_magnitude_vector": "a DoRA",
    ".lora_mid.": "a Tucker-decomposed LoRA",
    ".oft_": "an OFT",
}

_ORIGINAL_PLACES = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_ORIGINAL_RESNET = {
    "norm1": "in_layers.0",
    "norm2": "out_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


@dataclass
class Keys:
    """The keys of one layer in a file."""

    A: str = ""
    B: str = ""
    alpha: str = ""


def split_key(key: str) -> tuple[str, Part] | None:
    """The layer of a key, prefix and all, and the part of the LoRA that it holds; None for no known spelling."""
    for ending, (tail, part) in _ENDINGS.items():
        if key.endswith(ending):
            return (key.removesuffix(ending) + tail).replace(".processor.", "."), part
    return None


def find_keys(keys: Iterable[str], modules: Collection[str], file: Path, component: str = "unet") -> dict[str, Keys]:
    """The keys of a LoRA file by the base's own names of the layers.

    Args:
        keys: names of all tensors of the file.
        modules: names of all layers with weights of the base's UNet.
        file: for messages.
        component: of the pipeline that the base is, which keys may begin with.

    Raises:
        UserError: naming the first key that is not the LoRA of a UNet, is of another base, or comes twice.
    """
    parts = [(key, *_read_key(key, file)) for key in keys]
    flat = _flat_names(modules) if any(name.startswith(_FLAT_PREFIX) for _, name, _ in parts) else {}
    found: dict[str, Keys] = {}
    for key, name, part in parts:
        plain = name.removeprefix(f"{component}.").removeprefix(PEFT_PREFIX)
        module = flat.get(name.removeprefix(_FLAT_PREFIX), "") if name.startswith(_FLAT_PREFIX) else plain
        if module not in modules:
            raise UserError(f"lora = {str(file)!r} is for another base: this one has no layer {plain}")
        layer = found.setdefault(module, Keys())
        if getattr(layer, part):
            raise UserError(f"{file} holds the {part} of {module} twice: {getattr(layer, part)!r} and {key!r}")
        setattr(layer, part, key)
    return found


def _read_key(key: str, file: Path) -> tuple[str, Part]:
    for mark, adapter in _OTHER_ADAPTERS.items():
        if mark in key:
            raise UserError(f"{file} is {adapter}: it holds {key!r}; the nearest adapter that is read here is a LoRA")
    if key.startswith(_TEXT_PREFIXES):
        raise UserError(f"{file} adapts a text encoder too: it holds {key!r}; only a LoRA of the UNet alone is read")
    split = split_key(key)
    if split is None:
        raise UserError(f"{file} is not a LoRA of a UNet in a known spelling: it holds {key!r}")
    return split


def _flat_names(modules: Collection[str]) -> dict[str, str]:
    """Name with underscores for dots -> layer, for both ways to number the blocks.

    A name that two layers would share is left out: it could mean either.
    """
    names: dict[str, set[str]] = {}
    for module, alias in itertools.chain(zip(modules, modules), original_names(modules).items()):
        names.setdefault(alias.replace(".", "_"), set()).add(module)
    return {name: next(iter(layers)) for name, layers in names.items() if len(layers) == 1}


def original_names(modules: Collection[str]) -> dict[str, str]:
    """Layer of a diffusers UNet -> its name in the UNet of Stable Diffusion's original code (also called SGM).

    There the blocks are one list a side: convolutions that change the size stand among `input_blocks` with a number of
    their own, but inside the last of a level's `output_blocks`, behind its attention if it has one.
    """
    prefixes = {".".join(parts[:n]) for parts in (m.split(".") for m in modules) for n in range(1, len(parts) + 1)}

    def children(prefix: str) -> range:
        return range(next(i for i in itertools.count() if f"{prefix}.{i}" not in prefixes))

    places = dict(_ORIGINAL_PLACES)
    number = 1
    for block in (f"down_blocks.{i}" for i in children("down_blocks")):
        for i in children(f"{block}.resnets"):
            places[f"{block}.resnets.{i}"] = f"input_blocks.{number}.0"
            places[f"{block}.attentions.{i}"] = f"input_blocks.{number}.1"
            number += 1
        if f"{block}.downsamplers.0.conv" in prefixes:
            places[f"{block}.downsamplers.0.conv"] = f"input_blocks.{number}.0.op"
            number += 1
    number = 0
    for block in (f"up_blocks.{i}" for i in children("up_blocks")):
        for i in children(f"{block}.resnets"):
            places[f"{block}.resnets.{i}"] = f"output_blocks.{number}.0"
            places[f"{block}.attentions.{i}"] = f"output_blocks.{number}.1"
            number += 1
        behind = 2 if f"{block}.attentions" in prefixes else 1
        places[f"{block}.upsamplers.0.conv"] = f"output_blocks.{number - 1}.{behind}.conv"

    names = {}
    for module in modules:
        parts = module.split(".")
        for n in range(len(parts), 0, -1):
            place, rest = places.get(".".join(parts[:n])), ".".join(parts[n:])
            if place is not None:
                rest = _ORIGINAL_RESNET.get(rest, rest)
                names[module] = f"{place}.{rest}" if rest else place
                break
    return names
