"""Captioned pictures: the bundled set, or a folder of one's own, read only as they are needed; or prompts alone."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from io import BytesIO
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from fewstep.common.errors import UserError
from fewstep.data.captions import in_words, is_picture, match
from fewstep.data.folder_files import FolderFiles, check_pictures
from fewstep.data.pixels import eight_bits, is_deep_png


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

    def identities(self) -> list[bytes]:
        """sha256 of what decides each of them, apart from the size."""

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

    def identities(self) -> list[bytes]:
        """sha256 of each picture's pixels."""
        return [hashlib.sha256(np.ascontiguousarray(picture).data).digest() for picture in self.array]

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

    def identities(self) -> list[bytes]:
        """sha256 of each file's bytes; of grey PNGs of 16 bits also that they are scaled. Read once."""
        return self._identities

    @cached_property
    def _identities(self) -> list[bytes]:
        return [_identity(file) if isinstance(file, Path) else file.identity() for file in self.files]

    def fingerprint(self) -> str:
        """sha256 of the size and of the files' identities."""
        return hashlib.sha256(f"{self.size}".encode() + b"".join(self.identities())).hexdigest()


def _identity(file: Path) -> bytes:
    held = file.read_bytes()
    return hashlib.sha256(held + SCALED if is_deep_png(held) else held).digest()


SCALED = b" scaled to 8 bits"
"""Added to what identifies a picture that was once read otherwise: by clipping."""


@dataclass(frozen=True)
class Captioned:
    """Pictures and, for each, one or more captions to draw from; without pictures, prompts alone.

    Attributes:
        left_out: what the source holds beside these: reason -> how many.
    """

    pictures: PictureSet | None
    captions: Sequence[Sequence[str]]
    left_out: Mapping[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.captions)

    def line(self) -> str:
        """Return what is used and what was left out, with the reasons, in one line."""
        said = sum(len(set(row)) for row in self.captions)
        used = f"{len(self)} prompts" if self.pictures is None else f"{len(self)} pictures with {said} captions"
        return f"data     {used}{in_words(self.left_out)}"

    def take(self, rows: Sequence[int] | np.ndarray) -> Captioned:
        """Some of them, in memory."""
        held = None if self.pictures is None else HeldPictures(self.pictures.read(rows))
        return Captioned(held, [self.captions[int(row)] for row in rows])


def from_prompts(prompts: Sequence[str]) -> Captioned:
    """Prompts alone, each once."""
    distinct = list(dict.fromkeys(prompts))
    twice = len(prompts) - len(distinct)
    return Captioned(None, [[prompt] for prompt in distinct], {"repeated prompts": twice} if twice else {})


def find_pictures(folder: Path) -> list[Path]:
    """Return the picture files of a folder and of those in it, in name order, hidden ones apart; none of no folder."""
    return [folder / name for name in FolderFiles(folder).names if is_picture(name)]


@contextmanager
def _opened(place: Place) -> Iterator[Image.Image]:
    held = place if isinstance(place, Path) else BytesIO(place.read())
    try:
        with Image.open(held, formats=_formats()) as image:
            yield image
    except MemoryError:
        raise
    except Exception as error:  # of a broken file each format raises kinds of its own
        reason = "it holds no known format" if isinstance(error, UnidentifiedImageError) else str(error)
        reason = " ".join(reason.split()) or type(error).__name__
        raise UserError(f"cannot read picture {place}: {reason}") from error


@lru_cache(maxsize=1)
def _formats() -> list[str]:
    """Pillow's formats, the usual ones first, without the one that is a program and not a picture."""
    Image.preinit()
    Image.init()
    return [name for name in Image.OPEN if name != "EPS"]


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
        upright = eight_bits(ImageOps.exif_transpose(image), image)
        # what has no transparent parts gets none: Pillow would invent them for LAB
        rgba = (upright if upright.has_transparency_data else upright.convert("RGB")).convert("RGBA")
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
        turned = image.format != "TIFF" and image.getexif().get(0x0112, 1) in (5, 6, 7, 8)  # TIFF's size is turned
        return (image.height, image.width) if turned else (image.width, image.height)


def from_folder(folder: Path, size: int) -> Captioned:
    """Find a folder's pictures and captions. The pictures' own files are opened, and decoded later.

    Captions come from `metadata.jsonl` (lines {"file_name": ..., "text": ...}) or `metadata.csv`, the Hugging Face
    form, and for pictures that these do not name from a `.txt` or `.json` file beside each; see `captions.match`.

    Raises:
        UserError: no folder, no pictures, a file that is no picture, or a picture without caption.
    """
    check_pictures(folder)
    files = FolderFiles(folder)
    matched = match(files.names, files.read, files.find, str(folder), files.advice())
    places = tuple(folder / name for name in matched.captions)
    for place in places:
        with _opened(place):
            pass
    return Captioned(PictureFiles(places, size), list(matched.captions.values()), files.left_out | matched.left_out)
