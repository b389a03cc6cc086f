"""Tensors of safetensors files that are read from disk as they are touched, and rows that lie in many of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

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


class Rows(Protocol):
    """Many tensors of one shape, asked for by number: a tensor, or something that reads them when they are."""

    def __len__(self) -> int:
        """How many."""
        ...

    def __getitem__(self, rows: Tensor) -> Tensor:
        """Those of the given numbers, int64 [B] -> [B, ...]."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes of all."""
        ...


class MappedRows:
    """Rows of several arrays, one below the other, read from disk as they are asked for."""

    def __init__(self, parts: Sequence[np.ndarray]) -> None:
        self._parts = list(parts)
        self._starts = np.cumsum([0, *map(len, parts)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def nbytes(self) -> int:
        """Bytes of all rows, on disk."""
        return sum(part.nbytes for part in self._parts)

    def __getitem__(self, rows: Tensor) -> Tensor:
        """Rows by number, int64 [B] -> [B, ...]; negative ones count from the end.

        Raises:
            IndexError: there is no such row.
        """
        asked = rows.numpy()
        numbers = np.where(asked < 0, asked + len(self), asked)
        if len(numbers) and not 0 <= numbers.min() <= numbers.max() < len(self):
            raise IndexError(f"rows {asked.tolist()} are not within {len(self)}")
        first = self._parts[0]
        found = np.empty((len(numbers), *first.shape[1:]), first.dtype)
        places = np.searchsorted(self._starts, numbers, side="right") - 1
        for place in np.unique(places):
            here = places == place
            found[here] = self._parts[place][numbers[here] - self._starts[place]]
        return torch.from_numpy(found)
