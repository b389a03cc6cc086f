"""Fingerprints of a run's inputs and the differences of two such records; importable without torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

PARTS = "parts of the data"
"""Entry of the parts of a data set by name; other entries are one fingerprint each."""
ITEMS = "items:"
"""Prefix of a part that lists its items, DIGITS hexadecimal digits each."""
DIGITS = 16
NEWER = (PARTS, "watched prompts")
"""Entries that records of older versions lack."""


@dataclass(frozen=True)
class Content:
    """Mark of a text field that names a file or folder: runs are compared by its content, not its path.

    Attributes:
        entry: entry of a run's inputs that is its fingerprint.
    """

    entry: str


def items(fingerprints: Iterable[str]) -> str:
    """Return a part that lists its items, from a hexadecimal fingerprint of each."""
    return ITEMS + "".join(fingerprint[:DIGITS] for fingerprint in fingerprints)


def _split(part: str) -> list[str]:
    listed = part.removeprefix(ITEMS)
    return [listed[start : start + DIGITS] for start in range(0, len(listed), DIGITS)]


def part_difference(name: str, before: str | None, now: str | None) -> str:
    """Describe how one part of a data set differs, with the number of items if it lists them."""
    if before is None or now is None or not before.startswith(ITEMS):
        short = all(value is not None and len(value) <= DIGITS for value in (before, now))
        return f"{name} ({before}, now {now})" if short else f"{name}"
    old, new = _split(before), _split(now)
    if len(old) == len(new):
        changed = sum(a != b for a, b in zip(old, new, strict=True))
        how = "in another order" if sorted(old) == sorted(new) else f"{changed} of {len(old)} changed"
        return f"{name} ({how})"
    removed, added = (Counter(a) - Counter(b) for a, b in ((old, new), (new, old)))
    counts = [f"{sum(many.values())} {word}" for many, word in ((removed, "removed"), (added, "added")) if many]
    return f"{name} ({', '.join(counts)}; {len(old)} before, now {len(new)})"


def difference(before: Mapping[str, Any], now: Mapping[str, Any], *, whole: bool = True) -> str | None:
    """Describe how a run's inputs differ; None if they do not.

    Args:
        whole: whether `now` has all entries; otherwise missing ones are not compared.
    """
    names = [name for name in {**before, **now} if (name in now or whole) and (name in before or name not in NEWER)]
    changed = [name for name in sorted(names) if before.get(name) != now.get(name)]
    if PARTS in changed:
        old, new = before.get(PARTS), now.get(PARTS) or {}
        if not isinstance(old, Mapping) or not all(isinstance(part, str) for part in old.values()):
            return "other data (their record cannot be read)"
        parts = [name for name in {**old, **new} if old.get(name) != new.get(name)]
        return "other data: " + ", ".join(part_difference(name, old.get(name), new.get(name)) for name in parts)
    return f"another {changed[0]}" if changed else None
