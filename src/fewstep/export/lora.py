"""LoRA files: written in the diffusers form with our inference settings in the metadata, read in any spelling.

The keys that are written are `unet.<module>.lora_A.weight` and `.lora_B.weight` (`transformer.` for a transformer), as
diffusers' `load_lora_weights` reads them; the metadata holds diffusers' own `lora_adapter_metadata` (rank, alpha,
targets) and `fewstep`, a JSON record of the method, the settings to sample with and the sha256 of the base's weights.
What is read is told in `export.spellings`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.export.header import FILE, METADATA, LoraHeader
from fewstep.files import atomic_write
from fewstep.settings import Sampling
from fewstep.tensors import load_tensors, save_tensors


@dataclass(frozen=True)
class Lora:
    """A LoRA file in memory.

    Attributes:
        header: what the file says of itself: scales, base, how to sample with it.
        down, up: module name in the base -> A [r, in, ...] and B [out, r, ...], fp32.
    """

    header: LoraHeader
    down: dict[str, Tensor]
    up: dict[str, Tensor]

    @property
    def base(self) -> str:
        """sha256 of the UNet weights it was trained on, or "" if the file does not say."""
        return self.header.base

    @property
    def sampling(self) -> Sampling | None:
        """How to sample with it; None if the file does not say."""
        return self.header.sampling


def save_lora(
    path: Path,
    weights: Mapping[str, Tensor],
    *,
    rank: int,
    alpha: float,
    targets: list[str],
    base: str,
    sampling: Sampling,
    notes: Mapping[str, Any],
    component: str = "unet",
    dtype: torch.dtype = torch.float16,
) -> Path:
    """Write adapter weights (PEFT names: `<module>.lora_A.weight`) as one file; return its path.

    Args:
        component: of the pipeline that they adapt, unet or transformer: what every key begins with.

    Raises:
        UserError: the place cannot be written to.
    """
    file = path if path.suffix == ".safetensors" else path / FILE
    record = {
        "base": base,
        "rank": rank,
        "alpha": alpha,
        "sampling": sampling.model_dump(mode="json"),
        **notes,
    }
    adapter = {
        f"{component}.r": rank,
        f"{component}.lora_alpha": alpha,
        f"{component}.target_modules": sorted(targets),
        f"{component}.peft_type": "LORA",
    }
    metadata = {"format": "pt", METADATA: json.dumps(adapter), "fewstep": json.dumps(record)}
    with atomic_write(file) as part:
        save_tensors(part, {f"{component}.{name}": tensor.to(dtype) for name, tensor in weights.items()}, metadata)
    return file


def read_lora(header: LoraHeader) -> Lora:
    """Read the weights of a LoRA whose header was found good (`header.check_lora`).

    Raises:
        UserError: the file is not whole.
    """
    tensors = load_tensors(header.file)
    down, up = ({name: tensors[layer.keys[i]].float() for name, layer in header.layers.items()} for i in (0, 1))
    return Lora(header, down, up)


@torch.no_grad()
def merge_lora(network: nn.Module, lora: Lora) -> None:
    """Add scale * B A to the weights of the layers, in place: sampling then costs nothing extra."""
    modules = dict(network.named_modules())
    for name, a in lora.down.items():
        weight: Any = modules[name].weight
        delta = lora.up[name].flatten(1) @ a.flatten(1)
        weight += (lora.header.layers[name].scale * delta).reshape(weight.shape).to(weight)
