"""Read text that people write: captions, prompt files, tables, YAML and JSON, from folders and shards alike.

Text is UTF-8 with or without a byte order mark, or UTF-16 or UTF-32 with one. Lines end at \\n, \\r\\n or \\r alone:
U+2028, U+0085 and form feeds are part of a line.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

MARK = "\ufeff"
"""The byte order mark, as a character."""
MARKED = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16: its mark begins with that one's
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
"""Byte order marks and the encodings that they announce."""


def decode(held: bytes) -> str:
    """Return the text of a file's bytes, without byte order mark, every line end as \\n.

    Raises:
        ValueError: bytes that are not UTF-8, or zero characters (UTF-16 without its mark).
    """
    encoding = next((name for mark, name in MARKED if held.startswith(mark)), "utf-8")
    try:
        text = held.decode(encoding)
    except UnicodeDecodeError as error:
        shown = "UTF-8" if encoding.startswith("utf-8") else encoding.upper()
        raise ValueError(f"not {shown} text ({error.reason} at byte {error.start}); save it as UTF-8") from error
    if "\0" in text:
        raise ValueError("not text, or UTF-16 without a mark: it holds zero bytes; save it as UTF-8")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_text(path: Path | str) -> str:
    """Return the text of a file, see `decode`.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not text.
    """
    return decode(Path(path).read_bytes())


def lines_of(text: str) -> list[str]:
    """Return the lines of decoded text, without byte order marks that concatenation of files leaves."""
    return [line.removeprefix(MARK) for line in text.split("\n")]


def parse_json(text: str) -> Any:
    """Return the value of a JSON text.

    Raises:
        ValueError: not JSON, nested too deeply, a field that appears twice, or half of a surrogate pair.
    """
    try:
        value = json.loads(text, object_pairs_hook=_once)
        if "\\u" in text:  # an escape is the only way to write one
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    except UnicodeEncodeError as error:
        raise ValueError(f"\\u{ord(error.object[error.start]):04x} is half of a character") from error
    return value


def read_table(module: str, name: str = "") -> Any:
    """Return the YAML table beside a module.

    Args:
        module: the module's `__file__`.
        name: of the table's file; empty for that of the module.
    """
    file = Path(module).with_name(name) if name else Path(module).with_suffix(".yaml")
    return yaml.load(file.read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader))


def _once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object; refuse a field that appears twice."""
    row = dict(pairs)
    if len(row) < len(pairs):
        raise ValueError(f"a field appears twice in {json.dumps(row, ensure_ascii=False)[:80]}")
    return row
