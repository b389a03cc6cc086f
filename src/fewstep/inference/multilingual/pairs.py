"""Text pairs: a prompt in any language and its translation into the teacher's language."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import NamedTuple, Protocol

from fewstep.common.errors import UserError
from fewstep.common.text import lines_of, parse_json, read_text

SAMPLE = 256
"""Pairs that identify those that are made by a function."""


class Pair(NamedTuple):
    """A text in two languages (or in the teacher's language twice)."""

    source: str
    target: str


class Pairs(Protocol):
    """Pairs by number: a tuple, or a function of the number."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int, /) -> Pair:
        """Return a pair."""


def read_pairs(path: Path | str) -> tuple[Pair, ...]:
    """Read pairs of a .tsv file (source, tab, target a line) or a .jsonl file ({"source": ..., "target": ...}).

    A first line `source, tab, target` is a header.

    Raises:
        UserError: another suffix, unreadable, no pair, or a line of another form.
    """
    path = Path(path)
    if path.suffix.lower() not in (".tsv", ".jsonl"):
        raise UserError(f"pairs = {str(path)!r} must end in .tsv or .jsonl", field="pairs")
    try:
        lines = lines_of(read_text(path))
    except OSError as error:
        raise UserError(f"pairs = {str(path)!r} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise UserError(f"pairs = {str(path)!r} is {error}") from error
    tabbed = path.suffix.lower() == ".tsv"
    parse = _tabbed if tabbed else _json
    found = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            pair = parse(line)
        except ValueError as error:
            raise UserError(f"pairs = {str(path)!r}: line {number} is not valid JSON: {error}") from error
        if tabbed and number == 1 and pair == Pair._fields:
            continue
        if pair is None or not pair.source or not pair.target:
            form = "source, tab, target" if tabbed else '{"source": ..., "target": ...}'
            raise UserError(f"pairs = {str(path)!r}: line {number} is not of the form {form}")
        found.append(pair)
    if not found:
        raise UserError(f"pairs = {str(path)!r} holds no pair; write one per line", field="pairs")
    return tuple(found)


def _tabbed(line: str) -> Pair | None:
    parts = line.split("\t")
    return Pair(parts[0].strip(), parts[1].strip()) if len(parts) == 2 else None


def _json(line: str) -> Pair | None:
    fields = parse_json(line)
    if not isinstance(fields, dict) or not all(isinstance(fields.get(name), str) for name in Pair._fields):
        return None
    return Pair(fields["source"].strip(), fields["target"].strip())


def fingerprint(pairs: Pairs) -> str:
    """Return the SHA-256 of the number of pairs and of the pairs; of those that are no tuple, of the first ones."""
    count = len(pairs) if isinstance(pairs, tuple) else min(len(pairs), SAMPLE)
    known = [len(pairs), *(list(pairs[number]) for number in range(count))]
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()
