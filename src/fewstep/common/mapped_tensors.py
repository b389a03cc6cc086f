"""Tensors of safetensors files that are read from disk as they are touched, and rows that lie in many of them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from fewstep.common.files import final_path
from fewstep.common.safetensors_header import Entry, read_safetensors_header
from fewstep.common.tensors import check_finite

NUMPY = {"I64": np.int64, "F64": np.float64, "F32": np.float32, "F16": np.float16}
"""safetensors' name of a type -> numpy's."""
MOST_OPEN = 128
"""Files that are open at a time, of any number that is read from: systems allow a process about 1,000."""


@lru_cache(maxsize=MOST_OPEN)
def _opened(path: Path, version: tuple[int, ...]) -> np.ndarray:
    """The bytes of a file, those of its `version`; it is closed when nothing of it is in use and others were opened."""
    return np.memmap(path, np.uint8, "c")


@dataclass(frozen=True)
class MappedTensor:
    """A tensor of a file, which is open while it is read."""

    path: Path
    version: tuple[int, ...]
    entry: Entry

    def __len__(self) -> int:
        return self.entry.shape[0]

    @property
    def kind(self) -> np.dtype:
        """Its type."""
        return np.dtype(NUMPY[self.entry.dtype])

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return math.prod(self.entry.shape) * self.kind.itemsize

    def array(self) -> np.ndarray:
        """The tensor, mapped into memory; what is written to it stays there. Keep what you take of it, not itself."""
        start = self.entry.start
        taken = np.asarray(_opened(self.path, self.version)[start : start + self.nbytes])
        return taken.view(self.kind).reshape(self.entry.shape)


def open_tensors(path: Path) -> dict[str, MappedTensor]:
    """The tensors of a file, none of them read yet.

    Raises:
        UserError: missing, truncated or of another format.
    """
    _, entries = read_safetensors_header(path)
    told = path.stat()
    version = (told.st_dev, told.st_ino, told.st_size, told.st_mtime_ns)
    return {name: MappedTensor(path, version, entry) for name, entry in entries.items()}


def map_tensors(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a file, mapped into memory for good; what is written to them stays in memory.

    Raises:
        UserError: missing, truncated or of another format.
    """
    return {name: tensor.array() for name, tensor in open_tensors(path).items()}


def write_rows(path: Path, count: int, parts: Iterable[Mapping[str, Tensor]]) -> None:
    """Write tensors of `count` rows that come in parts, one below the other, as `tensors.save_tensors` would whole.

    One part at a time is in memory. All tensors are of one type.

    Raises:
        UserError: a number is not finite.
        OSError: the file cannot be written, or the disk is full.
    """
    widths: dict[str, int] = {}
    starts: dict[str, int] = {}
    done = 0
    with path.open("wb") as stream:
        for part in parts:
            check_finite(part, f"{final_path(path)} was not written")
            rows = {name: part[name].detach().cpu().contiguous().numpy() for name in sorted(part)}
            if not starts:
                header, end = {}, 0
                for name, values in rows.items():
                    kind = next(kind for kind, known in NUMPY.items() if values.dtype == known)
                    widths[name] = math.prod(values.shape[1:]) * values.itemsize
                    starts[name], end = end, end + count * widths[name]
                    shape = [count, *values.shape[1:]]
                    header[name] = {"dtype": kind, "shape": shape, "data_offsets": [starts[name], end]}
                text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
                text = text.ljust(-(-len(text) // 8) * 8)  # tensors start at a multiple of 8, as the library's do
                stream.write(len(text).to_bytes(8, "little") + text)
                starts = {name: start + stream.tell() for name, start in starts.items()}
            for name, values in rows.items():
                stream.seek(starts[name] + done * widths[name])
                stream.write(values.tobytes())
            done += len(next(iter(rows.values())))
    assert done == count, f"{done} rows came for {count}"


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

    def __init__(self, parts: Sequence[MappedTensor]) -> None:
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
        return self._taken(rows, None)

    def at(self, rows: Tensor, index: Tensor) -> Tensor:
        """One entry of each row, rows and index int64 [B] -> [B, ...]; no more of a row is read.

        Raises:
            IndexError: there is no such row, or no such entry.
        """
        return self._taken(rows, index.numpy())

    def _taken(self, rows: Tensor, index: np.ndarray | None) -> Tensor:
        asked = rows.numpy()
        numbers = np.where(asked < 0, asked + len(self), asked)
        if len(numbers) and not 0 <= numbers.min() <= numbers.max() < len(self):
            raise IndexError(f"rows {asked.tolist()} are not within {len(self)}")
        first = self._parts[0]
        found = np.empty((len(numbers), *first.entry.shape[1 if index is None else 2 :]), first.kind)
        places = np.searchsorted(self._starts, numbers, side="right") - 1
        for place in np.unique(places):
            here = places == place
            array, own = self._parts[place].array(), numbers[here] - self._starts[place]
            found[here] = array[own] if index is None else array[own, index[here]]
        return torch.from_numpy(found)
