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
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from fewstep.errors import UserError
from fewstep.files import atomic_write
from fewstep.settings import Sampling
from fewstep.training.checkpoint import load_tensors, save_tensors

FILE = "pytorch_lora_weights.safetensors"
"""The file name that diffusers looks for in a folder."""


@dataclass(frozen=True)
class Lora:
    """A LoRA file in memory.

    Attributes:
        down, up: module name -> A [r, in, ...] and B [out, r, ...], fp32.
        scale: alpha / rank.
        base: sha256 of the UNet weights it was trained on, or "" if the file does not say.
        sampling: how to sample with it; None if the file does not say.
        notes: the whole `fewstep` record.
    """

    down: dict[str, Tensor]
    up: dict[str, Tensor]
    scale: float
    base: str
    sampling: Sampling | None
    notes: dict[str, Any]


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
    record = {"base": base, "rank": rank, "alpha": alpha, "sampling": sampling.model_dump(mode="json"), **notes}
    adapter = {"unet.r": rank, "unet.lora_alpha": alpha, "unet.target_modules": sorted(targets), "unet.peft_type": "LORA"}
    metadata = {"format": "pt", "lora_adapter_metadata": json.dumps(adapter), "fewstep": json.dumps(record)}
    with atomic_write(file) as part:
        save_tensors(part, {f"unet.{name}": tensor.to(dtype) for name, tensor in weights.items()}, metadata)
    return file


def read_lora(path: Path | str) -> Lora:
    """Read a LoRA file or the folder that holds it.

    Raises:
        UserError: missing, truncated, not safetensors, or not a LoRA of a UNet in the diffusers form.
    """
    path = Path(path)
    file = path / FILE if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"lora = {str(path)!r} does not exist or holds no {FILE}")
    if file.suffix != ".safetensors":
        raise UserError(f"lora = {str(path)!r} is not a .safetensors file; pickled weights are never read")
    tensors = load_tensors(file)
    try:
        with safe_open(file, framework="pt") as stream:
            metadata = stream.metadata() or {}
        notes = json.loads(metadata.get("fewstep", "{}"))
        adapter = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    except (SafetensorError, json.JSONDecodeError) as error:
        raise UserError(f"{file} has broken metadata: {error}") from error
    down, up = {}, {}
    for name, tensor in tensors.items():
        module, dot, kind = name.removeprefix("unet.").rpartition(".lora_")
        if not name.startswith("unet.") or not dot or kind not in ("A.weight", "B.weight"):
            raise UserError(f"{file} is not a LoRA of a UNet in the diffusers form: it holds {name!r}")
        (down if kind == "A.weight" else up)[module] = tensor.float()
    if not down or set(down) != set(up):
        raise UserError(f"{file} is not a whole LoRA: it holds {len(down)} A and {len(up)} B matrices")
    rank = next(iter(down.values())).shape[0]
    alpha = float(adapter.get("unet.lora_alpha", rank))
    sampling = Sampling.model_validate(notes["sampling"]) if "sampling" in notes else None
    return Lora(down, up, alpha / rank, str(notes.get("base", "")), sampling, notes)


def check_base(lora: Lora, network: nn.Module, fingerprint: str, path: Path | str) -> None:
    """Refuse a LoRA that was trained on another base or does not fit this one.

    Raises:
        UserError: naming the first thing that differs.
    """
    if lora.base and lora.base != fingerprint:
        raise UserError(
            f"lora = {str(path)!r} was trained on another base (sha256 {lora.base[:12]}, this one {fingerprint[:12]})"
        )
    modules = dict(network.named_modules())
    for name, a in lora.down.items():
        layer = modules.get(name)
        weight = getattr(layer, "weight", None)
        if weight is None:
            raise UserError(f"lora = {str(path)!r} is for another base: this one has no layer {name}")
        want = (lora.up[name].shape[0], a.shape[1])
        if tuple(weight.shape[:2]) != want:
            raise UserError(f"lora = {str(path)!r} is for another base: {name} is {tuple(weight.shape[:2])}, not {want}")


@torch.no_grad()
def merge_lora(network: nn.Module, lora: Lora) -> None:
    """Add scale * B A to the weights of the layers, in place: sampling then costs nothing extra."""
    modules = dict(network.named_modules())
    for name, a in lora.down.items():
        weight: Any = modules[name].weight
        delta = lora.up[name].flatten(1) @ a.flatten(1)
        weight += lora.scale * delta.reshape(weight.shape).to(weight)
