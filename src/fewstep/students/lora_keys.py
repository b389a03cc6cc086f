"""The layers of a network in the spellings of LoRA files, resolved from the keys alone.

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

Any prefix may be combined with any ending and with either code's names of the layers. `.lora_A.default.weight` (an
adapter's name inside the key) and `.lora_A` (no `.weight`) are read too. Where the original code has one layer for
several of diffusers (queries, keys and values of a transformer), its A is that of each of them, and its B has theirs
row by row (`original_layers.yaml`).

`.alpha` beside A and B is a number: the scale of that layer is alpha / rank (diffusers 0.42 gives attention layers of a
kohya file the alpha that most layers have). Which underscores of a kohya name are dots does not follow from the name:
it is looked up among the layers of the base.

Refused, naming the key: files that adapt a text encoder too (applied in part, a LoRA is another model), other adapters
(LoKr, LoHa, DoRA, OFT, Tucker-decomposed convolutions), whole weights or biases beside the LoRA, and unknown spellings.
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
from fewstep.common.text import read_table

Part = Literal["A", "B", "alpha"]

PEFT_PREFIX = "base_model.model."
COMPONENTS = ("unet.", "transformer.")
"""Prefixes of keys of a whole pipeline: the denoiser's component."""
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
    **{f".lora_{side}.weight": ("", part) for side, part in _MATRICES},
    **{f".lora.{side}.weight": ("", part) for side, part in _MATRICES},
    **{f".lora_linear_layer.{side}.weight": ("", part) for side, part in _MATRICES},
    **{f".{k}.{side}.weight": (f".{v}", part) for k, v in _PROCESSOR_LAYERS.items() for side, part in _MATRICES},
}
"""The end of a key -> a suffix of the layer's name, and the part of the LoRA that the key holds."""
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


_TABLES = read_table(__file__, "original_layers.yaml")
_LAYERS = {
    family: {
        table.get("original", "") + name: tuple(table.get("diffusers", "") + own for own in layers.split())
        for table in tables
        for name, layers in table["layers"].items()
    }
    for family, tables in _TABLES.items()
}
"""Family -> layer of the original code -> layers of diffusers that hold it, in the order of its rows."""


@dataclass
class Keys:
    """The keys of one layer in a file.

    Attributes:
        share: layers whose rows B holds one below the other, this one included; empty where B is only this layer's.
        swapped: whether the halves of B's rows are in reverse order.
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
        plain = name.removeprefix(prefix)
        while not prefix and (start := next((start for start in _DOTTED_PREFIXES if plain.startswith(start)), "")):
            plain = plain.removeprefix(start)
        place = (flat if prefix else dotted).get(plain)
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


@dataclass(frozen=True)
class _Place:
    """The layer of a name in a file, or several layers that are one in the original code.

    Attributes:
        swapped: whether the original code has the halves of the rows in reverse order.
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
    """Map names in the original code of a transformer to the layers of diffusers, by the table of its family.

    A name is known if the network has all of its layers.
    """
    every = set(modules)
    table = next((_LAYERS[family] for family, tables in _TABLES.items() if tables[0]["known_by"] in every), {})
    numbers = sorted({int(number) for module in modules for number in re.findall(r"\.(\d+)\.", module)})
    lasts = [int(number) for module in modules for number in re.findall(r"^transformer_blocks\.(\d+)\.", module)]
    joint = table is _LAYERS["sd3"]
    found = {}
    for theirs, ours in table.items():
        for i in numbers if "{i}" in theirs else [0]:
            names = tuple(name.format(i=i) for name in ours)
            # where the original modulates by (shift, scale) and diffusers by (scale, shift)
            last = joint and names == (f"transformer_blocks.{max(lasts)}.norm1_context.linear",)
            if every.issuperset(names):
                found[theirs.format(i=i)] = _Place(names, last or names == ("norm_out.linear",))
    return found


def original_places(modules: Collection[str]) -> dict[str, tuple[tuple[str, ...], bool]]:
    """Return layer of the original code -> the layers that it holds, in the order of its rows, and whether the halves
    of its rows are in reverse order; every layer of the network is in one of them."""
    found = {name: (place.modules, place.swapped) for name, place in _transformer_names(modules).items()}
    held = {module for own, _ in found.values() for module in own}
    return found | {module: ((module,), False) for module in modules if module not in held}


def _read_key(key: str, file: Path) -> tuple[str, Part]:
    for mark, adapter in _OTHER_ADAPTERS.items():
        if mark in key:
            raise UserError(f"{file} is {adapter}: it holds {key!r}; only LoRAs are read", field="lora")
    if key.startswith(_TEXT_PREFIXES):
        raise UserError(
            f"{file} adapts a text encoder too: it holds {key!r}; give a LoRA of the denoiser alone", field="lora"
        )
    split = split_key(key)
    if split is None:
        raise UserError(f"{file} is not a LoRA of a denoiser in a known spelling: it holds {key!r}")
    return split
