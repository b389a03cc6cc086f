"""Captioned pictures, decoded when they are used; or prompts alone."""

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

from fewstep.data.captions import in_words, is_picture, match, source_error
from fewstep.data.folder_files import list_folder
from fewstep.data.pixels import eight_bits, is_deep_png


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
        """Return some of them."""
        return self.array[np.asarray(rows, dtype=np.int64)]

    def identities(self) -> list[bytes]:
        """Return the SHA-256 of each picture's pixels."""
        return [hashlib.sha256(np.ascontiguousarray(picture).data).digest() for picture in self.array]

    def fingerprint(self) -> str:
        """Return the SHA-256 of shape and pixels."""
        digest = hashlib.sha256(f"{self.array.shape}".encode())
        digest.update(np.ascontiguousarray(self.array).data)
        return digest.hexdigest()


class PictureBytes(Protocol):
    """A picture that is a part of a file."""

    def read(self) -> bytes:
        """Return the bytes of the picture's file.

        Raises:
            UserError: they cannot be read.
        """

    def identity(self) -> bytes:
        """Return a SHA-256 that identifies them."""


Place = Path | PictureBytes
"""A picture's file, or its place in one."""


@dataclass(frozen=True)
class PictureFiles:
    """Pictures on disk, decoded when they are used: a set may be larger than memory."""

    files: tuple[Place, ...]
    size: int

    def __len__(self) -> int:
        return len(self.files)

    def read(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """Return some of them, decoded on all cores.

        Raises:
            UserError: a picture is broken.
        """
        with ThreadPoolExecutor() as pool:
            return np.stack(list(pool.map(lambda row: read_picture(self.files[int(row)], self.size), rows)))

    def identities(self) -> list[bytes]:
        """Return the SHA-256 of each file's bytes, with a mark for scaled grey PNGs of 16 bits."""
        return self._identities

    @cached_property
    def _identities(self) -> list[bytes]:
        return [_identity(file) if isinstance(file, Path) else file.identity() for file in self.files]

    def fingerprint(self) -> str:
        """Return the SHA-256 of the size and of the files' identities."""
        return hashlib.sha256(f"{self.size}".encode() + b"".join(self.identities())).hexdigest()


def _identity(file: Path) -> bytes:
    held = file.read_bytes()
    return hashlib.sha256(held + SCALED if is_deep_png(held) else held).digest()


SCALED = b" scaled to 8 bits"
"""Mark of pictures that older versions read otherwise, by clipping."""


class PictureSet(Protocol):
    """N pictures of one size; with buckets their own shapes are read apart."""

    @property
    def size(self) -> int:
        """Pixels a side."""

    def __len__(self) -> int: ...

    def read(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """Return some of them, uint8 [n, size, size, 3]."""

    def identities(self) -> list[bytes]:
        """Return a SHA-256 that identifies each picture."""

    def fingerprint(self) -> str:
        """Return a SHA-256 that identifies the set."""


@dataclass(frozen=True)
class Captioned:
    """Pictures with one or more captions each; or prompts alone.

    Attributes:
        left_out: what the source holds beside these: reason -> count.
    """

    pictures: PictureSet | None
    captions: Sequence[Sequence[str]]
    left_out: Mapping[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.captions)

    def line(self) -> str:
        """Return one line on what is used and what was left out."""
        texts = sum(len(set(row)) for row in self.captions)
        used = f"{len(self)} prompts" if self.pictures is None else f"{len(self)} pictures with {texts} captions"
        return f"data     {used}{in_words(self.left_out)}"

    def take(self, rows: Sequence[int] | np.ndarray) -> Captioned:
        """Return some of them, in memory."""
        held = None if self.pictures is None else HeldPictures(self.pictures.read(rows))
        return Captioned(held, [self.captions[int(row)] for row in rows])


def from_prompts(prompts: Sequence[str]) -> Captioned:
    """Return prompts alone, each once."""
    distinct = list(dict.fromkeys(prompts))
    twice = len(prompts) - len(distinct)
    return Captioned(None, [[prompt] for prompt in distinct], {"repeated prompts": twice} if twice else {})


def find_pictures(folder: Path) -> list[Path]:
    """Return the picture files of a folder and its subfolders, in name order, without hidden ones."""
    return [folder / name for name in list_folder(folder).names if is_picture(name)]


@contextmanager
def _opened(place: Place) -> Iterator[Image.Image]:
    held = place if isinstance(place, Path) else BytesIO(place.read())
    try:
        with Image.open(held, formats=_formats()) as image:
            yield image
    except MemoryError:
        raise
    except Exception as error:  # each format raises its own kinds for a broken file
        reason = "it holds no known format" if isinstance(error, UnidentifiedImageError) else str(error)
        reason = " ".join(reason.split()) or type(error).__name__
        raise source_error(f"cannot read picture {place}: {reason}") from error


@lru_cache(maxsize=1)
def _formats() -> list[str]:
    """Return Pillow's formats, the usual ones first, without EPS, which is a program."""
    Image.preinit()
    Image.init()
    return [name for name in Image.OPEN if name != "EPS"]


def read_picture(place: Place, width: int, height: int | None = None) -> np.ndarray:
    """Read a picture as uint8 [height, width, 3]: transparent parts on white, the largest centre crop, Lanczos.

    Args:
        height: None for the width.

    Raises:
        UserError: not a readable picture.
    """
    height = width if height is None else height
    with _opened(place) as image:
        upright = eight_bits(ImageOps.exif_transpose(image), image)
        # pictures without transparency get none: Pillow would invent it for LAB
        rgba = (upright if upright.has_transparency_data else upright.convert("RGB")).convert("RGBA")
    flat = Image.new("RGBA", rgba.size, "white")
    flat.alpha_composite(rgba)
    wide, high = min(flat.width, flat.height * width // height), min(flat.height, flat.width * height // width)
    left, top = (flat.width - wide) // 2, (flat.height - high) // 2
    crop = flat.convert("RGB").crop((left, top, left + max(wide, 1), top + max(high, 1)))
    return np.asarray(crop.resize((width, height), Image.Resampling.LANCZOS))


def size_of(place: Place) -> tuple[int, int]:
    """Return (width, height) of a picture after its EXIF rotation.

    Raises:
        UserError: not a readable picture.
    """
    with _opened(place) as image:
        turned = image.format != "TIFF" and image.getexif().get(0x0112, 1) in (5, 6, 7, 8)  # Pillow rotates TIFF's size
        return (image.height, image.width) if turned else (image.width, image.height)


def from_folder(folder: Path, size: int) -> Captioned:
    """Find a folder's pictures and captions, by the rules of `captions`. Each file is opened; decoding comes later.

    Raises:
        UserError: no pictures, a file that is no picture, or a picture without caption.
    """
    files = list_folder(folder)
    matched = match(files.names, files.read, files.find, str(folder), files.advice())
    places = tuple(folder / name for name in matched.captions)
    for place in places:
        with _opened(place):
            pass
    return Captioned(PictureFiles(places, size), list(matched.captions.values()), files.left_out | matched.left_out)
