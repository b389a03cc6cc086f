"""Which settings of a training step fit which GPU, on paper, for every network of a published size.

    python benchmarks/cards.py

Prints the table of docs/guide/scale.md. Weights, adapters and activations are counted on meta tensors of the real
networks (`benchmarks/scale.py`); encoders run before a step and are not counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from scale import RANK, SHAPES, Shape, on_paper, sample_holds
from sizes import PUBLISHED
from torch import Tensor, nn

from fewstep.backbones.base import numbered
from fewstep.backbones.families import FAMILIES, adapts
from fewstep.distillation.presets import ASIDE, BYTES_4BIT, GIB, LEARNS, MEMORY
from fewstep.training.offload import swapped_blocks
from fewstep.training.roles import add_adapter

SHORT = 3
"""Blocks of a shortened list."""
LEAST_RANK = 16
"""Rank of a plan where none with `RANK` fits."""


def pixart() -> nn.Module:
    """Return PixArt-Sigma's transformer."""
    from diffusers import PixArtTransformer2DModel

    return PixArtTransformer2DModel(sample_size=128, caption_channels=4096, use_additional_conditions=False)


def call_pixart(network: nn.Module, batch: int) -> Tensor:
    """Call it on a batch of 1024 x 1024 pixels."""
    x, text = torch.empty(batch, 4, 128, 128), torch.empty(batch, 300, 4096)
    more = {"resolution": None, "aspect_ratio": None}
    output: Tensor = network(x, text, torch.empty(batch), added_cond_kwargs=more, return_dict=False)[0]
    return output


def sana() -> nn.Module:
    """Return SANA 1.6B's transformer."""
    from diffusers import SanaTransformer2DModel

    return SanaTransformer2DModel()  # the class's defaults


def call_sana(network: nn.Module, batch: int) -> Tensor:
    """Call it on a batch of 1024 x 1024 pixels."""
    x, text = torch.empty(batch, 32, 32, 32), torch.empty(batch, 300, 2304)
    output: Tensor = network(x, text, torch.empty(batch), return_dict=False)[0]
    return output


NAMES = {
    "z_image": "Z-Image",
    "qwen_image": "Qwen-Image",
    "flux2": "FLUX.2 klein base 4B",
    "chroma": "Chroma1",
    "krea2": "Krea 2 Raw",
    "anima": "Anima",
}
MODELS = {
    **SHAPES,
    "PixArt-Sigma": Shape(pixart, call_pixart, "PixArtSigmaPipeline", 0, 0, True),
    "SANA 1.6B": Shape(sana, call_sana, "SanaPipeline", 0, 0, True),
    **{NAMES[key]: Shape(one.network, one.call, one.pipeline, 0, 0, True) for key, one in PUBLISHED.items()},
}


@dataclass(frozen=True)
class Sizes:
    """A network in numbers of weights.

    Attributes:
        matrices: of linear layers, which 4 bits apply to.
        resident: of the two largest slots and of what is outside of all blocks.
        adapter: of one rank.
        sample: bytes that a sample of a step holds, blocks recomputed.
    """

    weights: int
    matrices: int
    resident: int
    adapter: int
    sample: int


def shortened(shape: Shape, lengths: Mapping[str, int]) -> int:
    """Return the bytes of a sample in a step of a network whose lists of blocks are shortened to these lengths."""
    network = shape.network().requires_grad_(False)
    for name, length in lengths.items():
        setattr(network, name, getattr(network, name)[:length])
    add_adapter(network, "student", RANK, RANK, numbered(FAMILIES[shape.family].targets, network), 0)
    network.to(torch.bfloat16).enable_gradient_checkpointing()  # type: ignore[operator]
    return sample_holds(network, shape)


def sample_of(shape: Shape, network: nn.Module) -> int:
    """Return the bytes of a sample in a step, blocks recomputed.

    A list of equal blocks is shortened to `SHORT`, and the rest is extrapolated: each block keeps its inputs.
    """
    lists = {name: len(part) for name, part in network.named_children() if isinstance(part, nn.ModuleList)}
    whole = {name: length for name, length in lists.items() if length > SHORT + 1}
    if not whole:
        return shortened(shape, {})
    short = dict.fromkeys(whole, SHORT)
    first = shortened(shape, short)
    more = {name: shortened(shape, {**short, name: SHORT + 1}) - first for name in whole}
    return first + sum(more[name] * (length - SHORT) for name, length in whole.items())


def sizes_of(shape: Shape) -> Sizes:
    """Count a network."""
    with on_paper():
        network = shape.network()
        weights = sum(weight.numel() for weight in network.parameters())
        matrices = sum(part.weight.numel() for part in network.modules() if type(part) is nn.Linear)
        blocks = [sum(weight.numel() for weight in block.parameters()) for block in swapped_blocks(network)]
        targets = numbered(FAMILIES[shape.family].targets, network)
        adapted = [
            part.weight.shape
            for name, part in network.named_modules()
            if isinstance(part, (nn.Linear, nn.Conv2d)) and any(adapts(target, name) for target in targets)
        ]
        adapter = sum(shape[0] + shape[1:].numel() for shape in adapted)
        sample = sample_of(shape, network)
    return Sizes(weights, matrices, weights - sum(blocks) + 2 * max(blocks), adapter, sample)


def bases(one: Sizes) -> list[float]:
    """Return the GiB of frozen weights: in bf16, in 4 bits, and in bf16 with blocks in main memory."""
    narrow = BYTES_4BIT * one.matrices + 4 * (one.weights - one.matrices)
    return [size / GIB for size in (2 * one.weights, narrow, 2 * one.resident)]


def fitting(one: Sizes, base: float, memory: int) -> str:
    """Return the samples of the largest micro-batch on a GPU of `memory` GB, with the rank unless it is `RANK`."""
    for rank in (RANK, LEAST_RANK):
        left = memory * 1e9 / GIB - ASIDE - base - LEARNS * rank * one.adapter / GIB
        count = int(left / (one.sample / GIB))
        if count > 0:
            return f"{count}" if rank == RANK else f"{count} (rank {rank})"
    return "-"


def main() -> None:
    """Print the table."""
    print("| | bf16, GiB | 4bit | offload | a sample | " + " | ".join(f"{memory} GB" for memory in MEMORY) + " |")
    print("| --- " * (5 + len(MEMORY)) + "|")
    for name, shape in MODELS.items():
        one = sizes_of(shape)
        kept = bases(one)
        cells = [" / ".join(fitting(one, base, memory) for base in kept) for memory in MEMORY]
        counted = [*(f"{base:.1f}" for base in kept), f"{one.sample / GIB:.2f}"]
        print(f"| {name} | " + " | ".join([*counted, *cells]) + " |", flush=True)


if __name__ == "__main__":
    main()
