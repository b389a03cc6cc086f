"""Errors in the user's input."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

STATED = re.compile(r"([a-z_][\w.]*) = ")
"""The opening of a message that names the wrong setting first, "field = value reason"."""


class UserError(Exception):
    """A mistake in the user's input, in one line: field, value, reason, remedy.

    The command prints it without a traceback and exits with code 2. Functions that "refuse" something raise it.

    Attributes:
        field: the setting (dotted), argument, option or file that is wrong; empty where no single one is. By default
            the one that the message opens with.
    """

    def __init__(self, message: object, *, field: str = "") -> None:
        super().__init__(message)
        stated = STATED.match(str(message))
        self.field = field or (stated[1] if stated else "")


class NotFiniteError(UserError):
    """A result that is not finite: settings, or the weights that it was computed with, are unsound."""


def nearest_divisor(count: int, total: int) -> int:
    """Return the divisor of `total` that is nearest to `count`, the smaller of two."""
    return min((n for n in range(1, total + 1) if total % n == 0), key=lambda n: abs(n - count))


def did_you_mean(word: str, legal: Iterable[str]) -> str:
    """Return "; did you mean 'x'?" where a legal word is spelled nearly like `word`, else an empty string."""
    by_lower = {option.lower(): option for option in legal}
    close = difflib.get_close_matches(word.lower(), by_lower, n=1, cutoff=0.75)
    return f"; did you mean {by_lower[close[0]]!r}?" if close else ""
