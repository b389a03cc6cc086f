"""Captioned pictures: the bundled set, or a folder of one's own, read only as they are needed; or prompts alone."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image, ImageOps

from fewstep.errors import UserError

SUFFIXES = (".png", ".webp", ".jpg", ".jpeg", ".bmp")


class PictureSet(Protocol):
    """N pictures of one size, wherever they are."""

    @property
    def size(self) -> int:
        """Pixels a side."""

    def __len__(self) -> int: ...

    def read(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """Some of them, uint8 [n, size, size, 3].

        Raises:
            UserError: one cannot be read.
        """

    def fingerprint(self) -> str:
        """sha256 of what decides all of them."""


@dataclass(frozen=True)
class HeldPictures:
    """Pictures in memory, uint8 [N, H, W, 3]."""

    array: np.ndarray

    @property
    def size(self) -> int:
        """Pixels a side."""
        return int(self.array.shape[1])

    def __len__(self) -> int:
        return len(self.array)

    def read(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """Some of them."""
        chosen: np.ndarray = self.array[np.asarray(rows, dtype=np.int64)]
        return chosen

    def fingerprint(self) -> str:
        """sha256 of shape and pixels."""
        digest = hashlib.sha256(f"{self.array.shape}".encode())
        digest.update(np.ascontiguousarray(self.array).data)
        return digest.hexdigest()


class Stored(Protocol):
    """A picture that is no file of its own."""

    def read(self) -> bytes:
        """Its bytes, as a file of it would hold them.

        Raises:
            UserError: they cannot be read.
        """

    def identity(self) -> bytes:
        """sha256 of what decides them."""


Place = Path | Stored
"""Where a picture is."""


@dataclass(frozen=True)
class PictureFiles:
    """Pictures on disk: decoded when they are asked for, a few at a time, so that a set may be larger than memory."""

    files: tuple[Place, ...]
    size: int

    def __len__(self) -> int:
        return len(self.files)

    def read(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """Some of them, decoded on all cores.

        Raises:
            UserError: one is no whole picture.
        """
        with ThreadPoolExecutor() as pool:
            return np.stack(list(pool.map(lambda row: read_picture(self.files[int(row)], self.size), rows)))

    def fingerprint(self) -> str:
        """sha256 of the size and of the files' bytes."""
        digest = hashlib.sha256(f"{self.size}".encode())
        for file in self.files:
            own = hashlib.sha256(file.read_bytes()).digest() if isinstance(file, Path) else file.identity()
            digest.update(own)
        return digest.hexdigest()


@dataclass(frozen=True)
class Captioned:
    """Pictures and, for each, one or more captions to draw from; without pictures, prompts alone."""

    pictures: PictureSet | None
    captions: Sequence[Sequence[str]]

    def __len__(self) -> int:
        return len(self.captions)

    def take(self, rows: Sequence[int] | np.ndarray) -> Captioned:
        """Some of them, in memory."""
        held = None if self.pictures is None else HeldPictures(self.pictures.read(rows))
        return Captioned(held, [self.captions[int(row)] for row in rows])


def from_prompts(prompts: Sequence[str]) -> Captioned:
    """Prompts alone, each once."""
    return Captioned(None, [[prompt] for prompt in dict.fromkeys(prompts)])


def find_pictures(folder: Path) -> list[Path]:
    """The picture files of a folder and of those in it, in name order; empty if it is none."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES) if folder.is_dir() else []


@contextmanager
def _opened(place: Place) -> Iterator[Image.Image]:
    held = place if isinstance(place, Path) else BytesIO(place.read())
    try:
        with Image.open(held) as image:
            yield image
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"cannot read picture {place}: {error}") from error


def read_picture(place: Place, size: int) -> np.ndarray:
    """Read a picture as uint8 [size, size, 3]: transparent parts on white, centre crop, Lanczos.

    Raises:
        UserError: not a readable picture.
    """
    return read_cropped(place, size, size)


def read_cropped(place: Place, width: int, height: int) -> np.ndarray:
    """Read a picture as uint8 [height, width, 3]: transparent parts on white, the largest centre crop, Lanczos.

    Raises:
        UserError: not a readable picture.
    """
    with _opened(place) as image:
        rgba = ImageOps.exif_transpose(image).convert("RGBA")
    flat = Image.new("RGBA", rgba.size, "white")
    flat.alpha_composite(rgba)
    wide, high = min(flat.width, flat.height * width // height), min(flat.height, flat.width * height // width)
    left, top = (flat.width - wide) // 2, (flat.height - high) // 2
    crop = flat.convert("RGB").crop((left, top, left + max(wide, 1), top + max(high, 1)))
    return np.asarray(crop.resize((width, height), Image.Resampling.LANCZOS))


def size_of(place: Place) -> tuple[int, int]:
    """(width, height) of a picture as it is meant to be seen.

    Raises:
        UserError: not a readable picture.
    """
    with _opened(place) as image:
        turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
        return (image.height, image.width) if turned else (image.width, image.height)


def from_folder(folder: Path, size: int) -> Captioned:
    """Find a folder's pictures and captions. The pictures' own files are opened, and decoded later.

    Captions come from `metadata.jsonl` (lines {"file_name": ..., "text": ...}, the Hugging Face form), or from a
    `.txt` file beside each picture.

    Raises:
        UserError: no folder, no pictures, a file that is no picture, or a picture without caption.
    """
    if not folder.is_dir():
        raise UserError(f"data.source = {str(folder)!r} is not a folder; give a folder of pictures or 'emoji8'")
    index = folder / "metadata.jsonl"
    listed = _listed(index) if index.is_file() else {}
    if listed:
        captioned = {folder / name: text for name, text in listed.items()}
    else:
        captioned = {file: _caption_beside(file) for file in find_pictures(folder)}
    if not captioned:
        raise UserError(f"data.source = {str(folder)!r} holds no picture ({', '.join(SUFFIXES)})")
    for file in captioned:
        with _opened(file):
            pass
    return Captioned(PictureFiles(tuple(captioned), size), [[text] for text in captioned.values()])


def _listed(index: Path) -> dict[str, str]:
    """file_name -> text of a metadata.jsonl."""
    table = {}
    try:
        for line in index.read_text(encoding="utf-8").split("\n"):
            if line.strip():
                row = json.loads(line)
                name, text = row["file_name"], row["text"]
                if not isinstance(name, str) or not isinstance(text, str):
                    raise TypeError(f"{line.strip()[:80]} is not text")
                table[name] = text.strip()
    except KeyError as error:
        raise UserError(f"{index} needs lines with file_name and text: {error} is missing") from error
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{index} needs lines with file_name and text: {error}") from error
    return table


def _caption_beside(file: Path) -> str:
    beside = file.with_suffix(".txt")
    if not beside.is_file():
        raise UserError(f"picture {file} has no caption: write {beside.name} beside it or a metadata.jsonl")
    try:
        return beside.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read caption {beside}: {error}") from error
