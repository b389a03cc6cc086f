"""What a LoRA file says of itself, read from its header alone: refusals need neither torch nor the weights."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewstep.backbones.folder import PipelineFolder
from fewstep.config import validate
from fewstep.errors import UserError
from fewstep.settings import Sampling

FILE = "pytorch_lora_weights.safetensors"
"""The file name that diffusers looks for in a folder."""
Shape = tuple[int, ...]


def read_safetensors_header(path: Path) -> tuple[dict[str, str], dict[str, Shape]]:
    """The metadata and the shape of every tensor of a safetensors file.

    Raises:
        UserError: missing, truncated or of another format.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > size - 8:
                raise ValueError("its header is cut off")
            header = json.loads(stream.read(length))
        metadata = header.pop("__metadata__", {})
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        if 8 + length + end != size:
            raise ValueError(f"it has {size} bytes, its header promises {8 + length + end}")
        return metadata, {name: tuple(entry["shape"]) for name, entry in header.items()}
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise UserError(f"{path} is not a whole safetensors file: {error}") from error


@dataclass(frozen=True)
class LoraHeader:
    """A LoRA file without its weights.

    Attributes:
        file: where it lies.
        down, up: module name -> shape of A [r, in, ...] and B [out, r, ...].
        scale: module name -> alpha / rank (alpha / sqrt(rank) for a rank-stabilised one).
        base: sha256 of the UNet weights it was trained on, or "" if the file does not say.
        sampling: how to sample with it; None if the file does not say.
        notes: the whole `fewstep` record.
    """

    file: Path
    down: dict[str, Shape]
    up: dict[str, Shape]
    scale: dict[str, float]
    base: str
    sampling: Sampling | None
    notes: dict[str, Any]


def _record(metadata: Mapping[str, str], key: str, file: Path) -> dict[str, Any]:
    try:
        record = json.loads(metadata.get(key, "{}"))
    except (json.JSONDecodeError, TypeError) as error:
        raise UserError(f"{file} has broken metadata: {error}") from error
    if not isinstance(record, dict):
        raise UserError(f"{file} has broken metadata: {key} is no mapping")
    return record


def _scales(adapter: Mapping[str, Any], ranks: Mapping[str, int], file: Path) -> dict[str, float]:
    """Scale of each module, by PEFT's rules; 1 where the file does not say."""
    patterns: dict[str, Any] = adapter.get("unet.alpha_pattern") or {}
    scales = {}
    try:
        for module, rank in ranks.items():
            named = (a for key, a in patterns.items() if re.match(rf"(.*\.)?({key})$", module))
            alpha = float(next(named, adapter.get("unet.lora_alpha", rank)))
            scales[module] = alpha / (math.sqrt(rank) if adapter.get("unet.use_rslora") else rank)
    except (TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise UserError(f"{file} has broken metadata: {error}") from error
    return scales


def read_header(path: Path | str) -> LoraHeader:
    """Read the header of a LoRA file, or of the one in a folder.

    Raises:
        UserError: missing, truncated, not safetensors, or not a LoRA of a UNet in the diffusers form.
    """
    path = Path(path)
    file = path / FILE if path.is_dir() else path
    if (path / "model_index.json").is_file():
        raise UserError(f"lora = {str(path)!r} is a whole pipeline; give it as the teacher, with lora = 'none'")
    if not file.is_file():
        raise UserError(f"lora = {str(path)!r} does not exist or holds no {FILE}")
    if file.suffix != ".safetensors":
        raise UserError(f"lora = {str(path)!r} is not a .safetensors file; pickled weights are never read")
    metadata, shapes = read_safetensors_header(file)
    down: dict[str, Shape] = {}
    up: dict[str, Shape] = {}
    for name, shape in shapes.items():
        module, dot, kind = name.removeprefix("unet.").rpartition(".lora_")
        if not name.startswith("unet.") or not dot or kind not in ("A.weight", "B.weight") or len(shape) < 2:
            raise UserError(f"{file} is not a LoRA of a UNet in the diffusers form: it holds {name!r}")
        (down if kind == "A.weight" else up)[module] = shape
    if not down or set(down) != set(up):
        raise UserError(f"{file} is not a whole LoRA: it holds {len(down)} A and {len(up)} B matrices")
    for module, a in down.items():
        if up[module][1] != a[0] or math.prod(up[module][2:]) != 1:
            raise UserError(f"{file} is not a whole LoRA: A {a} and B {up[module]} of {module} do not fit")
    notes = _record(metadata, "fewstep", file)
    scale = _scales(_record(metadata, "lora_adapter_metadata", file), {m: a[0] for m, a in down.items()}, file)
    sampling = validate(Sampling, notes["sampling"]) if isinstance(notes.get("sampling"), dict) else None
    return LoraHeader(file, down, up, scale, str(notes.get("base") or ""), sampling, notes)


def check_fits(header: LoraHeader, weights: Mapping[str, Shape], fingerprint: str, name: str) -> None:
    """Refuse a LoRA that was trained on another base or does not fit this one.

    Args:
        header: the LoRA.
        weights: shapes of the base's UNet, by parameter name.
        fingerprint: sha256 of the base's UNet weights.
        name: what the user called the LoRA.

    Raises:
        UserError: naming the first thing that differs.
    """
    if header.base and header.base != fingerprint:
        raise UserError(
            f"lora = {name!r} was trained on another base (sha256 {header.base[:12]}, this one {fingerprint[:12]})"
        )
    for module, a in header.down.items():
        shape = weights.get(f"{module}.weight")
        if shape is None:
            raise UserError(f"lora = {name!r} is for another base: this one has no layer {module}")
        want = (header.up[module][0], *a[1:])
        if tuple(shape) != want:
            raise UserError(f"lora = {name!r} is for another base: {module} is {tuple(shape)}, not {want}")


def check_lora(path: Path | str, folder: PipelineFolder) -> LoraHeader:
    """Read a LoRA's header and refuse it if it does not belong to the pipeline folder; takes milliseconds.

    Raises:
        UserError: as `read_header` and `check_fits`.
    """
    header = read_header(path)
    weights: dict[str, Shape] = {}
    for file in sorted((folder.path / "unet").glob("*.safetensors")):
        weights |= read_safetensors_header(file)[1]
    check_fits(header, weights, folder.fingerprint("unet") if header.base else "", str(path))
    return header
