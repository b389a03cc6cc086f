"""Collective operations of the processes of one launch.

Under `torchrun` or `accelerate launch` every process runs the same program on its share of the batch. The main process
alone writes, draws and evaluates. A process that raises must not leave the others waiting: code that one process runs
alone goes inside `fail_together`, which raises in all processes if it raises in one.

Every function here but `world_size`, `rank`, `is_main` and `local_rows` is a collective: all processes must call it, in
the same order. Before `common.accelerator.make_accelerator`, and with one process, all of them do nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from accelerate.state import PartialState, is_initialized
from accelerate.utils import reduce
from torch import Tensor

from fewstep.common.errors import UserError
from fewstep.common.messages import logger

T = TypeVar("T")
P = ParamSpec("P")

MESSAGE = 2**25
"""Largest size in bytes of a message that joins several tensors; a larger tensor is sent by itself."""


def world_size() -> int:
    """Return the number of processes of this launch."""
    return int(PartialState().num_processes) if is_initialized() else 1


def rank() -> int:
    """Return the number of this process, from 0."""
    return int(PartialState().process_index) if is_initialized() else 0


def is_main() -> bool:
    """Return whether this is the main process, which writes."""
    return bool(PartialState().is_main_process) if is_initialized() else True


def print_once(lines: Sequence[str]) -> None:
    """Print lines to stderr in the main process."""
    if lines and is_main():
        logger.info("\n".join(lines))


def sum_over_processes(values: Tensor) -> Tensor:
    """Return the sum of `values` over all processes, bit-identical on each."""
    if world_size() == 1:
        return values
    result: Tensor = reduce(values, reduction="sum")
    return result


@torch.no_grad()
def average_over_processes(tensors: Sequence[Tensor]) -> None:
    """Replace tensors by their means over all processes, bit-identical on each."""
    if world_size() == 1:
        return
    for some in _messages(tensors):
        if len(some) == 1 and some[0].is_contiguous():  # large tensors are not copied
            dist.all_reduce(some[0])
            some[0].div_(world_size())
            continue
        flat = torch.cat([tensor.flatten() for tensor in some])
        dist.all_reduce(flat)
        flat /= world_size()
        for tensor, part in zip(some, torch.split(flat, [t.numel() for t in some]), strict=True):
            tensor.copy_(part.view_as(tensor))


def _messages(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Yield tensors in order, grouped to at most MESSAGE bytes."""
    some: list[Tensor] = []
    for tensor in tensors:
        if some and sum(t.nbytes for t in some) + tensor.nbytes > MESSAGE:
            yield some
            some = []
        some.append(tensor)
    if some:
        yield some


def any_process(true: bool) -> bool:
    """Return whether it is true in any process."""
    if world_size() == 1:
        return true
    return bool(sum_over_processes(torch.tensor(float(true), device=PartialState().device)).item())


class DelayedAny:
    """Logical OR over processes, step by step, without a wait for the device.

    With one process the result is immediate. With several it is that of the previous step: the values are reduced in
    main memory (gloo) while the step runs.
    """

    def __init__(self) -> None:
        self._group = dist.new_group(backend="gloo") if world_size() > 1 else None
        self._pending: tuple[Any, Tensor] | None = None

    def update(self, true: bool) -> bool:
        """Send this step's value and return whether the previous step's was true in any process."""
        if self._group is None:
            return true
        result = self.result()
        value = torch.tensor([float(true)])
        self._pending = dist.all_reduce(value, group=self._group, async_op=True), value
        return result

    def result(self) -> bool:
        """Return the result of the last update."""
        if self._pending is None:
            return False
        (work, value), self._pending = self._pending, None
        work.wait()
        return bool(value.item())


@contextmanager
def fail_together() -> Iterator[None]:
    """Run the block in every process and fail in all of them if it fails in one.

    The block must not contain a collective.

    Raises:
        UserError: the block failed in another process, which reports the reason.
    """
    if world_size() == 1:
        yield
        return
    try:
        yield
    except Exception:
        with suppress(RuntimeError):  # the other processes are gone already; report this error
            any_process(True)
        raise
    if any_process(False):
        raise UserError("another process of this launch failed; see its own message for the reason")


def on_main_process(do: Callable[P, Mapping[str, T]]) -> Callable[P, Mapping[str, T]]:
    """Wrap `do` to run in the main process alone; the others wait, fail if it fails, and return {}."""

    def wrapped(*args: P.args, **options: P.kwargs) -> Mapping[str, T]:
        with fail_together():
            return do(*args, **options) if is_main() else {}

    return wrapped


def local_rows(n: int) -> list[int]:
    """Return the indices of this process among `n` rows: equally many in each process, the last row repeated."""
    each = -(-n // world_size())
    return [min(row, n - 1) for row in range(rank() * each, (rank() + 1) * each)]


def gather_to_main(part: Tensor, n: int) -> Tensor:
    """Gather the `local_rows` of all processes, [n, ...] in main memory of the main process; [0, ...] elsewhere.

    No device holds more than MESSAGE bytes of it, or one row of each process.
    """
    if world_size() == 1:
        return part
    every = torch.empty((world_size() * len(part) if is_main() else 0, *part.shape[1:]), dtype=part.dtype)
    rows = max(1, MESSAGE // max(1, world_size() * part[:1].nbytes))
    for start in range(0, len(part), rows):
        some = part[start : start + rows].to(PartialState().device).contiguous()
        received = [torch.empty_like(some) for _ in range(world_size())] if is_main() else None
        dist.gather(some, received)
        for number, theirs in enumerate(received or ()):
            first = number * len(part) + start
            every[first : first + len(some)] = theirs
    return every[:n]


def main_process_first(make: Callable[[], T]) -> T:
    """Return `make()`, run in the main process before the others, so that files in a cache are made once.

    Raises:
        UserError: it failed in another process.
    """
    if world_size() == 1:
        return make()
    for turn in (True, False):
        with fail_together():
            if is_main() == turn:
                result = make()
    return result
