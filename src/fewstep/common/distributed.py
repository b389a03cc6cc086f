"""What the processes of one launch do together.

Under `torchrun` or `accelerate launch` every process runs the same program, each on its share of the batch. One
of them, the main one, alone writes, draws and judges. A process that raises must not leave the others waiting:
what one of them does alone stands in `together`, whose end is the same for all.

The launch is known from `common.accelerator.make_accelerator` on. Before it, and with one process, everything here
does nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from accelerate.state import PartialState, is_initialized
from accelerate.utils import reduce
from torch import Tensor

from fewstep.common.errors import UserError

T = TypeVar("T")
P = ParamSpec("P")

MESSAGE = 2**25
"""Most bytes that are put together for one message; a larger tensor is a message by itself."""


def count() -> int:
    """How many processes train together."""
    return int(PartialState().num_processes) if is_initialized() else 1


def rank() -> int:
    """The number of this process among them, from 0."""
    return int(PartialState().process_index) if is_initialized() else 0


def is_main() -> bool:
    """Whether this process is the one that writes."""
    return bool(PartialState().is_main_process) if is_initialized() else True


def tell(lines: Sequence[str]) -> None:
    """Print lines to stderr, once for all processes of a launch."""
    if lines and is_main():
        print("\n".join(lines), file=sys.stderr)


def total(values: Tensor) -> Tensor:
    """The sum of `values` over all processes, the same on each, to the last bit; every process must ask."""
    if count() == 1:
        return values
    result: Tensor = reduce(values, reduction="sum")
    return result


@torch.no_grad()
def to_means(tensors: Sequence[Tensor]) -> None:
    """Overwrite tensors by their means over all processes, the same on each; every process must ask, in one order."""
    if count() == 1:
        return
    for some in _messages(tensors):
        if len(some) == 1 and some[0].is_contiguous():  # what is large is not copied
            dist.all_reduce(some[0])
            some[0].div_(count())
            continue
        flat = torch.cat([tensor.flatten() for tensor in some])
        dist.all_reduce(flat)
        flat /= count()
        for tensor, part in zip(some, torch.split(flat, [t.numel() for t in some]), strict=True):
            tensor.copy_(part.view_as(tensor))


def _messages(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors in turn, put together to at most MESSAGE bytes where more than one are."""
    some: list[Tensor] = []
    for tensor in tensors:
        if some and sum(t.nbytes for t in some) + tensor.nbytes > MESSAGE:
            yield some
            some = []
        some.append(tensor)
    if some:
        yield some


def anywhere(true: bool) -> bool:
    """Whether it is true in any process; all must ask."""
    return true if count() == 1 else bool(total(torch.tensor(float(true), device=PartialState().device)).item())


class Vote:
    """Find out, step by step, whether something is true in any process, without waiting for a device.

    With one process the answer is immediate. With several it comes one question later: it travels between main
    memories (gloo) beside the step.
    """

    def __init__(self) -> None:
        self._group = dist.new_group(backend="gloo") if count() > 1 else None
        self._asked: tuple[Any, Tensor] | None = None

    def ask(self, true: bool) -> bool:
        """Whether it was true in any process at the last question; every process must ask equally often."""
        if self._group is None:
            return true
        answer = self.last()
        mine = torch.tensor([float(true)])
        self._asked = dist.all_reduce(mine, group=self._group, async_op=True), mine
        return answer

    def last(self) -> bool:
        """The answer to the last question."""
        if self._asked is None:
            return False
        (work, every), self._asked = self._asked, None
        work.wait()
        return bool(every.item())


@contextmanager
def together() -> Iterator[None]:
    """Leave the block once every process has left it; if it fails in one, it fails in all.

    Inside, nothing may wait for another process.

    Raises:
        UserError: it failed in another process, whose own error says why.
    """
    if count() == 1:
        yield
        return
    try:
        yield
    except Exception:
        with suppress(RuntimeError):  # the others are gone already: this error is the one to hear of
            anywhere(True)
        raise
    if anywhere(False):
        raise UserError("another process of this launch failed; its own message says why")


def on_main(do: Callable[P, Mapping[str, T]]) -> Callable[P, Mapping[str, T]]:
    """`do` in the main process alone, and nothing in the others, which wait and hear of it if it fails."""

    def exclusive(*args: P.args, **options: P.kwargs) -> Mapping[str, T]:
        with together():
            return do(*args, **options) if is_main() else {}

    return exclusive


def own_share(n: int) -> list[int]:
    """Which of `n` rows are this process's: as many for each, the last row again where they do not go round."""
    each = -(-n // count())
    return [min(row, n - 1) for row in range(rank() * each, (rank() + 1) * each)]


def to_main(part: Tensor, n: int) -> Tensor:
    """What all processes made of their own shares of `n` rows, in order, in the main one; no row in the others.

    All must ask. No device holds more of it than MESSAGE, or a row of each: what is gathered lies in main memory.
    """
    if count() == 1:
        return part
    every = torch.empty((count() * len(part) if is_main() else 0, *part.shape[1:]), dtype=part.dtype)
    rows = max(1, MESSAGE // max(1, count() * part[:1].nbytes))
    for start in range(0, len(part), rows):
        some = part[start : start + rows].to(PartialState().device).contiguous()
        received = [torch.empty_like(some) for _ in range(count())] if is_main() else None
        dist.gather(some, received)
        for number, theirs in enumerate(received or ()):
            first = number * len(part) + start
            every[first : first + len(some)] = theirs
    return every[:n]


def main_first(make: Callable[[], T]) -> T:
    """Return `make()` of the main process there, then of each other: what it keeps on disk is made once.

    Raises:
        UserError: it failed in another process.
    """
    if count() == 1:
        return make()
    for turn in (True, False):
        with together():
            if is_main() == turn:
                result = make()
    return result
