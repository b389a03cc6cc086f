"""What work says on stderr while it runs: lines of the logger `fewstep`, and progress bars."""

from __future__ import annotations

import io
import logging
import sys
from typing import Any

from tqdm import tqdm

LINE_EVERY = 30.0
"""Seconds between the lines of a bar where stderr is no terminal."""
LINE = "{desc}: {n_fmt} of {total_fmt} {unit}s, {rate_fmt}, {remaining} left{postfix}"


class _Handler(logging.Handler):
    """Handler that writes lines to stderr, above a bar."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record."""
        tqdm.write(self.format(record), file=sys.stderr)


logger = logging.getLogger("fewstep")
"""Everything the library says. `logging.getLogger("fewstep").setLevel("WARNING")` silences it."""
if not logger.handlers:
    logger.addHandler(_Handler())
    logger.setLevel(logging.INFO)
    logger.propagate = False


logging.getLogger("bitsandbytes.backends.cpu").setLevel(logging.ERROR)  # warns at import of a package it could use


class _Lines(io.TextIOBase):
    """Stream that turns what a bar redraws into lines on stderr."""

    def write(self, text: str) -> int:
        """Write a text without the signs that move the cursor; nothing if none is left."""
        line = text.replace("\x1b[A", "").strip()
        if line:
            print(line, file=sys.stderr, flush=True)
        return len(text)


class Bar(tqdm):  # type: ignore[type-arg]
    """Progress bar on stderr; where that is no terminal, a line every LINE_EVERY seconds."""

    def __init__(self, *args: Any, **options: Any) -> None:
        if sys.stderr is None or not sys.stderr.isatty():
            every = {"mininterval": LINE_EVERY, "maxinterval": LINE_EVERY, "delay": LINE_EVERY, "miniters": 1}
            options |= every | {"bar_format": LINE, "leave": False, "file": _Lines()}
        super().__init__(*args, **{"dynamic_ncols": True} | options)
