"""Files that are either whole or absent: written aside, then renamed."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from fewstep.common.errors import UserError
from fewstep.common.text import read_text

OS_ERROR = re.compile(r"\[Errno \d+\] ([^:'\"()\[\]]+)|([^:'\"()\[\]]+) \(os error \d+\)")
"""How Python and libraries in Rust (safetensors, tokenizers) spell an error of the operating system inside a text."""


def os_reason(error: BaseException) -> str | None:
    """Return what the operating system refused, in its own words, whichever library reports it; None for other errors.

    safetensors and tokenizers have exceptions of their own for a full disk, `shutil` lists one tuple a file.
    """
    if isinstance(error, UserError):
        return None
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    found = OS_ERROR.search(str(error))
    if found:
        return (found[1] or found[2]).strip()
    return " ".join(str(error).split())[:200] or type(error).__name__ if isinstance(error, OSError) else None


@contextmanager
def _writing(path: Path, kept: str) -> Iterator[None]:
    """Turn errors of the operating system into one line that names the path; `kept` is its end."""
    try:
        yield
    except Exception as error:
        reason = os_reason(error)
        if reason is None:
            raise
        raise UserError(f"cannot write {path}: {reason}; {kept}") from error


@contextmanager
def atomic_write(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path in the same folder; rename it to `path` when the block ends without error.

    A process killed at any instant leaves the old `path` or the new one, never a part of it. The data is
    flushed to disk before the rename, so that a power cut cannot leave an empty file under the final name.

    Raises:
        UserError: the folder cannot be written to, or the disk is full.
    """
    path = Path(path)
    with _writing(path, "choose a writable folder"):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
        os.close(handle)
    part = Path(name)
    try:
        with _writing(path, "nothing was left there"):
            yield part
            with part.open("rb") as stream:
                os.fsync(stream.fileno())
            part.chmod(0o644)
            part.replace(path)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path | str, *, keep: bool = False) -> Iterator[Path]:
    """Yield an empty temporary folder beside `path`; swap it in as `path` when the block ends without error.

    An older folder at `path` is replaced as a whole, or with `keep` left as it is: others may be reading it. A folder
    cannot be renamed over another one: between the two renames that takes, a killed process leaves the old one under a
    hidden name that ends in `.old`.

    Raises:
        UserError: the parent folder cannot be written to, or the disk is full.
    """
    path = Path(path).resolve()  # what a link points to is replaced, not the link
    with _writing(path, "choose a writable folder"):
        path.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part"))
    try:
        with _writing(path, "nothing was left there"):
            yield part
            part.chmod(0o755)
            for file in part.rglob("*"):
                if file.is_file():
                    file.chmod(0o644)  # some writers make files that only their owner can read
                    with file.open("rb") as stream:
                        os.fsync(stream.fileno())
            if keep:
                _put(part, path)
            else:
                _swap(part, path)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def final_path(path: Path) -> Path:
    """Return the path that a temporary file of `atomic_write`, or one in a folder of `atomic_folder`, will have."""
    parts = [part[1:].rsplit(".", 2)[0] if re.fullmatch(r"\..+\.[^.]+\.part", part) else part for part in path.parts]
    return Path(*parts)


def _put(part: Path, path: Path) -> None:
    """Rename the folder `part` to `path`, unless there is one."""
    try:
        part.rename(path)  # over a folder that holds something it fails, whoever was first
    except OSError:
        if not path.is_dir():
            raise


def _swap(part: Path, path: Path) -> None:
    """Rename the folder `part` to `path`, in the place of what is there."""
    if not path.exists():
        part.replace(path)
        return
    old = part.with_suffix(".old")
    path.replace(old)
    try:
        part.replace(path)
    except BaseException:  # a signal too
        if not path.exists():
            old.replace(path)
        raise
    if old.is_dir():
        shutil.rmtree(old)
    else:
        old.unlink()


def sweep(folder: Path | str, age: float = 0.0) -> None:
    """Remove what killed processes left half-written in `folder` (hidden `.part`, `.old` and `.gone` entries).

    An `.old` one is put back where the new one had not yet taken its place.

    Args:
        age: seconds since which it was not written to, where other processes may be writing there.
    """
    for old in Path(folder).glob(".*.old"):
        place = old.with_name(old.name[1:].rsplit(".", 2)[0])
        if not place.exists():
            old.replace(place)
    for left in [found for suffix in ("part", "old", "gone") for found in Path(folder).glob(f".*.{suffix}")]:
        with suppress(FileNotFoundError):
            if age and time.time() - left.stat().st_mtime < age:
                continue
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def remove_folder(folder: Path) -> None:
    """Remove a folder so that no half of it is ever seen under its own name."""
    gone = folder.with_name(f".{folder.name}.gone")
    shutil.rmtree(gone, ignore_errors=True)
    folder.replace(gone)
    shutil.rmtree(gone)


_taken: set[Path] = set()
"""Folders that this process has taken."""


@contextmanager
def taken(folder: Path) -> Iterator[None]:
    """Keep other processes out of a run folder inside the block; a process that dies keeps out nobody.

    The process that has a folder may take it again. On a system without locks nobody is kept out.

    Raises:
        UserError: another process has taken it, or it cannot be written to.
    """
    place = folder.resolve() / ".lock"
    if place in _taken or sys.platform == "win32":
        yield
        return
    stream = _lock(folder, place)
    _taken.add(place)
    try:
        yield
    except KeyboardInterrupt as stop:
        stop.add_note(f"what is whole was kept in {folder}; run the same command again to go on")
        raise
    finally:
        _taken.remove(place)
        stream.close()


def _lock(folder: Path, place: Path) -> IO[str]:
    """The folder's open lock file, with this process's number in it."""
    import fcntl

    with _writing(folder, "choose a writable folder"):
        folder.mkdir(parents=True, exist_ok=True)
        stream = place.open("a+", encoding="utf-8")
    try:
        fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        stream.seek(0)
        owner = stream.read().strip() or "unknown"
        if error.errno in (errno.EACCES, errno.EAGAIN):
            stream.close()
            raise UserError(
                f"run folder {folder} is in use by process {owner}; wait for it, or give another --out"
            ) from error
        return stream  # a file system without locks
    stream.truncate(0)
    stream.write(f"{os.getpid()}\n")
    stream.flush()
    return stream


@contextmanager
def exclusive(place: Path, notice: str = "") -> Iterator[None]:
    """Wait until no other process or thread is in a block of the same place, a lock file beside what it makes.

    A process that dies leaves. On a system, or a file system, without locks nobody waits.

    Args:
        notice: printed to stderr where it has to wait.

    Raises:
        UserError: the lock file cannot be written.
    """
    if sys.platform == "win32":
        yield
        return
    import fcntl

    with _writing(place, "choose a writable folder"):
        place.parent.mkdir(parents=True, exist_ok=True)
        stream = place.open("a")
    with stream:
        with suppress(OSError):  # no locks here
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if notice:
                    print(notice, file=sys.stderr)
                fcntl.flock(stream, fcntl.LOCK_EX)  # of this open file, so that threads wait as well
        yield


def check_writable(folder: Path | str) -> None:
    """Refuse a folder that cannot be written to or made, before any work; leaves no trace.

    Raises:
        UserError: a file stands in the way, or the nearest folder that exists takes no files.
    """
    folder = Path(folder)
    nearest = folder.absolute()
    with _writing(folder, "choose a writable folder"):
        while not nearest.exists() and nearest != nearest.parent:
            nearest = nearest.parent
        with tempfile.TemporaryFile(dir=nearest) as probe:
            probe.write(b"0")
            probe.flush()
            os.fsync(probe.fileno())


def cache_root() -> Path:
    """Where work is kept that several runs share: $FEWSTEP_CACHE, or ~/.cache/fewstep. It may be deleted at any time
    at which nothing runs."""
    return Path(os.environ.get("FEWSTEP_CACHE") or Path.home() / ".cache" / "fewstep")


def write_json(path: Path | str, data: Any) -> None:
    """Write `data` as indented UTF-8 JSON, atomically."""
    with atomic_write(path) as part:
        part.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_mapping(path: Path | str) -> dict[str, Any]:
    """Read a JSON file that holds a mapping.

    Raises:
        UserError: missing, unreadable, not JSON, or something else than a mapping.
    """
    data = read_json(path)
    if not isinstance(data, dict):
        raise UserError(f"{path} holds a {type(data).__name__}; it must hold a mapping, {{...}}")
    return data


def read_json(path: Path | str) -> Any:
    """Read a JSON file.

    Raises:
        UserError: missing, unreadable or not JSON.
    """
    path = Path(path)
    try:
        return json.loads(read_text(path))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error


def sha256(*files: Path) -> str:
    """SHA-256 of the bytes of files, one after the other, as hexadecimal text."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
