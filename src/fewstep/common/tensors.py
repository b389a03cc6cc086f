"""Reading and writing tensors in safetensors files."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fewstep.common.errors import NotFiniteError, UserError
from fewstep.common.files import final_path


def finite(tensor: Tensor) -> bool:
    """Return whether all numbers of a tensor are finite; synchronizes with its device."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    values = tensor.detach()
    if values.element_size() == 1:  # torch computes nothing in one-byte floating types
        values = values.half()
    least, most = torch.aminmax(values)  # propagates nan, and allocates nothing of the tensor's size
    return math.isfinite(least) and math.isfinite(most)


def check_finite(tensors: Mapping[str, Tensor], what: str) -> None:
    """Refuse tensors with numbers that are not finite.

    Args:
        what: the start of the message, such as "FILE was not written".

    Raises:
        NotFiniteError: naming the first such tensor.
    """
    for name, tensor in tensors.items():
        if not finite(tensor):
            kind = str(tensor.dtype).removeprefix("torch.")
            raise NotFiniteError(f"{what}: {name} ({kind}) holds numbers that are not finite")


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors as they are (contiguous copies on the CPU) to one safetensors file.

    The same tensors and metadata give the same bytes.

    Raises:
        UserError: a number is not finite.
        OSError: the file cannot be written, or the disk is full.
    """
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    check_finite(plain, f"{final_path(path)} was not written")
    try:
        save_file(plain, path, metadata=dict(metadata) if metadata else None)
    except SafetensorError as error:  # raised for a full disk as well
        raise OSError(str(error)) from error
    if metadata:
        _sort_metadata(path)


def _sort_metadata(path: Path) -> None:
    """Sort the metadata by key: the writer's order differs from process to process."""
    with path.open("r+b") as stream:
        length = int.from_bytes(stream.read(8), "little")
        text = stream.read(length)
        header = json.loads(text)
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        ordered = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(length)
        if len(ordered) == length:
            stream.seek(8)
            stream.write(ordered)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        UserError: missing, truncated or of another format.
    """
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist") from error
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a whole safetensors file: {error}") from error
    return tensors


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Return a fingerprint of named tensors: names, dtypes, shapes and bytes."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        plain = tensor.detach().cpu().contiguous()
        found.update(f"{name} {plain.dtype} {tuple(plain.shape)}".encode())
        found.update(plain.reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
