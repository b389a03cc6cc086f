"""Files that are either whole or absent: written aside, then renamed.

Whatever writes by these functions raises UserError where the place cannot be written to.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from fewstep.common.errors import UserError
from fewstep.common.messages import logger
from fewstep.common.text import read_text

OS_ERROR = re.compile(r"\[Errno \d+\] ([^:'\"()\[\]]+)|([^:'\"()\[\]]+) \(os error \d+\)")
"""An error of the operating system in a message of Python or of libraries in Rust (safetensors, tokenizers)."""


def os_reason(error: BaseException) -> str | None:
    """Return the operating system's reason for an error of any library; None for other errors.

    safetensors and tokenizers raise own exceptions for a full disk; `shutil` lists one tuple per file.
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
    """Turn errors of the operating system into a UserError that names the path and ends with `kept`."""
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

    A process killed at any instant leaves the old file or the new one. The data is flushed to disk before the
    rename, so that a power cut cannot leave an empty file under the final name.

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

    A folder cannot be renamed over another one. A process killed between the two renames of a replacement leaves the
    old folder under a hidden name that ends in `.old`; `sweep` puts it back.

    Args:
        keep: leave an existing folder at `path` unchanged instead of replacing it; other processes may be reading it.

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
            if not keep:
                _swap(part, path)
                return
            try:
                part.rename(path)  # fails where `path` is a folder with content
            except OSError:
                if not path.is_dir():
                    raise
    finally:
        shutil.rmtree(part, ignore_errors=True)


def final_path(path: Path) -> Path:
    """Return the path after the rename of a temporary file of `atomic_write` or inside one of `atomic_folder`."""
    parts = [part[1:].rsplit(".", 2)[0] if re.fullmatch(r"\..+\.[^.]+\.part", part) else part for part in path.parts]
    return Path(*parts)


def _swap(part: Path, path: Path) -> None:
    """Rename the folder `part` to `path`, replacing what is there."""
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
    """Remove what killed processes left in `folder`: hidden `.part`, `.old` and `.gone` entries.

    An `.old` entry is put back if its replacement is missing.

    Args:
        age: minimum seconds since the last change, for folders that other processes may be writing to.
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
    """Remove a folder; it is renamed first, so that it never appears incomplete under its own name."""
    gone = folder.with_name(f".{folder.name}.gone")
    shutil.rmtree(gone, ignore_errors=True)
    folder.replace(gone)
    shutil.rmtree(gone)


@contextmanager
def hold_folder(folder: Path) -> Iterator[None]:
    """Hold an exclusive lock on a run folder; the OS releases it if the process dies.

    The process that holds it may enter again.

    Raises:
        UserError: another process holds it, or the folder cannot be written to.
    """
    place = folder.resolve() / ".lock"
    lock = FileLock(place, timeout=0, is_singleton=True, thread_local=False)
    with _writing(folder, "choose a writable folder"):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
        except Timeout as error:
            owner = place.read_text(encoding="utf-8").strip() or "unknown"
            raise UserError(
                f"run folder {folder} is in use by process {owner}; wait for it, or give another --out", field="out"
            ) from error
        with suppress(OSError):  # Windows locks the file's bytes as well
            place.write_text(f"{os.getpid()}\n", encoding="utf-8")
    try:
        yield
    except KeyboardInterrupt as stop:
        stop.add_note(f"finished files are kept in {folder}; run the same command again to resume")
        raise
    finally:
        lock.release()


@contextmanager
def file_lock(place: Path, notice: str = "") -> Iterator[None]:
    """Hold a lock file; wait while another process or thread does. The OS releases it if the process dies.

    Args:
        notice: printed to stderr before a wait.

    Raises:
        UserError: the lock file cannot be written.
    """
    lock = FileLock(place)
    with _writing(place, "choose a writable folder"):
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if notice:
                logger.info(notice)
            lock.acquire()
    try:
        yield
    finally:
        lock.release()


def check_writable(folder: Path | str) -> None:
    """Check that a folder can be created and written to, without leaving anything behind.

    Raises:
        UserError: a parent is a file, or the closest existing parent is not writable.
    """
    folder = Path(folder)
    existing = folder.absolute()
    with _writing(folder, "choose a writable folder"):
        while not existing.exists() and existing != existing.parent:
            existing = existing.parent
        with tempfile.TemporaryFile(dir=existing) as probe:
            probe.write(b"0")
            probe.flush()
            os.fsync(probe.fileno())


def cache_root() -> Path:
    """Return the folder of caches shared by runs: $FEWSTEP_CACHE or ~/.cache/fewstep.

    It may be deleted while nothing runs.
    """
    return Path(os.environ.get("FEWSTEP_CACHE") or "~/.cache/fewstep").expanduser()


def write_text(path: Path | str, text: str) -> None:
    """Write text as UTF-8, atomically."""
    with atomic_write(path) as part:
        part.write_text(text, encoding="utf-8")


def write_json(path: Path | str, data: Any) -> None:
    """Write `data` as indented UTF-8 JSON, atomically."""
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def read_mapping(path: Path | str) -> dict[str, Any]:
    """Read a JSON file that holds a mapping.

    Raises:
        UserError: missing, unreadable, not JSON, or not a mapping.
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
    """Return the SHA-256 of the concatenated bytes of files, in hexadecimal."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def short_digest(content: str | bytes) -> str:
    """Return the first 16 hexadecimal digits of a text's SHA-256, for names of kept files."""
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()[:16]
