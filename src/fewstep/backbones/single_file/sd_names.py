"""Names of a UNet's layers in Stable Diffusion's original code (SGM)."""

from __future__ import annotations

import itertools
from collections.abc import Collection

from fewstep.common.text import read_table

NAMES: dict[str, dict[str, str]] = read_table(__file__)
"""Part of a pipeline -> layer of diffusers or transformers -> its name in the original code."""


def original_names(modules: Collection[str]) -> dict[str, str]:
    """Return layer of a diffusers UNet -> its name in Stable Diffusion's original code (also called SGM).

    There the blocks are one list a side: downsamplers have numbers of their own among `input_blocks`, upsamplers are
    inside the last of a level's `output_blocks`, after its attention if it has one.
    """
    prefixes = {".".join(parts[:n]) for parts in (m.split(".") for m in modules) for n in range(1, len(parts) + 1)}

    def children(prefix: str) -> range:
        return range(next(i for i in itertools.count() if f"{prefix}.{i}" not in prefixes))

    places = dict(NAMES["unet"])
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
                rest = NAMES["unet_resnet"].get(rest, rest)
                names[module] = f"{place}.{rest}" if rest else place
                break
    return names
