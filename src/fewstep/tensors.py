"""Tensors in safetensors files, and one line where they cannot be read or written."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fewstep.errors import UserError


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors as they are (contiguous copies on the CPU) to one safetensors file.

    The same tensors and metadata give the same bytes.

    Raises:
        OSError: the file cannot be written, or the disk is full.
    """
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        save_file(plain, path, metadata=dict(metadata) if metadata else None)
    except SafetensorError as error:  # its own name for a full disk
        raise OSError(str(error)) from error
    if metadata:
        _sort_metadata(path)


def _sort_metadata(path: Path) -> None:
    """Put the metadata in the order of its keys: the writer's own order differs from process to process."""
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
    """Fingerprint of named tensors: their names, types, shapes and bytes."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        plain = tensor.detach().cpu().contiguous()
        found.update(f"{name} {plain.dtype} {tuple(plain.shape)}".encode())
        found.update(plain.reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
