"""Rows of tensors that are computed once, in any order and by any run, and read from disk by number.

A store is a folder of safetensors files; each holds some rows and, as `rows`, their numbers. Runs share a store: under
a lock, one launch at a time computes the rows that it lacks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fewstep.common import distributed as processes
from fewstep.common.distributed import fail_together
from fewstep.common.errors import UserError
from fewstep.common.files import atomic_write, file_lock, short_digest, sweep
from fewstep.common.mapped_tensors import MappedRows, MappedTensor, open_tensors
from fewstep.common.messages import Bar
from fewstep.common.tensors import save_tensors

ROWS = "rows"
"""Name of the tensor with the numbers of a file's rows, int64 [n]."""


@dataclass(frozen=True)
class Batches:
    """The batches of `count` rows: chunk by chunk, at most `batch` rows of a chunk in one network call.

    Kernels choose their blocking by the size of a batch: the bits of a row depend on it, and not on the row's place or
    the other rows. Some of the rows are therefore computed in the batch sizes that they have when all are.
    """

    count: int
    batch: int
    chunk: int

    def sizes(self) -> np.ndarray:
        """Return the size of each row's batch, int64 [count]."""
        row = np.arange(self.count)
        start = row // self.chunk * self.chunk
        length = np.minimum(self.chunk, self.count - start)
        sizes: np.ndarray = np.minimum(self.batch, length - (row - start) // self.batch * self.batch)
        return sizes

    def lists(self, wanted: np.ndarray, stored: np.ndarray) -> list[np.ndarray]:
        """Return the rows of each call: the wanted ones that are not stored, filled up with others to whole batches."""
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


def _parts(place: Path) -> list[tuple[np.ndarray, dict[str, MappedTensor]]]:
    """Return the row numbers and tensors of a store's files; remove broken files."""
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
    name = short_digest(rows.tobytes())
    with atomic_write(place / f"{int(rows[0]):08d}-{name}.safetensors") as part:
        save_tensors(part, {ROWS: torch.from_numpy(rows), **tensors})


@contextmanager
def _one_launch(place: Path) -> Iterator[None]:
    """Lock a store for this launch; all its processes enter."""
    with ExitStack() as held:
        with fail_together():
            if processes.is_main():
                held.enter_context(file_lock(place / ".lock", f"waiting for another run that encodes into {place}"))
                sweep(place)
        yield
        with fail_together():  # none reads on before all have written
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
    """Compute and store the wanted rows that the store lacks, each process of a launch a share. All must call it.

    Args:
        make: numbers of rows -> their tensors, [n, ...] each.
        turn: process that begins, if several stores are filled one after another.

    Raises:
        UserError: another process failed, or the store cannot be written.
    """
    if not processes.any_process(lacking(place, wanted) > 0):
        return
    with _one_launch(place):
        with fail_together():
            calls = batches.lists(wanted, _numbers(place))
        own = calls[(processes.rank() - turn) % processes.world_size() :: processes.world_size()]
        silent = len(calls) < 2 or not processes.is_main()
        with fail_together(), Bar(total=sum(map(len, own)), desc=title, unit=unit, disable=silent) as bar:
            for rows in own:
                keep_rows(place, rows, make(rows.tolist()))
                bar.update(len(rows))
    # a machine with its own disk has only its own processes' rows
    for rows in batches.lists(wanted, _numbers(place)):
        keep_rows(place, rows, make(rows.tolist()))


def read_rows(place: Path, count: int) -> dict[str, MappedRows]:
    """Return the tensors of a store, by name."""
    parts = _parts(place)
    names = parts[0][1] if parts else {}
    numbers = [rows for rows, _ in parts]
    return {name: MappedRows([tensors[name] for _, tensors in parts], numbers, count) for name in names}
