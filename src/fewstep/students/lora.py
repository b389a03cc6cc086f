"""LoRA weights: written in the diffusers form with our inference settings in the metadata, read in any spelling.

The keys that are written are `unet.<module>.lora_A.weight` and `.lora_B.weight` (`transformer.` for a transformer), as
diffusers' `load_lora_weights` reads them; the metadata holds diffusers' own `lora_adapter_metadata` (rank, alpha,
targets) and `fewstep`, a JSON record of the method, the settings to sample with and the sha256 of the base's weights.
A scale alpha / rank other than 1 is folded into B, since readers that ignore the metadata apply none.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.common.files import atomic_write
from fewstep.common.tensors import check_finite, load_tensors, save_tensors
from fewstep.diffusion.config import Sampling
from fewstep.students.lora_file import FILE, METADATA
from fewstep.students.lora_header import LoraHeader


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
        alpha: that the weights were trained with. The file's own alpha is its rank, and B has the scale.
        component: of the pipeline that they adapt, unet or transformer: the prefix of every key.

    Raises:
        UserError: the place cannot be written to, or a number is not finite.
    """
    file = path if path.suffix == ".safetensors" else path / FILE
    scale = alpha / rank
    record = {
        "base": base,
        "rank": rank,
        "alpha": rank if scale != 1 else alpha,
        **({"trained_alpha": alpha} if scale != 1 else {}),
        "sampling": sampling.model_dump(mode="json"),
        **notes,
    }
    adapter = {
        f"{component}.r": rank,
        f"{component}.lora_alpha": record["alpha"],
        f"{component}.target_modules": sorted(targets),
        f"{component}.peft_type": "LORA",
    }
    metadata = {"format": "pt", METADATA: json.dumps(adapter), "fewstep": json.dumps(record)}
    stored = {name: tensor.to(dtype) for name, tensor in weights.items()}
    if scale != 1:
        stored = {name: folded(x, scale) if name.endswith(".lora_B.weight") else x for name, x in stored.items()}
    with atomic_write(file) as part:
        save_tensors(part, {f"{component}.{name}": tensor for name, tensor in stored.items()}, metadata)
    return file


def folded(b: Tensor, scale: float) -> Tensor:
    """Return B times a scale: in its own dtype if no number is rounded there, else in fp32."""
    exact = b.float() * scale
    own = exact.to(b.dtype)
    return own if torch.equal(own.float(), exact) else exact


def trained_scale(header: LoraHeader) -> float | None:
    """Return the scale alpha / rank that `save_lora` has folded into B; None for any other file."""
    alpha, rank = header.record.get("trained_alpha"), header.record.get("rank")
    known = all(isinstance(number, int | float) and number > 0 for number in (alpha, rank))
    return float(alpha) / float(rank) if known and alpha and rank else None


def unfolded(b: Tensor, scale: float) -> Tensor:
    """Return B, fp32, as it was before `folded` multiplied it by a scale.

    Its numbers were fp16 then: rounding to fp16 removes the error of the product.
    """
    plain = (b.double() / scale).float()
    rounded = plain.half().float()
    return torch.where((rounded - plain).abs() <= plain.abs() * 2**-22, rounded, plain)


def stored_matrices(header: LoraHeader) -> dict[str, tuple[Tensor, Tensor]]:
    """Read A [r, in, ...] and B [out, r, ...] of every layer in the file's own dtype, by the base's module names.

    Args:
        header: a checked one (`lora_checks.check_lora`).

    Raises:
        UserError: the file is broken, or a number in it is not finite.
    """
    tensors = load_tensors(header.file)
    used = {key: tensors[key] for layer in header.layers.values() for key in layer.keys}
    check_finite(used, f"{header.file} cannot be used")
    pairs = {}
    for name, layer in header.layers.items():
        a, b = (used[key] for key in layer.keys)
        pairs[name] = a, torch.cat([b[start:stop] for start, stop in layer.rows]) if layer.rows else b
    return pairs


@torch.no_grad()
def merge_lora(network: nn.Module, header: LoraHeader, strength: float = 1.0) -> None:
    """Add strength * scale * B A, computed in fp32, to the weights of the layers, in place: sampling costs no more.

    Raises:
        UserError: as `stored_matrices`.
    """
    modules = dict(network.named_modules())
    for name, (a, b) in stored_matrices(header).items():
        weight: Any = modules[name].weight
        delta = b.float().flatten(1) @ a.float().flatten(1)
        weight += (strength * header.layers[name].scale * delta).reshape(weight.shape).to(weight)


@contextmanager
def lora_added(network: nn.Module, header: LoraHeader | None) -> Iterator[None]:
    """Merge a LoRA inside the block; the weights are the same bits afterwards. None changes nothing.

    Raises:
        UserError: as `stored_matrices`.
    """
    modules = dict(network.named_modules())
    weights: dict[str, Any] = {name: modules[name].weight for name in (header.layers if header else ())}
    before = {name: weight.detach().to("cpu", copy=True) for name, weight in weights.items()}
    try:
        if header:
            merge_lora(network, header)
        yield
    finally:
        with torch.no_grad():
            for name, weight in weights.items():
                weight.copy_(before[name])
