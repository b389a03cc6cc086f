"""Tables that verbs print when they end."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table as text; the columns after the first are right-aligned."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    grid = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for number, name in enumerate(head):
        grid.add_column(name, justify="right" if number else "left", no_wrap=True)
    for row in rows:
        grid.add_row(*row)
    out = io.StringIO()
    Console(file=out, width=240, markup=False, highlight=False).print(grid)
    return "\n".join(line.rstrip() for line in out.getvalue().strip("\n").splitlines())
