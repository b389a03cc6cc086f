"""Tensors computed once and kept in a folder, under keys that identify all inputs of the computation."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from fewstep.common.errors import UserError
from fewstep.common.files import atomic_write, short_digest
from fewstep.common.safetensors_header import read_safetensors_header
from fewstep.common.tensors import load_tensors, save_tensors

TensorsT = TypeVar("TensorsT")
LAYOUT = "layout"
"""Metadata entry of a kept file: digest of the names, types and shapes of its tensors."""
TYPES = {
    **{torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"},
    **{torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL"},
}
"""Types of kept tensors, and their names in a header."""


def _layout(entries: Iterable[tuple[str, str, tuple[int, ...]]]) -> str:
    return short_digest(json.dumps(sorted(entries)))


def kept(folder: Path, key: str, read: Callable[[Path], TensorsT]) -> TensorsT | None:
    """Read the tensors of a key; a broken file is removed, and None is returned for it as for a missing one.

    Args:
        read: `load_tensors`, or `open_tensors` to map the file from disk, which reads its size and header alone.
    """
    path = folder / f"{key}.safetensors"
    if not path.exists():
        return None
    try:
        metadata, entries = read_safetensors_header(path)
        found = _layout((name, entry.dtype, entry.shape) for name, entry in entries.items())
        if metadata.get(LAYOUT, found) == found:  # files of older versions have no layout
            return read(path)
    except UserError:
        pass
    if path.is_dir():
        raise UserError(f"{path} is a folder, where a file is kept; remove it")
    path.unlink(missing_ok=True)
    return None


def keep(folder: Path, key: str, tensors: Mapping[str, Tensor]) -> None:
    """Write the tensors of a key."""
    layout = _layout((name, TYPES[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items())
    with atomic_write(folder / f"{key}.safetensors") as part:
        save_tensors(part, tensors, {LAYOUT: layout})


def cached(folder: Path, key: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return the tensors of a key, made and kept if the folder does not hold them."""
    found = kept(folder, key, load_tensors)
    if found is None:
        found = make()
        keep(folder, key, found)
    return found
