"""The one exception that a user is meant to read."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake in what the user gave: one line naming the field, its value and the nearest legal one.

    The command prints it without a traceback and exits with code 2.
    """


class NotFiniteError(UserError):
    """A result that is not finite: settings, or the weights that it was computed with, are unsound."""


def nearest_divisor(count: int, total: int) -> int:
    """Return the divisor of `total` that is nearest to `count`, the smaller of two."""
    return min((n for n in range(1, total + 1) if total % n == 0), key=lambda n: abs(n - count))


def nearest(word: str, legal: Iterable[str]) -> str:
    """Return the legal word most like `word`, for error messages; the first one if nothing is like it.

    Raises:
        ValueError: `legal` is empty.
    """
    options = list(legal)
    if not options:
        raise ValueError("nearest() needs at least one legal word")
    close = difflib.get_close_matches(word, options, n=1, cutoff=0.0)
    return close[0] if close else options[0]
