"""Tensors of safetensors files, memory-mapped, and rows that are spread over several files."""

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
"""safetensors' name of a dtype -> numpy's."""
MOST_OPEN = 128
"""Tensors that are mapped at a time; each holds a file descriptor, of which a process has about 1,000."""


@lru_cache(maxsize=MOST_OPEN)
def _mapped(path: Path, version: tuple[int, ...], entry: Entry) -> np.ndarray:
    """Map a tensor of the given version of a file, copy on write; it is closed after MOST_OPEN others."""
    return np.memmap(path, NUMPY[entry.dtype], "c", entry.start, entry.shape)


@dataclass(frozen=True)
class MappedTensor:
    """A tensor of a file, mapped when it is read."""

    path: Path
    version: tuple[int, ...]
    entry: Entry

    def __len__(self) -> int:
        return self.entry.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return math.prod(self.entry.shape) * self.dtype.itemsize

    @property
    def dtype(self) -> np.dtype:
        """numpy's dtype."""
        return np.dtype(NUMPY[self.entry.dtype])

    def array(self) -> np.ndarray:
        """Return the tensor, memory-mapped. Keep copies of its parts, not the array, which holds the file open."""
        if not math.prod(self.entry.shape):  # nothing to map
            return np.zeros(self.entry.shape, self.dtype)
        return np.asarray(_mapped(self.path, self.version, self.entry))


def open_tensors(path: Path) -> dict[str, MappedTensor]:
    """Return the tensors of a file without reading them.

    Raises:
        UserError: missing, truncated or of another format.
    """
    _, entries = read_safetensors_header(path)
    stat = path.stat()
    version = (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns)
    return {name: MappedTensor(path, version, entry) for name, entry in entries.items()}


def map_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file, memory-mapped for good, copy on write: processes share the pages.

    Raises:
        UserError: missing, truncated or of another format.
    """
    return {name: torch.from_numpy(tensor.array()) for name, tensor in open_tensors(path).items()}


def write_rows(path: Path, count: int, parts: Iterable[Mapping[str, Tensor]]) -> None:
    """Write tensors of `count` rows in parts, one part in memory at a time.

    The file is that of `tensors.save_tensors` for the concatenated parts, byte for byte. All tensors have one dtype.

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
                text = text.ljust(-(-len(text) // 8) * 8)  # as the library aligns tensors
                stream.write(len(text).to_bytes(8, "little") + text)
                starts = {name: start + stream.tell() for name, start in starts.items()}
            for name, values in rows.items():
                stream.seek(starts[name] + done * widths[name])
                stream.write(values.tobytes())
            done += len(next(iter(rows.values())))
    assert done == count, f"{done} rows written, {count} expected"


class Rows(Protocol):
    """Many tensors of one shape, read by index: a tensor, or `MappedRows`."""

    def __len__(self) -> int:
        """Return the number of rows."""

    def __getitem__(self, rows: Tensor) -> Tensor:
        """Return rows by index, int64 [B] -> [B, ...]."""

    @property
    def nbytes(self) -> int:
        """Bytes of all rows."""


class MappedRows:
    """Rows of several mapped tensors, read from disk when indexed.

    Args:
        numbers: of each part's rows among `count`, int64 [n] each; other rows are not stored. None for consecutive
            numbers.
    """

    def __init__(
        self, parts: Sequence[MappedTensor], numbers: Sequence[np.ndarray] | None = None, count: int = 0
    ) -> None:
        self._parts = list(parts)
        self._starts = np.cumsum([0, *map(len, parts)])
        self._count = int(self._starts[-1]) if numbers is None else count
        self._place: np.ndarray | None = None
        if numbers is not None:
            self._place = np.full(count, -1, dtype=np.int64)
            for start, rows in zip(self._starts, numbers):
                self._place[rows] = np.arange(start, start + len(rows))

    def __len__(self) -> int:
        return self._count

    @property
    def nbytes(self) -> int:
        """Bytes of the stored rows on disk, each once."""
        whole, rows = sum(part.nbytes for part in self._parts), max(1, int(self._starts[-1]))
        return whole if self._place is None else whole // rows * int((self._place >= 0).sum())

    def __getitem__(self, rows: Tensor) -> Tensor:
        """Return rows by index, int64 [B] -> [B, ...]; negative indices count from the end.

        Raises:
            IndexError: a row does not exist or is not stored.
        """
        return self._read(rows, None)

    def at(self, rows: Tensor, index: Tensor) -> Tensor:
        """Return one entry of each row, rows and index int64 [B] -> [B, ...]; only these entries are read.

        Raises:
            IndexError: there is no such row, or no such entry.
        """
        return self._read(rows, index.numpy())

    def _read(self, rows: Tensor, index: np.ndarray | None) -> Tensor:
        numbers = np.where(rows.numpy() < 0, rows.numpy() + len(self), rows.numpy())
        if len(numbers) and not 0 <= numbers.min() <= numbers.max() < len(self):
            raise IndexError(f"rows {rows.tolist()} are not within {len(self)}")
        if self._place is not None:
            given, numbers = numbers, self._place[numbers]
            if not self._parts or (numbers < 0).any():
                raise IndexError(f"rows {given[numbers < 0][:4].tolist()} are not stored")
        places = np.searchsorted(self._starts, numbers, side="right") - 1

        def read(place: int, here: np.ndarray) -> np.ndarray:
            array, own = self._parts[place].array(), numbers[here] - self._starts[place]
            taken: np.ndarray = array[own] if index is None else array[own, index[here]]
            return taken

        files = np.unique(places)
        if len(files) == 1:  # no second copy
            return torch.from_numpy(read(int(files[0]), np.arange(len(numbers))))
        first = self._parts[0]
        found = np.empty((len(numbers), *first.entry.shape[1 if index is None else 2 :]), first.dtype)
        for place in files:
            here = np.flatnonzero(places == place)
            found[here] = read(int(place), here)
        return torch.from_numpy(found)
