"""Headers and single numbers of safetensors files, without torch."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from fewstep.common.errors import UserError

Shape = tuple[int, ...]

_BROKEN = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError, struct.error)
_NUMBERS = {"F64": "d", "F32": "f", "F16": "e", "I64": "q", "I32": "i", "I16": "h", "I8": "b", "U8": "B"}


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: safetensors' name of its dtype, its shape, and the offset of its bytes in the file."""

    dtype: str
    shape: Shape
    start: int


def is_safetensors(path: Path) -> bool:
    """Return whether a file's first bytes are those of safetensors: a length that fits the file, then JSON."""
    try:
        with path.open("rb") as stream:
            first = stream.read(9)
        return first[8:] == b"{" and int.from_bytes(first[:8], "little") <= path.stat().st_size - 8
    except OSError:
        return False


def read_safetensors_header(path: Path) -> tuple[dict[str, str], dict[str, Entry]]:
    """Read the metadata and the entries of a safetensors file.

    Raises:
        UserError: missing, truncated or of another format.
    """
    try:
        with safe_open(path, "np"):  # checks dtypes, shapes, offsets and the file's size
            pass
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length))
        metadata = dict(header.pop("__metadata__", {}))
        return metadata, {
            name: Entry(entry["dtype"], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
            for name, entry in header.items()
        }
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist") from error
    except SafetensorError as error:
        if path.is_file() and path.open("rb").read(8) == b"version ":
            raise UserError(f"{path} is a pointer of Git LFS; run git lfs pull in its repository") from error
        raise UserError(f"{path} is not a whole safetensors file: {error}") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except _BROKEN as error:
        raise UserError(f"{path} is not a whole safetensors file: {error}") from error


def read_floats(path: Path, name: str, entry: Entry) -> list[float]:
    """Read a small tensor of floating or whole numbers.

    Raises:
        UserError: a dtype without numbers, or a file that is too short.
    """
    count = math.prod(entry.shape)
    try:
        with path.open("rb") as stream:
            stream.seek(entry.start)
            if entry.dtype == "BF16":  # the upper half of a float32
                halves = struct.unpack(f"<{count}H", stream.read(2 * count))
                return [struct.unpack("<f", struct.pack("<I", half << 16))[0] for half in halves]
            code = f"<{count}{_NUMBERS[entry.dtype]}"
            return [float(value) for value in struct.unpack(code, stream.read(struct.calcsize(code)))]
    except (*_BROKEN, OSError) as error:
        raise UserError(f"{path}: {name!r} cannot be read: {error!r}") from error


def read_numbers(path: Path, entries: Mapping[str, Entry]) -> dict[str, float]:
    """Read tensors of one number each.

    Raises:
        UserError: a tensor of another size, a dtype without numbers, or a number that is not finite.
    """
    numbers = {}
    for name, entry in entries.items():
        values = read_floats(path, name, entry) if math.prod(entry.shape) == 1 else []
        if not values or not math.isfinite(values[0]):
            reason = f"it is {values[0]}" if values else f"its shape is {entry.shape}"
            raise UserError(f"{path}: {name!r} is not one number: {reason}")
        numbers[name] = values[0]
    return numbers


def metadata_record(metadata: Mapping[str, str], key: str, file: Path) -> dict[str, Any]:
    """Return a JSON record from the metadata of a safetensors file; empty if the key is absent.

    Raises:
        UserError: not a JSON object.
    """
    try:
        record = json.loads(metadata.get(key, "{}"))
    except (json.JSONDecodeError, TypeError) as error:
        raise UserError(f"{file} has broken metadata: {error}") from error
    if not isinstance(record, dict):
        raise UserError(f"{file} has broken metadata: {key} is not a mapping")
    return record
