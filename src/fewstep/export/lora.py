"""LoRA files in the diffusers form: what `load_lora_weights` reads, with our inference settings in the metadata.

Keys are `unet.<module>.lora_A.weight` and `.lora_B.weight`; the file's metadata holds diffusers' own
`lora_adapter_metadata` (rank, alpha, targets) and `fewstep`, a JSON record of the method, the settings to sample
with and the sha256 of the base's UNet weights.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.export.header import FILE, LoraHeader, check_fits, read_header
from fewstep.files import atomic_write
from fewstep.settings import Sampling
from fewstep.tensors import load_tensors, save_tensors


@dataclass(frozen=True)
class Lora:
    """A LoRA file in memory.

    Attributes:
        header: what the file says of itself: scales, base, how to sample with it.
        down, up: module name -> A [r, in, ...] and B [out, r, ...], fp32.
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
    dtype: torch.dtype = torch.float16,
) -> Path:
    """Write adapter weights (PEFT names: `<module>.lora_A.weight`) as one file; return its path.

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
        "unet.r": rank,
        "unet.lora_alpha": alpha,
        "unet.target_modules": sorted(targets),
        "unet.peft_type": "LORA",
    }
    metadata = {"format": "pt", "lora_adapter_metadata": json.dumps(adapter), "fewstep": json.dumps(record)}
    with atomic_write(file) as part:
        save_tensors(part, {f"unet.{name}": tensor.to(dtype) for name, tensor in weights.items()}, metadata)
    return file


def read_lora(path: Path | str) -> Lora:
    """Read a LoRA file or the folder that holds it.

    Raises:
        UserError: missing, truncated, not safetensors, or not a LoRA of a UNet in the diffusers form.
    """
    header = read_header(path)
    tensors = {name: tensor.float() for name, tensor in load_tensors(header.file).items()}
    down, up = ({m: tensors[f"unet.{m}.lora_{kind}.weight"] for m in header.down} for kind in "AB")
    return Lora(header, down, up)


def check_base(lora: Lora, network: nn.Module, fingerprint: str, path: Path | str) -> None:
    """Refuse a LoRA that was trained on another base or does not fit this one.

    Raises:
        UserError: naming the first thing that differs.
    """
    weights = {name: tuple(parameter.shape) for name, parameter in network.named_parameters()}
    check_fits(lora.header, weights, fingerprint, str(path))


@torch.no_grad()
def merge_lora(network: nn.Module, lora: Lora) -> None:
    """Add scale * B A to the weights of the layers, in place: sampling then costs nothing extra."""
    modules = dict(network.named_modules())
    for name, a in lora.down.items():
        weight: Any = modules[name].weight
        delta = lora.up[name].flatten(1) @ a.flatten(1)
        weight += (lora.header.scale[name] * delta).reshape(weight.shape).to(weight)
