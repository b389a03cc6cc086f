"""Pictures in webdataset shards: plain tar files on a disk, behind a URL or in a bucket, read by ranges of bytes.

The members of a shard are listed once with their offsets. Any picture can be read at any time, so that a run on shards
is as exact and as resumable as one on a folder, which it is not with a stream that is read from its start.
"""

from __future__ import annotations

import hashlib
import json
import os
import posixpath
import re
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from fewstep.common.errors import UserError
from fewstep.common.files import read_mapping, short_digest, write_json
from fewstep.common.messages import Bar
from fewstep.data.captions import BESIDE, Matched, is_hidden, is_list, is_picture, kind_of, match, source_error
from fewstep.data.images import SCALED, Captioned, PictureFiles
from fewstep.data.pixels import HEAD, is_deep_png

FORMAT = 2
"""Version of the kept lists of members; others are made again."""
LONGEST = 2**20
"""Most bytes of a caption file."""
LINKS = 40
"""Most links in a chain."""
VERSION = (
    *("size", "mtime", "LastModified", "last_modified", "ETag", "etag", "md5Hash", "generation", "created"),
    *("Content-MD5", "Digest", "Last-Modified"),  # web servers, by the names of their headers
)
"""Entries of a file system's information that change with a file's content."""


@dataclass(frozen=True)
class Member:
    """A picture in a shard.

    Attributes:
        shard: URL of the shard.
        version: digest of the shard's version on its file system.
        name: in the shard.
        offset, size: of its bytes.
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
        """Return its bytes.

        Raises:
            UserError: they cannot be read, or some are missing.
        """
        with reached(self.shard):
            files, path = place_of(self.shard)
            found: bytes = files.cat_file(path, start=self.offset, end=self.offset + self.size)
        if len(found) != self.size:
            read = f"read {len(found)} bytes of {self.size}"
            raise source_error(f"{self}: {read}; the shard has changed, or is not served by ranges")
        return found

    def identity(self) -> bytes:
        """Return a SHA-256 that identifies its bytes without reading them."""
        place = f"{same_place(self.shard)} {self.version} {self.name} {self.offset} {self.size}"
        return hashlib.sha256(place.encode() + SCALED * self.deep).digest()


class Sample(NamedTuple):
    """A picture of a shard by its offset, and its captions."""

    name: str
    offset: int
    size: int
    deep: bool
    captions: list[str]


class Listing(NamedTuple):
    """The samples of a shard, and counts of what is left out, by reason."""

    samples: list[Sample]
    left_out: dict[str, int]


def expanded(source: str) -> list[str]:
    """Expand `a-{08..10}.tar` to a-08.tar, a-09.tar, a-10.tar; of several braces the last one counts fastest."""
    found = re.search(r"\{(\d+)\.\.(\d+)\}", source)
    if found is None:
        return [source]
    first, last = found.groups()
    numbers = [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    return [source[: found.start()] + number + rest for number in numbers for rest in expanded(source[found.end() :])]


def place_of(url: str) -> tuple[Any, str]:
    """Return the file system of a URL, and the path in it."""
    from fsspec.core import url_to_fs

    files, path = url_to_fs(url)
    return files, path


@lru_cache(maxsize=1024)
def same_place(url: str) -> str:
    """Return a shard's canonical name: a local one's real path, else the whole URL."""
    files, path = place_of(url)
    local = "file" in (files.protocol if isinstance(files.protocol, tuple) else (files.protocol,))
    return os.path.realpath(path) if local else str(files.unstrip_protocol(path))


@contextmanager
def reached(what: str) -> Iterator[None]:
    """Raise any error of a file system as a UserError: each file system raises its own kinds."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise source_error(f"cannot read {what}: {reason}") from error


def find_shards(source: str) -> list[str]:
    """Return the URLs of the shards that a setting names, in order.

    Raises:
        UserError: one is missing, or its file system cannot be reached (its package may be missing).
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


def from_shards(shards: Sequence[str], size: int, cache: Path) -> Captioned:
    """Find the captioned pictures of webdataset shards; their bytes are read when they are used.

    Args:
        shards: tar files, by paths or URLs of any kind that fsspec reads.
        size: pixels a side.
        cache: folder of the lists of members, one a shard and version.

    Raises:
        UserError: a shard cannot be read or has no picture, or a picture has no caption.
    """
    pictures: list[Member] = []
    captions: list[list[str]] = []
    left_out: Counter[str] = Counter()
    for shard in Bar(shards, desc="listing shards", unit="shard", disable=len(shards) == 1):
        version, listing = listed(shard, cache)
        for name, offset, length, deep, texts in listing.samples:
            pictures.append(Member(shard, version, name, offset, length, deep))
            captions.append(texts)
        left_out.update(listing.left_out)
    return Captioned(PictureFiles(tuple(pictures), size), captions, left_out)


def listed(shard: str, cache: Path) -> tuple[str, Listing]:
    """Return a shard's version and its list of members, from the cache or else from the shard.

    Raises:
        UserError: as `from_shards`.
    """
    with reached(shard):
        files, path = place_of(shard)
        info = files.info(path)
    known = json.dumps([[name, str(info[name])] for name in VERSION if name in info])
    version = short_digest(known)
    kept = cache / f"shard-{short_digest(f'{FORMAT} {shard} {known}')}.json"
    with suppress(UserError, LookupError, TypeError, ValueError):  # a broken list is made again
        held = read_mapping(kept)
        return version, Listing([Sample(*row) for row in held["samples"]], held["left_out"])
    with reached(shard):
        listing = samples_of(files, path, shard)
    write_json(kept, {"shard": shard, "samples": listing.samples, "left_out": listing.left_out})
    return version, listing


def samples_of(files: Any, path: str, shard: str) -> Listing:
    """List the pictures of a tar file in its order, with their captions (`captions.match`). Links are followed.

    Raises:
        UserError: no plain tar that can be read by ranges, no picture, a picture without caption, a picture or caption
            that appears twice, or a link that leads out of the shard.
    """
    try:
        with files.open(path, "rb") as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
            members = Members(tar, stream, shard)
            matched: Matched = match(list(members.found), members.read, members.find, shard)
            samples = [members.sample(name, texts) for name, texts in matched.captions.items()]
    except (tarfile.TarError, ValueError) as error:
        raise source_error(
            f"{shard} is not a plain tar, readable by byte ranges ({error}); use a copy on disk, unpacked if it is "
            "compressed"
        ) from error
    return Listing(samples, members.left_out | matched.left_out)


class Members:
    """The members of an open tar file, by their names.

    Attributes:
        found: those that are not hidden, in the order of the file; links are replaced by their targets.
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
                raise source_error(f"{name} appears twice in {shard}; keep one of them")
            elif matters and member.issparse():
                raise source_error(f"{name} of {shard} is sparse; store it whole")
            else:
                self.found[name] = member
                self._scan(member, name)
            self._every[name] = member
        for name, member in self.found.items():
            self.found[name] = self._target(name, member)

    def _scan(self, member: tarfile.TarInfo, name: str) -> None:
        """Read captions whole, and the beginning of a PNG, while the file is read in order."""
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

    def _target(self, name: str, member: tarfile.TarInfo) -> tarfile.TarInfo:
        """Return the member that a link leads to; a regular member itself."""
        for _ in range(LINKS):
            if member.isreg():
                return member
            place, link = posixpath.dirname(_plain(member.name)), _printable(member.linkname)
            path = posixpath.normpath(posixpath.join(place, link)) if member.issym() else _plain(link)
            if path not in self._every:
                break
            member = self._every[path]
        if is_picture(name) or kind_of(name) in BESIDE:
            raise source_error(f"{name} of {self.shard} is a link to {member.linkname}, which the shard lacks")
        return member

    def read(self, name: str) -> bytes:
        """Return the bytes of a list or a caption."""
        member = self.found[name]
        if member.name not in self._texts:
            if member.size > LONGEST:
                raise ValueError(f"{member.size} bytes; a caption has at most {LONGEST}")
            self._texts[member.name] = self._bytes(member, member.size)
        return self._texts[member.name]

    def find(self, name: str) -> str | None:
        """Return the name of the member at a path from the top, hidden or not; None if there is none."""
        plain = posixpath.normpath(name)
        return plain if plain in self._every else None

    def sample(self, name: str, captions: list[str]) -> Sample:
        """Return a picture by its offset."""
        member = self.found.get(name) or self._target(name, self._every[name])
        return Sample(
            _printable(member.name), member.offset_data, member.size, member.offset_data in self._deep, captions
        )


def _printable(name: str) -> str:
    """Return a member's name; bytes that are no UTF-8 are written as \\xe9."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _plain(name: str) -> str:
    """Return a member's name from the top, without a leading ./ or /."""
    return posixpath.normpath(_printable(name)).lstrip("/")
