"""The files of a folder of pictures, and remedies for a folder without pictures."""

from __future__ import annotations

import os
from collections import Counter, deque
from pathlib import Path
from typing import NamedTuple

from fewstep.common.errors import UserError
from fewstep.data.captions import KINDS, LISTS, is_hidden, is_list, is_picture, kind_of, no_picture, source_error
from fewstep.data.prompts import check_suffix


class FolderFiles(NamedTuple):
    """The files of a folder and its subfolders.

    Attributes:
        folder: where they are; it may be missing.
        names: paths below the folder, sorted part by part.
        left_out: counts of what is hidden or cannot be read, by reason.
    """

    folder: Path
    names: list[str]
    left_out: dict[str, int]

    def read(self, name: str) -> bytes:
        """Return the bytes of one of them."""
        return (self.folder / name).read_bytes()

    def find(self, name: str) -> str | None:
        """Return the file at a path from the folder; None if there is none."""
        try:
            return os.path.normpath(name) if (self.folder / name).is_file() else None
        except (OSError, ValueError):  # a name that no file system takes
            return None

    def advice(self) -> str:
        """Return a remedy for a folder without pictures, as the end of an error; empty if none is known."""
        lists = [name for name in self.names if "/" in name and name.lower().endswith(LISTS)]
        tars = [name for name in self.names if kind_of(name) == ".tar"]
        if lists:
            places = list(dict.fromkeys(os.path.dirname(name) for name in lists))
            more = f" (or {', '.join(places[1:4])})" if places[1:] else ""
            return f"; {lists[0]} lies deeper: give data.source={self.folder / places[0]}{more}"
        if tars:
            place = self.folder / os.path.dirname(tars[0])
            return f"; it holds {len(tars)} tar shards: give data.source={place}/*.tar"
        for packed in KINDS["packed"]:
            found = [name for name in self.names if name.lower().endswith(tuple(packed["suffixes"]))]
            if found:
                return f"; it holds {found[0]}{f' and {len(found) - 1} more' if found[1:] else ''}: {packed['remedy']}"
        return ""


def list_folder(folder: Path) -> FolderFiles:
    """List the files of a folder and its subfolders, linked ones too, each folder once; hidden ones are counted.

    Raises:
        UserError: the folder cannot be read.
    """
    names, left_out = list[str](), Counter[str]()
    seen, todo, linked = set[str](), deque([""]), deque[str]()
    while todo or linked:  # linked folders last: files of the folder itself keep their names
        place = (todo or linked).popleft()
        real = os.path.realpath(folder / place)
        if real in seen:
            continue
        seen.add(real)
        try:
            entries = list(os.scandir(folder / place))
        except (NotADirectoryError, FileNotFoundError):
            continue
        except OSError as error:
            if not place:
                raise source_error(f"cannot read folder {folder}: {error.strerror or error}") from error
            left_out[f"folders that cannot be read ({error.strerror})"] += 1
            continue
        for entry in entries:
            if is_hidden(entry.name):
                left_out["hidden pictures and folders"] += is_picture(entry.name) or os.path.isdir(entry)
            elif os.path.isdir(entry):
                (linked if entry.is_symlink() else todo).append(f"{place}{entry.name}/")
            elif os.path.isfile(entry) or entry.is_symlink():  # a broken link is refused when it is opened
                names.append(f"{place}{entry.name}")
    counts = {why: n for why, n in left_out.items() if n}
    return FolderFiles(folder, sorted(names, key=lambda name: name.split("/")), counts)


def check_pictures(source: Path | str) -> None:
    """Refuse a source that is no folder, or a folder without pictures and lists of them."""
    folder = Path(source)
    if not folder.is_dir():
        check_suffix(source, "data.source")
        advice = "give a folder of pictures, tar files or a prompt file"
        if str(source).startswith("~"):
            advice = f"the shell has not put your home in place of ~; give {os.path.expanduser(source)!r}"
        elif "://" in str(source):
            advice = "behind a URL there may be .tar files; unpacked pictures must lie in a folder"
        found = "is not a folder" if folder.exists() else "does not exist"
        raise UserError(f"data.source = {str(source)!r} {found}; {advice}")
    near = (name for _, _, names in os.walk(folder) for name in names)  # ends at the first picture
    if not any(is_picture(name) or is_list(name) for name in near):
        files = list_folder(folder)
        if not any(map(is_picture, files.names)):
            raise no_picture(str(folder), files.names, files.advice())
