"""A LoRA in the spellings of other tools: the same matrices and scales under other names.

Every form has its alpha and rank, so that the scale alpha / rank of each layer is the same everywhere.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.backbones.pipeline_folder import PipelineFolder
from fewstep.backbones.single_file.sd_names import original_names
from fewstep.common.files import write_json
from fewstep.common.safetensors_header import Shape
from fewstep.common.tensors import save_tensors
from fewstep.students.lora import folded, stored_matrices
from fewstep.students.lora_file import FILE, METADATA, PEFT_CONFIG, PEFT_FILE
from fewstep.students.lora_header import LoraHeader
from fewstep.students.lora_keys import PEFT_PREFIX, original_places

KOHYA_PREFIX = "lora_unet_"


def matrices(lora: LoraHeader, shapes: Mapping[str, Shape]) -> dict[str, tuple[Tensor, Tensor]]:
    """Return A and B of every layer in their own dtype, with as many axes as the base's weight."""

    def shaped(x: Tensor, dims: int) -> Tensor:  # trainers write 1 x 1 convolutions as matrices, too
        return x.reshape(*x.shape, *[1] * (dims - x.dim())) if x.dim() < dims else x

    found = {}
    for name, (a, b) in stored_matrices(lora).items():
        dims = len(shapes[f"{name}.weight"])
        found[name] = shaped(a, dims), shaped(b, dims)
    return found


def targets_of(layers: Collection[str], every: Collection[str], usual: Sequence[str]) -> list[str] | str:
    """Return PEFT's target_modules: ends of names if they select exactly the adapted layers, else an expression.

    Args:
        layers: names of the adapted ones.
        every: names of all layers with weights.
        usual: ends of names to try.
    """
    ends = {end: {name for name in every if name == end or name.endswith(f".{end}")} for end in usual}
    taken = {end: names for end, names in ends.items() if names and names <= set(layers)}
    if set().union(*taken.values()) == set(layers):
        return sorted(taken)
    return "|".join(re.escape(name) for name in sorted(layers))


def adapter_config(lora: LoraHeader, every: Collection[str], usual: Sequence[str]) -> dict[str, Any]:
    """Return PEFT's config of an adapter: the most common rank and alpha, and those of the other layers by name."""
    ranks = {name: layer.a[0] for name, layer in lora.layers.items()}
    alphas = {name: layer.scale * layer.a[0] for name, layer in lora.layers.items()}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": _plain(alpha),
        "target_modules": targets_of(lora.layers, every, usual),
        "rank_pattern": {f"^{re.escape(name)}": r for name, r in ranks.items() if r != rank},
        "alpha_pattern": {f"^{re.escape(name)}": _plain(a) for name, a in alphas.items() if a != alpha},
    }


def _plain(value: float) -> float | int:
    return int(value) if value == int(value) else value


Pairs = Mapping[str, tuple[Tensor, Tensor]]


def write_diffusers(
    folder: Path, lora: LoraHeader, pairs: Pairs, config: Mapping[str, Any], component: str, record: str
) -> Path:
    """Write the form that diffusers' `load_lora_weights` reads, with its metadata; return the file.

    The scale is folded into B: this form has alpha in its metadata alone, which ComfyUI and diffusers before 0.35 do
    not read.
    """
    tensors = {}
    config = {**config, "lora_alpha": config["r"], "alpha_pattern": dict(config["rank_pattern"])}
    for name, (a, b) in pairs.items():
        tensors[f"{component}.{name}.lora_A.weight"] = a
        tensors[f"{component}.{name}.lora_B.weight"] = folded(b, lora.layers[name].scale)
    adapter = {f"{component}.{key}": value for key, value in config.items()}
    save_tensors(folder / FILE, tensors, {"format": "pt", METADATA: json.dumps(adapter), "fewstep": record})
    return folder / FILE


def write_peft(folder: Path, pairs: Pairs, config: Mapping[str, Any], record: str) -> Path:
    """Write the form that `PeftModel.from_pretrained(network, folder)` reads; return the file."""
    tensors = {}
    for name, (a, b) in pairs.items():
        tensors[f"{PEFT_PREFIX}{name}.lora_A.weight"], tensors[f"{PEFT_PREFIX}{name}.lora_B.weight"] = a, b
    save_tensors(folder / PEFT_FILE, tensors, {"format": "pt", "fewstep": record})
    more = {"inference_mode": True, "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": False}
    write_json(folder / PEFT_CONFIG, {**config, **more, "base_model_name_or_path": None, "task_type": None})
    return folder / PEFT_FILE


def kohya_layers(
    lora: LoraHeader, pairs: Pairs, shapes: Mapping[str, Shape], folder: PipelineFolder
) -> tuple[Pairs, dict[str, float]]:
    """Return A, B and alpha of each layer of kohya's form, by its key.

    Layers have the original code's names, those of Stable Diffusion 1.x and 2.x diffusers'. Where one layer there holds
    several of diffusers (queries, keys and values of a transformer), its A is theirs one below the other and its B is
    block-diagonal, of the sum of the ranks: the product is the same. Their scales are then folded into B.
    """
    every = [key.removesuffix(".weight") for key, shape in shapes.items() if key.endswith(".weight") and shape[1:]]
    places: Mapping[str, tuple[tuple[str, ...], bool]] = original_places(every)
    if folder.network == "unet":
        own = original_names(every) if folder.family.kind == "sdxl" else {name: name for name in every}
        places = {own[name]: ((name,), False) for name in pairs}
    found, alphas = {}, {}
    for place, (modules, swapped) in places.items():
        held = [pairs.get(module) for module in modules]
        if not any(held):
            continue
        key = KOHYA_PREFIX + place.replace(".", "_")
        if len(modules) == 1:
            a, b = pairs[modules[0]]
            alphas[key] = lora.layers[modules[0]].scale * len(a)
        else:
            a = torch.cat([pair[0] for pair in held if pair])
            parts = [
                a.new_zeros(shapes[f"{module}.weight"][0], 0)
                if pair is None
                else folded(pair[1], lora.layers[module].scale)
                for module, pair in zip(modules, held, strict=True)
            ]
            b = torch.block_diag(*parts)  # type: ignore[no-untyped-call]
            alphas[key] = float(len(a))
        found[key] = a, torch.cat(b.chunk(2)[::-1]) if swapped else b
    return found, alphas


def write_kohya(file: Path, pairs: Pairs, alphas: Mapping[str, float], config: Mapping[str, Any], record: str) -> Path:
    """Write kohya's form, with down, up and alpha for every layer by its key; return the file."""
    tensors = {}
    for key, (a, b) in pairs.items():
        tensors[f"{key}.lora_down.weight"], tensors[f"{key}.lora_up.weight"] = a, b
        tensors[f"{key}.alpha"] = torch.tensor(alphas[key], dtype=torch.float32)
    metadata = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(config["r"]),
        "ss_network_alpha": str(config["lora_alpha"]),
    }
    save_tensors(file, tensors, {"format": "pt", "fewstep": record, **metadata})
    return file
