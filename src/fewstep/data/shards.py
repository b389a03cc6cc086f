"""Pictures in webdataset shards: plain tar files on a disk, behind a URL or in a bucket, read by ranges of bytes.

The members of a shard are listed once, and found again by where they stand in it. Any picture can be read at any time,
so that a run on shards is as exact and as resumable as one on a folder; a stream that is read from its start is not.
"""

from __future__ import annotations

import hashlib
import json
import re
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from tqdm import tqdm

from fewstep.data.pictures import SUFFIXES, Captioned, PictureFiles
from fewstep.errors import UserError
from fewstep.files import read_json, write_json

CAPTIONS = (".txt", ".json")
"""Where a sample's caption stands, the nearest first: as text, or as `caption` or `text` of a JSON object."""
LONGEST = 2**20
"""Bytes of a caption's file that are read."""
VERSION = (
    *("size", "mtime", "LastModified", "last_modified", "ETag", "etag", "md5Hash", "generation", "created"),
    *("Content-MD5", "Digest", "Last-Modified"),  # web servers, by the names of their headers
)
"""What file systems say of a file that changes with its content."""


@dataclass(frozen=True)
class Member:
    """A picture in a shard.

    Attributes:
        shard: where the shard is.
        version: of the shard, as its file system tells it.
        name: in the shard.
        offset, size: its bytes.
    """

    shard: str
    version: str
    name: str
    offset: int
    size: int

    def __str__(self) -> str:
        return f"{self.name} of {self.shard}"

    def read(self) -> bytes:
        """Its bytes.

        Raises:
            UserError: they cannot be read, or are not all there.
        """
        with reached(self.shard):
            files, path = place_of(self.shard)
            found: bytes = files.cat_file(path, start=self.offset, end=self.offset + self.size)
        if len(found) != self.size:
            raise UserError(
                f"{self}: {len(found)} bytes came for {self.size}; the shard has changed, or is not served by ranges"
            )
        return found

    def identity(self) -> bytes:
        """sha256 of what decides its bytes: they are not read for it."""
        told = f"{self.shard} {self.version} {self.name} {self.offset} {self.size}"
        return hashlib.sha256(told.encode()).digest()


class Sample(NamedTuple):
    """A picture of a shard by its place, and its caption."""

    name: str
    offset: int
    size: int
    caption: str


def expanded(source: str) -> list[str]:
    """`a-{08..10}.tar` -> a-08.tar, a-09.tar, a-10.tar; several braces, the last one fastest."""
    found = re.search(r"\{(\d+)\.\.(\d+)\}", source)
    if found is None:
        return [source]
    first, last = found.groups()
    numbers = [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    return [source[: found.start()] + number + rest for number in numbers for rest in expanded(source[found.end() :])]


def place_of(url: str) -> tuple[Any, str]:
    """The file system that a URL names, and the path in it."""
    from fsspec.core import url_to_fs

    files, path = url_to_fs(url)
    return files, path


@contextmanager
def reached(what: str) -> Iterator[None]:
    """Turn the errors of a file system into one line: each raises kinds of its own."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        told = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"data.source: cannot read {what}: {told}") from error


def find_shards(source: str) -> list[str]:
    """The shards that a setting names, in order.

    Raises:
        UserError: none is there, or their file system cannot be reached (its package may be missing).
    """
    found = []
    for url in expanded(source):
        with reached(url):
            files, path = place_of(url)
            if "*" in path:
                found += [str(files.unstrip_protocol(name)) for name in sorted(files.glob(path))]
            elif files.exists(path):
                found.append(url)
            else:
                raise UserError(f"data.source = {source!r}: there is no {url}")
    if not found:
        raise UserError(f"data.source = {source!r} names no file")
    return found


def from_shards(source: str, size: int, cache: Path) -> Captioned:
    """The pictures of webdataset shards with their captions; read as they are needed.

    Args:
        source: a tar file or several, by path or by any URL that fsspec knows.
        size: pixels a side.
        cache: folder that lists of members are kept in, one a shard and version.

    Raises:
        UserError: a shard cannot be read or holds no picture, or a picture has no caption.
    """
    shards = find_shards(source)
    pictures: list[Member] = []
    captions: list[list[str]] = []
    for shard in tqdm(shards, desc="listing shards", unit="shard", disable=len(shards) == 1):
        version, samples = listed(shard, cache)
        for sample in samples:
            pictures.append(Member(shard, version, sample.name, sample.offset, sample.size))
            captions.append([sample.caption])
    return Captioned(PictureFiles(tuple(pictures), size), captions)


def listed(shard: str, cache: Path) -> tuple[str, list[Sample]]:
    """A shard's version and its samples: from the list that is kept of this version, else from the shard.

    Raises:
        UserError: as `from_shards`.
    """
    with reached(shard):
        files, path = place_of(shard)
        told = files.info(path)
    known = json.dumps([[name, str(told[name])] for name in VERSION if name in told])
    version = hashlib.sha256(known.encode()).hexdigest()[:16]
    kept = cache / f"shard-{hashlib.sha256(f'{shard} {known}'.encode()).hexdigest()[:16]}.json"
    if not kept.is_file():
        with reached(shard):
            samples = samples_of(files, path, shard)
        write_json(kept, {"shard": shard, "samples": samples})
    return version, [Sample(*row) for row in read_json(kept)["samples"]]


def samples_of(files: Any, path: str, shard: str) -> list[Sample]:
    """The pictures of a tar file, in its order, each with the caption that shares its name up to the first dot.

    Raises:
        UserError: no plain tar, one that cannot be read by ranges, no picture, or one without caption.
    """
    pictures: dict[str, tuple[str, int, int]] = {}
    captions: dict[str, dict[str, str]] = {}
    try:
        with files.open(path, "rb") as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
            for member in tar:
                place = PurePosixPath(member.name)
                stem, _, kind = place.name.partition(".")
                key, kind = str(place.with_name(stem or place.name)), f".{kind.lower()}"
                if kind in SUFFIXES and member.isreg():
                    pictures[key] = (member.name, member.offset_data, member.size)
                elif kind in CAPTIONS and member.isreg():
                    held = tar.extractfile(member)
                    said = caption_of(held.read(LONGEST) if held else b"", kind)
                    if said:
                        captions.setdefault(key, {})[kind] = said
    except (tarfile.TarError, ValueError) as error:
        raise UserError(
            f"data.source: {shard} is no plain tar that can be read by ranges of bytes ({error}); the nearest is a "
            "copy of it on a disk, unpacked if it is compressed"
        ) from error
    if not pictures:
        raise UserError(f"data.source: {shard} holds no picture ({', '.join(SUFFIXES)})")
    lacking = next((key for key in pictures if key not in captions), None)
    if lacking is not None:
        name = pictures[lacking][0]
        raise UserError(f"data.source: picture {name} of {shard} has no caption in {lacking}.txt or .json")
    return [Sample(*pictures[key], caption_in(captions[key])) for key in pictures]


def caption_in(found: dict[str, str]) -> str:
    """The caption of a sample: the text beside it before what a JSON object says."""
    return next(found[kind] for kind in CAPTIONS if kind in found)


def caption_of(held: bytes, kind: str) -> str:
    """The caption that a .txt or a .json file holds; empty where it holds none."""
    try:
        text = held.decode("utf-8-sig")
        if kind == ".txt":
            return text.strip()
        known = json.loads(text)
    except ValueError:
        return ""
    said = [known.get(name) for name in ("caption", "text")] if isinstance(known, dict) else []
    return next((word.strip() for word in said if isinstance(word, str)), "")
