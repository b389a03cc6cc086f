"""The header of a safetensors file, and single numbers out of it: without torch, in milliseconds."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from fewstep.common.errors import UserError

Shape = tuple[int, ...]

_BROKEN = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError, struct.error)
BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
"""Types of tensors, by safetensors' names, and how many bits one number of each takes."""
_NUMBERS = {"F64": "d", "F32": "f", "F16": "e", "I64": "q", "I32": "i", "I16": "h", "I8": "b", "U8": "B"}


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: its type, by safetensors' name, its shape, and where its bytes start in the file."""

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
    """The metadata of a safetensors file and what it says of every tensor.

    Raises:
        UserError: missing, truncated or of another format.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            first = stream.read(8)
            if first == b"version ":
                raise ValueError("it is a pointer of Git LFS, without its content; run git lfs pull in its repository")
            length = int.from_bytes(first, "little")
            if size < 8 or length > size - 8:
                raise ValueError("its header is cut off")
            header = json.loads(stream.read(length))
        metadata = dict(header.pop("__metadata__", {}))
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        if 8 + length + end != size:
            raise ValueError(f"it has {size} bytes, its header promises {8 + length + end}")
        _check_places(header)
        return metadata, {
            name: Entry(entry["dtype"], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
            for name, entry in header.items()
        }
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except _BROKEN as error:
        raise UserError(f"{path} is not a whole safetensors file: {error}") from error


def _check_places(header: Mapping[str, Any]) -> None:
    """Refuse tensors of unknown types, or whose bytes are not those of their shape, one tensor after the other."""
    last = 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        (first, end), kind, shape = entry["data_offsets"], entry["dtype"], entry["shape"]
        if kind not in BITS:
            raise ValueError(f"{name} is of a type {kind!r} that is none of {', '.join(BITS)}")
        if not all(type(side) is int and side >= 0 for side in shape):
            raise ValueError(f"{name} is of a shape {shape}")
        if first != last or 8 * (end - first) != math.prod(shape) * BITS[kind]:
            raise ValueError(f"{name}, {shape} of {kind}, is said to lie from byte {first} to {end}")
        last = end


def read_floats(path: Path, entry: Entry) -> list[float]:
    """Read a small tensor of floating or whole numbers.

    Raises:
        UserError: a type that is no number's, or a file that ends before.
    """
    try:
        with path.open("rb") as stream:
            return _values(stream, entry)
    except (*_BROKEN, OSError) as error:
        raise UserError(f"{path} cannot be read: {error!r}") from error


def _values(stream: BinaryIO, entry: Entry) -> list[float]:
    """Read the numbers of a tensor; the errors are those of `_BROKEN`."""
    stream.seek(entry.start)
    count = math.prod(entry.shape)
    if entry.dtype == "BF16":  # the upper half of a float32
        halves = struct.unpack(f"<{count}H", stream.read(2 * count))
        return [struct.unpack("<f", struct.pack("<I", half << 16))[0] for half in halves]
    code = f"<{count}{_NUMBERS[entry.dtype]}"
    return [float(value) for value in struct.unpack(code, stream.read(struct.calcsize(code)))]


def read_numbers(path: Path, entries: Mapping[str, Entry]) -> dict[str, float]:
    """The values of tensors that hold one number each.

    Raises:
        UserError: a tensor that holds none or many, a type that is no number's, or a number that is not finite.
    """
    numbers: dict[str, float] = {}
    with path.open("rb") as stream:
        for name, entry in entries.items():
            try:
                if math.prod(entry.shape) != 1:
                    raise ValueError(f"its shape is {entry.shape}")
                (value,) = _values(stream, entry)
                if not math.isfinite(value):
                    raise ValueError(f"it is {value}")
            except _BROKEN as error:
                raise UserError(f"{path}: {name!r} is not one number: {error}") from error
            numbers[name] = value
    return numbers


def metadata_record(metadata: Mapping[str, str], key: str, file: Path) -> dict[str, Any]:
    """Return a JSON record from the metadata of a safetensors file; empty if the key is absent.

    Raises:
        UserError: no JSON object.
    """
    try:
        record = json.loads(metadata.get(key, "{}"))
    except (json.JSONDecodeError, TypeError) as error:
        raise UserError(f"{file} has broken metadata: {error}") from error
    if not isinstance(record, dict):
        raise UserError(f"{file} has broken metadata: {key} is no mapping")
    return record
