"""SIGINT and SIGTERM: training saves a checkpoint and stops, other work ends with one line; a second one ends it.

Imports little, as the command imports it first, so that a signal during further imports leaves no traceback.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from contextlib import contextmanager, suppress

TYPE_CHECKING = False  # typing alone takes as long to import as the interpreter to start
if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType
    from typing import Any, Self

SIGNALS = (signal.SIGINT, signal.SIGTERM)
"""Ctrl-C, and the signal of schedulers, `kill` and `torchrun`."""
ECHO = 2.0
"""Seconds in which a signal may repeat: Ctrl-C reaches each process from the terminal and again from `torchrun`."""


class StoppedError(KeyboardInterrupt):
    """Work was stopped by a signal; the message, if any, names what is kept.

    Attributes:
        code: exit code, 128 + the number of the signal.
    """

    def __init__(self, number: int, text: str = "") -> None:
        super().__init__(text)
        self.code = 128 + number


def print_stop(text: str) -> None:
    """Write a line to stderr from within a signal handler, in the main process of a launch."""
    if os.environ.get("RANK", "0") == "0":
        with suppress(OSError):
            os.write(2, f"\nfewstep: {text}\n".encode())


def install_handlers(handler: Any) -> dict[int, Any]:
    """Set the handler of both signals, in the main thread, and return those before it; ignored ones stay ignored."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    ours = [number for number in SIGNALS if signal.getsignal(number) not in (None, signal.SIG_IGN)]
    return {number: signal.signal(number, handler) for number in ours}


def restore_handlers(handlers: dict[int, Any]) -> None:
    """Set the handlers that `install_handlers` returned."""
    for number, handler in handlers.items():
        signal.signal(number, handler)


def end_at_once(number: int, frame: FrameType | None = None) -> None:
    """End the process: handler for imports, which may swallow or convert an exception."""
    print_stop("stopped")
    os._exit(128 + number)


def _in_an_import(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False


class _Command:
    """Handler of the command: the first signal raises StoppedError, a second one ends the process."""

    def __init__(self) -> None:
        self.seen = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.seen or _in_an_import(frame):
            end_at_once(number)
        self.seen = True
        raise StoppedError(number)


@contextmanager
def stoppable() -> Iterator[None]:
    """Raise StoppedError for both signals inside the block."""
    before = install_handlers(_Command())
    try:
        yield
    finally:
        restore_handlers(before)


class Stop:
    """Context that records the first signal without raising; a second one is passed to the previous handlers.

    Args:
        launched: whether this is one of several processes, whose launcher repeats signals.

    Attributes:
        number: number of the recorded signal; 0 for none.
    """

    def __init__(self, launched: bool = False) -> None:
        self.number = 0
        self._launched = launched
        self._time = 0.0
        self._raising = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        self._before = install_handlers(self._record)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        restore_handlers(self._before)
        if self.number and kind is None:  # it arrived after the last check
            os.kill(os.getpid(), self.number)

    def _record(self, number: int, frame: FrameType | None) -> None:
        if not self.number:
            self.number, self._time = number, time.monotonic()
            print_stop("stopping: a checkpoint is saved after this step; once more to end at once")
            for before in self._before.values():
                if isinstance(before, _Command):
                    before.seen = True
            if self._raising:
                raise StoppedError(number)
        elif not self._launched or time.monotonic() - self._time > ECHO:
            restore_handlers(self._before)
            os.kill(os.getpid(), number)

    @contextmanager
    def raising(self) -> Iterator[None]:
        """Raise StoppedError for the signal inside the block, for long work that can be repeated.

        With several processes it is recorded only, as the others would wait for one that left.
        """
        self._raising = not self._launched
        try:
            if self._raising and self.number:
                raise StoppedError(self.number)
            yield
        finally:
            self._raising = False
