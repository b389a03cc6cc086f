"""Names of a UNet's layers in Stable Diffusion's original code (SGM)."""

from __future__ import annotations

import itertools
from collections.abc import Collection

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


def original_names(modules: Collection[str]) -> dict[str, str]:
    """Return layer of a diffusers UNet -> its name in Stable Diffusion's original code (also called SGM).

    There the blocks are one list a side: downsamplers have numbers of their own among `input_blocks`, upsamplers are
    inside the last of a level's `output_blocks`, after its attention if it has one.
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
