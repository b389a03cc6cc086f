"""Tensors of a safetensors file as arrays that are read from disk as they are touched."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from fewstep.tensor_header import read_safetensors_header

NUMPY = {"I64": np.int64, "F64": np.float64, "F32": np.float32, "F16": np.float16}
"""safetensors' name of a type -> numpy's."""


def map_tensors(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a file, mapped into memory; what is written to them stays in memory.

    Raises:
        UserError: missing, truncated or of another format.
    """
    _, entries = read_safetensors_header(path)
    whole = np.memmap(path, np.uint8, "c")
    arrays = {}
    for name, entry in entries.items():
        kind = np.dtype(NUMPY[entry.dtype])
        stop = entry.start + math.prod(entry.shape) * kind.itemsize
        arrays[name] = np.asarray(whole[entry.start : stop]).view(kind).reshape(entry.shape)
    return arrays
