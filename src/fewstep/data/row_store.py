"""Rows of tensors that are computed once, in any order and by any run, and read from disk by number.

A store is a folder of safetensors files; each holds some rows and, as `rows`, their numbers. Runs that share a store
compute only what none of them has: under a lock, one launch at a time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from fewstep.common import distributed as processes
from fewstep.common.distributed import fail_together
from fewstep.common.errors import UserError
from fewstep.common.files import atomic_write, file_lock, sweep
from fewstep.common.mapped_tensors import MappedRows, MappedTensor, open_tensors
from fewstep.common.tensors import save_tensors

ROWS = "rows"
"""The tensor that numbers the rows of a file, int64 [n]."""


@dataclass(frozen=True)
class Batches:
    """How `count` rows are computed where all are: chunk by chunk, at most `batch` of a chunk in one call of a network.

    Kernels choose their blocking by the size of a batch, so that a row has the same bits only in a batch of the same
    size; its place in the batch and the other rows do not matter. A part of the rows is therefore computed in batches
    of the sizes that all rows would have been in.
    """

    count: int
    batch: int
    chunk: int

    def sizes(self) -> np.ndarray:
        """The size of the batch that each row is computed in, int64 [count]."""
        row = np.arange(self.count)
        start = row // self.chunk * self.chunk
        length = np.minimum(self.chunk, self.count - start)
        sizes: np.ndarray = np.minimum(self.batch, length - (row - start) // self.batch * self.batch)
        return sizes

    def lists(self, wanted: np.ndarray, stored: np.ndarray) -> list[np.ndarray]:
        """The rows of each call: those wanted and not stored, with others where a batch would not be full."""
        lacking = np.setdiff1d(wanted, stored)
        sizes, calls = self.sizes(), list[np.ndarray]()
        for size in np.unique(sizes[lacking])[::-1]:
            own = lacking[sizes[lacking] == size]
            short = -len(own) % size
            alike = np.flatnonzero(sizes == size)
            fill = np.setdiff1d(alike, np.union1d(own, stored))[:short]
            more = np.setdiff1d(alike, np.union1d(own, fill))[: short - len(fill)]
            rows = np.sort(np.concatenate([own, fill, more]))
            most = max(1, self.chunk // size) * size if size == self.batch else size
            calls += [rows[start : start + most] for start in range(0, len(rows), most)]
        return calls


class StoredRows:
    """Some of `count` rows of one tensor, by number (`mapped.Rows`)."""

    def __init__(self, count: int, parts: Sequence[tuple[np.ndarray, MappedTensor]]) -> None:
        self._count = count
        self._place = np.full(count, -1, dtype=np.int64)
        start = 0
        for rows, _ in parts:
            self._place[rows] = np.arange(start, start + len(rows))
            start += len(rows)
        self._held = MappedRows([part for _, part in parts]) if parts else None

    def __len__(self) -> int:
        return self._count

    @property
    def nbytes(self) -> int:
        """Bytes of all rows that are stored, each once."""
        stored = int((self._place >= 0).sum())
        return 0 if self._held is None else self._held.nbytes // len(self._held) * stored

    def __getitem__(self, rows: Tensor) -> Tensor:
        """Rows by number, int64 [B] -> [B, ...]; negative ones count from the end.

        Raises:
            IndexError: there is no such row, or it is not stored.
        """
        asked = rows.numpy()
        numbers = np.where(asked < 0, asked + self._count, asked)
        if len(numbers) and not 0 <= numbers.min() <= numbers.max() < self._count:
            raise IndexError(f"rows {asked.tolist()} are not within {self._count}")
        place = self._place[numbers]
        if self._held is None or (len(place) and place.min() < 0):
            raise IndexError(f"rows {numbers[place < 0][:4].tolist()} are not stored")
        return self._held[torch.from_numpy(place)]


def _parts(place: Path) -> list[tuple[np.ndarray, dict[str, MappedTensor]]]:
    """Return the files of a store, and remove broken ones."""
    found = []
    for path in sorted(place.glob("*.safetensors")):
        try:
            tensors = open_tensors(path)
            found.append((np.array(tensors.pop(ROWS).array()), tensors))
        except (UserError, KeyError):
            path.unlink(missing_ok=True)
    return found


def _numbers(place: Path) -> np.ndarray:
    parts = _parts(place)
    return np.unique(np.concatenate([rows for rows, _ in parts])) if parts else np.zeros(0, dtype=np.int64)


def lacking(place: Path, wanted: np.ndarray) -> int:
    """Count the wanted rows that a store lacks."""
    return len(np.setdiff1d(wanted, _numbers(place)))


def keep_rows(place: Path, rows: np.ndarray, tensors: Mapping[str, Tensor]) -> None:
    """Store rows, float or integer tensors [n, ...] each, in one file."""
    name = hashlib.sha256(rows.tobytes()).hexdigest()[:16]
    with atomic_write(place / f"{int(rows[0]):08d}-{name}.safetensors") as part:
        save_tensors(part, {ROWS: torch.from_numpy(rows), **tensors})


@contextmanager
def _one_launch(place: Path) -> Iterator[None]:
    """Keep other launches out of a store; all processes of this one enter."""
    with ExitStack() as held:
        with fail_together():
            if processes.is_main():
                held.enter_context(file_lock(place / ".lock", f"waiting for another run that encodes into {place}"))
                sweep(place)
        yield
        with fail_together():  # none of them reads on before all have written
            pass


def fill(
    place: Path,
    wanted: np.ndarray,
    batches: Batches,
    make: Callable[[Sequence[int]], Mapping[str, Tensor]],
    title: str,
    unit: str,
    turn: int = 0,
) -> None:
    """Compute and store the wanted rows that the store lacks. The processes of a launch share them; all must call it.

    Args:
        make: numbers of rows -> their tensors, [n, ...] each.
        turn: which process begins, where several stores are filled one after another.

    Raises:
        UserError: it failed in another process, or the store cannot be written.
    """
    if not processes.any_process(lacking(place, wanted) > 0):
        return
    with _one_launch(place):
        with fail_together():
            calls = batches.lists(wanted, _numbers(place))
        own = calls[(processes.rank() - turn) % processes.world_size() :: processes.world_size()]
        silent = len(calls) < 2 or not processes.is_main()
        with fail_together(), tqdm(total=sum(map(len, own)), desc=title, unit=unit, disable=silent) as bar:
            for rows in own:
                keep_rows(place, rows, make(rows.tolist()))
                bar.update(len(rows))
    # on a disk of its own a machine has only what its processes have made
    for rows in batches.lists(wanted, _numbers(place)):
        keep_rows(place, rows, make(rows.tolist()))


def read_rows(place: Path, count: int) -> dict[str, StoredRows]:
    """Return the tensors of a store, by name."""
    parts = _parts(place)
    names = parts[0][1] if parts else {}
    return {name: StoredRows(count, [(rows, tensors[name]) for rows, tensors in parts]) for name in names}
