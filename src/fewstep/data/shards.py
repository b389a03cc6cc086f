"""Pictures in webdataset shards: plain tar files on a disk, behind a URL or in a bucket, read by ranges of bytes.

The members of a shard are listed once, and found again by where they stand in it. Any picture can be read at any time,
so that a run on shards is as exact and as resumable as one on a folder; a stream that is read from its start is not.
"""

from __future__ import annotations

import hashlib
import json
import os
import posixpath
import re
import tarfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from fewstep.common.errors import UserError
from fewstep.common.files import read_mapping, write_json
from fewstep.data.captions import BESIDE, Matched, is_hidden, is_list, is_picture, kind_of, match
from fewstep.data.images import SCALED, Captioned, PictureFiles
from fewstep.data.pixels import HEAD, is_deep_png

FORMAT = 2
"""Of the lists of members that are kept; others are made again."""
LONGEST = 2**20
"""Bytes that the file of a caption may have."""
LINKS = 40
"""Links that may lead to one another."""
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
        deep: whether it is a grey PNG of 16 bits.
    """

    shard: str
    version: str
    name: str
    offset: int
    size: int
    deep: bool = False

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
        told = f"{same_place(self.shard)} {self.version} {self.name} {self.offset} {self.size}"
        return hashlib.sha256(told.encode() + SCALED * self.deep).digest()


class Sample(NamedTuple):
    """A picture of a shard by its place, and its captions."""

    name: str
    offset: int
    size: int
    deep: bool
    captions: list[str]


class Listing(NamedTuple):
    """The samples of a shard, and what else it holds: reason -> how many."""

    samples: list[Sample]
    left_out: dict[str, int]


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


@lru_cache(maxsize=1024)
def same_place(url: str) -> str:
    """One spelling for a shard however it is named: a local one by its real path, others by their whole URL."""
    files, path = place_of(url)
    local = "file" in (files.protocol if isinstance(files.protocol, tuple) else (files.protocol,))
    return os.path.realpath(path) if local else str(files.unstrip_protocol(path))


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
    left_out: Counter[str] = Counter()
    for shard in tqdm(shards, desc="listing shards", unit="shard", disable=len(shards) == 1):
        version, listing = listed(shard, cache)
        for name, offset, length, deep, said in listing.samples:
            pictures.append(Member(shard, version, name, offset, length, deep))
            captions.append(said)
        left_out.update(listing.left_out)
    return Captioned(PictureFiles(tuple(pictures), size), captions, left_out)


def listed(shard: str, cache: Path) -> tuple[str, Listing]:
    """A shard's version and what it holds: from the list that is kept of this version, else from the shard.

    Raises:
        UserError: as `from_shards`.
    """
    with reached(shard):
        files, path = place_of(shard)
        told = files.info(path)
    known = json.dumps([[name, str(told[name])] for name in VERSION if name in told])
    version = hashlib.sha256(known.encode()).hexdigest()[:16]
    kept = cache / f"shard-{hashlib.sha256(f'{FORMAT} {shard} {known}'.encode()).hexdigest()[:16]}.json"
    with suppress(UserError, LookupError, TypeError, ValueError):  # a broken list is made again
        held = read_mapping(kept)
        return version, Listing([Sample(*row) for row in held["samples"]], held["left_out"])
    with reached(shard):
        listing = samples_of(files, path, shard)
    write_json(kept, {"shard": shard, "samples": listing.samples, "left_out": listing.left_out})
    return version, listing


def samples_of(files: Any, path: str, shard: str) -> Listing:
    """The pictures of a tar file in its order, with their captions, by the law of a folder; see `captions.match`.

    Hard and symbolic links mean the member that they lead to.

    Raises:
        UserError: no plain tar, one that cannot be read by ranges, no picture, one without caption, a picture or
            caption that appears twice, a link that leads out of the shard.
    """
    try:
        with files.open(path, "rb") as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
            members = Members(tar, stream, shard)
            matched: Matched = match(list(members.found), members.read, members.find, shard)
            samples = [members.sample(name, said) for name, said in matched.captions.items()]
    except (tarfile.TarError, ValueError) as error:
        raise UserError(
            f"data.source: {shard} is no plain tar that can be read by ranges of bytes ({error}); the nearest is a "
            "copy of it on a disk, unpacked if it is compressed"
        ) from error
    return Listing(samples, members.left_out | matched.left_out)


class Members:
    """The members of an open tar file, by their names.

    Attributes:
        found: those that are not hidden, in the order of the file; links are led to what they mean.
        left_out: hidden pictures.

    Raises:
        UserError: a picture or caption that appears twice, or is stored with holes; a link that leads out of the shard.
    """

    def __init__(self, tar: tarfile.TarFile, stream: Any, shard: str) -> None:
        self.tar, self.stream, self.shard = tar, stream, shard
        self.found: dict[str, tarfile.TarInfo] = {}
        self.left_out: dict[str, int] = {}
        self._texts: dict[str, bytes] = {}
        self._deep: set[int] = set()
        self._every: dict[str, tarfile.TarInfo] = {}
        for member in tar:
            name = _plain(member.name)
            if member.isdir() or not (member.isreg() or member.islnk() or member.issym()):
                continue
            matters = is_picture(name) or kind_of(name) in BESIDE or is_list(name)
            if any(map(is_hidden, name.split("/"))):
                if is_picture(name):
                    reason = "hidden pictures and folders"
                    self.left_out[reason] = self.left_out.get(reason, 0) + 1
            elif matters and name in self._every:
                raise UserError(f"data.source: {name} appears twice in {shard}; write the shard anew with one of them")
            elif matters and member.issparse():
                raise UserError(f"data.source: {name} of {shard} is stored with holes (sparse); write it plainly")
            else:
                self.found[name] = member
                self._look(member, name)
            self._every[name] = member
        for name, member in self.found.items():
            self.found[name] = self._meant(name, member)

    def _look(self, member: tarfile.TarInfo, name: str) -> None:
        """Read what is needed of a member while its bytes are near: captions whole, of a PNG the beginning."""
        if not member.isreg():
            return
        if is_list(name) or (kind_of(name) in BESIDE and member.size <= LONGEST):
            self._texts[member.name] = self._bytes(member, member.size)
        elif kind_of(name) == ".png" and is_deep_png(self._bytes(member, HEAD)):
            self._deep.add(member.offset_data)

    def _bytes(self, member: tarfile.TarInfo, count: int) -> bytes:
        self.stream.seek(member.offset_data)
        held: bytes = self.stream.read(min(count, member.size))
        return held

    def _meant(self, name: str, member: tarfile.TarInfo) -> tarfile.TarInfo:
        """The member that a link leads to; a regular one itself."""
        for _ in range(LINKS):
            if member.isreg():
                return member
            place, meant = posixpath.dirname(_plain(member.name)), _printable(member.linkname)
            target = self._every.get(
                posixpath.normpath(posixpath.join(place, meant)) if member.issym() else _plain(meant)
            )
            if target is None:
                break
            member = target
        if is_picture(name) or kind_of(name) in BESIDE:
            raise UserError(
                f"data.source: {name} of {self.shard} is a link to {member.linkname}, which it does not hold"
            )
        return member

    def read(self, name: str) -> bytes:
        """The bytes of a list or a caption."""
        member = self.found[name]
        if member.name not in self._texts:
            if member.size > LONGEST:
                raise ValueError(f"{member.size} bytes; a caption has at most {LONGEST}")
            self._texts[member.name] = self._bytes(member, member.size)
        return self._texts[member.name]

    def find(self, name: str) -> str | None:
        """The member at a path from the top, even a hidden one; None where there is none."""
        plain = posixpath.normpath(name)
        return plain if plain in self._every else None

    def sample(self, name: str, captions: list[str]) -> Sample:
        """A picture by its place."""
        member = self.found.get(name) or self._meant(name, self._every[name])
        return Sample(
            _printable(member.name), member.offset_data, member.size, member.offset_data in self._deep, captions
        )


def _printable(name: str) -> str:
    """A member's name, where bytes that are no UTF-8 are written as \\xe9."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _plain(name: str) -> str:
    """A member's name from the top, without ./ before it."""
    return posixpath.normpath(_printable(name)).lstrip("/")
