"""The pictures of a folder or shard and their captions, by the same rules for both.

A picture has all captions that a list at the top (`metadata.jsonl` or `metadata.csv`) gives it; a picture that no list
names has those of the file beside it: `.txt` or `.caption` as a whole, or `.json` by its fields. What is left out is
counted by reason. A picture without caption is refused, unless a list exists, which chooses the pictures.
"""

from __future__ import annotations

import csv
import posixpath
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import cache
from io import StringIO
from typing import Any, NamedTuple
from unicodedata import normalize

from fewstep.common.errors import UserError
from fewstep.common.text import decode, lines_of, parse_json, read_table

KINDS: dict[str, list[Any]] = read_table(__file__, "file_kinds.yaml")
"""Kinds of files by their suffixes."""
SUFFIXES: Sequence[str] = KINDS["pictures"]
"""Suffixes of pictures."""
LISTS = ("metadata.jsonl", "metadata.csv")
"""Lists of pictures with captions in the Hugging Face form; the first that exists is used."""
TEXTS = (".txt", ".caption")
"""Files whose whole text is one caption; kohya's trainers write `.caption`."""
BESIDE = (*TEXTS, ".json")
"""Suffixes of caption files beside pictures; the first that exists is used."""
LIST_FIELDS = ("text", "caption", "captions")
"""Fields of a list's line with a text or a list of texts; the first that exists is used."""
JSON_FIELDS = ("caption", "text", "captions")
"""The same fields of a JSON object beside a picture."""
SYSTEM_FOLDERS = ("__MACOSX", "@eaDir")
"""Folders of operating systems."""


def source_error(reason: str) -> UserError:
    """Return the error of a `data.source` that cannot be used."""
    return UserError(f"data.source: {reason}", field="data.source")


class Matched(NamedTuple):
    """The captioned pictures of a folder or shard.

    Attributes:
        captions: of each picture that is used, by its name, in order; each has at least one.
        left_out: reason -> count.
    """

    captions: dict[str, list[str]]
    left_out: dict[str, int]


def kind_of(name: str) -> str:
    """Return the suffix of a name in small letters."""
    return posixpath.splitext(name)[1].lower()


def is_picture(name: str) -> bool:
    """Return whether a name is a picture's."""
    return kind_of(name) in SUFFIXES


def is_list(name: str) -> bool:
    """Return whether a name at the top is that of a list of captions."""
    return name.lower() in LISTS


def is_hidden(name: str) -> bool:
    """Return whether a file or folder is hidden or belongs to the operating system."""
    return name.startswith(".") or name in SYSTEM_FOLDERS


def match(
    names: Sequence[str],
    read: Callable[[str], bytes],
    find: Callable[[str], str | None],
    where: str,
    advice: str = "",
) -> Matched:
    """Return the pictures among some files, with their captions.

    Args:
        names: paths of the files below the top, each once, without hidden ones.
        read: returns the bytes of one of these files.
        find: returns the name of the file at a path that a list names; None if there is none.
        where: the folder or shard, for errors.
        advice: remedy, for errors.

    Raises:
        UserError: there is no picture, one has no caption or an empty one, or a list cannot be read.
    """
    lists = sorted((name for name in names if is_list(name)), key=lambda name: LISTS.index(name.lower()))
    named = _listed(lists[0], read, _finder(find, names), where) if lists else {}
    lists = lists if named else []  # an empty list chooses nothing
    left_out: Counter[str] = Counter()
    pictures = [name for name in names if is_picture(name)]
    beside = {(posixpath.splitext(name)[0], kind_of(name)): name for name in reversed(names) if kind_of(name) in BESIDE}
    captions, lacking = dict(named), list[str]()
    for name in pictures:
        if name not in named:
            texts = _beside(posixpath.splitext(name)[0], beside, read, where)
            if texts is None:
                lacking.append(name)
            else:
                captions[name] = texts
    used = {posixpath.splitext(name)[0] for name in captions}
    parts = {name for name in lacking if _is_part(name, used)}
    left_out["further pictures of samples, by their names' second suffix"] += len(parts)
    lacking = [name for name in lacking if name not in parts]
    if lists:
        left_out[f"lists beside {lists[0]}"] += len(lists[1:])
        left_out[f"pictures that {lists[0]} does not name"] += len(lacking)
        left_out[f"captions beside pictures that {lists[0]} names"] += sum(
            any((posixpath.splitext(name)[0], kind) in beside for kind in TEXTS) for name in named
        )
    elif lacking:
        raise source_error(_without(lacking, len(pictures), where) + advice)
    if not captions:
        raise no_picture(where, names, advice)
    empty = [name for name, texts in captions.items() if not any(texts)]
    if empty:
        more = f", nor have {len(empty) - 1} others" if empty[1:] else ""
        raise source_error(
            f"picture {empty[0]} of {where} has an empty caption and no other{more}; write one, or remove the picture "
            "(data.empty_prompts sets the share of samples under the empty prompt)"
        )
    left_out["empty captions beside others"] += sum(texts.count("") for texts in captions.values())
    if not lists:
        left_out["text files without a picture"] += sum(kind in TEXTS and stem not in used for stem, kind in beside)
    for name in names:
        if kind_of(name) in KINDS["unread"]:
            left_out[f"{kind_of(name)} files, which are not read"] += 1
        elif is_list(posixpath.basename(name)) and not is_list(name):
            left_out["lists in folders below"] += 1
    kept = {name: list(dict.fromkeys(word for word in texts if word)) for name, texts in captions.items()}
    return Matched(kept, {reason: count for reason, count in left_out.items() if count})


def no_picture(where: str, names: Sequence[str], advice: str = "") -> UserError:
    """Return the error of a folder or shard without pictures that can be read."""
    unread = Counter(kind_of(name) for name in names if kind_of(name) in KINDS["unread"])
    if unread and not advice:
        found = ", ".join(f"{count} {kind}" for kind, count in unread.most_common())
        advice = f"; it holds {found} files, which are not read: convert them to PNG or JPEG"
    return source_error(f"{where} holds no picture ({', '.join(SUFFIXES)}){advice}")


def in_words(left_out: Mapping[str, int]) -> str:
    """Return counts and reasons of what was left out as the end of a line."""
    return "; left out: " + ", ".join(f"{count} {why}" for why, count in left_out.items()) if left_out else ""


def _without(lacking: Sequence[str], of: int, where: str) -> str:
    """Return the error message of pictures without caption."""
    stem = posixpath.splitext(posixpath.basename(lacking[0]))[0]
    more = f", nor have {len(lacking) - 1} others of {of}" if lacking[1:] else ""
    return (
        f"picture {lacking[0]} of {where} has no caption{more}: write {stem}.txt or {stem}.json beside it, or a line "
        f"of {LISTS[0]}"
    )


def _is_part(name: str, used: Collection[str]) -> bool:
    """Return whether a picture is another part of a used sample: 7.mask.png beside 7.jpg (webdataset's names)."""
    folder, base = posixpath.split(name)
    return base.count(".") > 1 and posixpath.join(folder, base.partition(".")[0]) in used


def _beside(
    stem: str, beside: Mapping[tuple[str, str], str], read: Callable[[str], bytes], where: str
) -> list[str] | None:
    """Return the captions of the file beside a picture; [""] for an empty one, None if there is none."""
    found = None
    for kind in BESIDE:
        name = beside.get((stem, kind))
        if name is None:
            continue
        try:
            text = decode(read(name))
            texts = [text.strip()] if kind in TEXTS else _fields(parse_json(text), JSON_FIELDS)
        except (ValueError, OSError) as error:
            raise source_error(f"cannot read caption {name} of {where}: {error}") from error
        if texts and any(texts):
            return texts
        found = texts or found
    return found


def _fields(row: Any, fields: Sequence[str]) -> list[str] | None:
    """Return the captions of the first field that has any, or of a list of texts.

    If all are empty, return those of the first field; None if there is no field.
    """
    empty = None
    for value in [row.get(field) for field in fields] if isinstance(row, dict) else [row]:
        words = [value] if isinstance(value, str) else value
        if isinstance(words, list) and words and all(isinstance(word, str) for word in words):
            texts = [word.strip() for word in words]
            if any(texts):
                return texts
            empty = empty or texts
    return empty


def _finder(find: Callable[[str], str | None], names: Sequence[str]) -> Callable[[str], str | None]:
    """Extend `find` to names with the other kind of slash, and with composed accents."""

    @cache
    def composed() -> dict[str, str]:
        return {normalize("NFC", name): name for name in names}

    return lambda name: find(name) or find(name.replace("\\", "/")) or composed().get(normalize("NFC", name))


def _listed(
    name: str, read: Callable[[str], bytes], find: Callable[[str], str | None], where: str
) -> dict[str, list[str]]:
    """Read the captions of a list, by the pictures that it names."""
    captions: dict[str, list[str]] = {}
    number = 0
    try:
        lines: Iterator[tuple[int, str | dict[str, Any]]]
        if kind_of(name) == ".jsonl":
            lines = ((row, line) for row, line in enumerate(lines_of(decode(read(name))), 1) if line.strip())
        else:
            lines = _csv_rows(read(name))
        while (line := next(lines, None)) is not None:
            number, line_or_row = line
            row = parse_json(line_or_row) if isinstance(line_or_row, str) else line_or_row
            fields = ", ".join(sorted(map(str, row))) if isinstance(row, dict) else "no object"
            named, texts = (row.get("file_name"), _fields(row, LIST_FIELDS)) if isinstance(row, dict) else (None, None)
            if not isinstance(named, str) or not named or texts is None:
                raise ValueError(f"file_name or text is missing, or is no text, among its fields ({fields})")
            found = find(named)
            if found is None:
                raise source_error(f"cannot read picture {named}, which {name} of {where} names: there is no such file")
            captions.setdefault(found, []).extend(texts)
    except (ValueError, OSError, csv.Error) as error:
        place = f"{where}: {name}, line {number}" if number else f"{where}: {name}"
        raise source_error(f"{place}: a list needs lines with file_name and text: {error}") from error
    return captions


def _csv_rows(held: bytes) -> Iterator[tuple[int, str | dict[str, Any]]]:
    """Yield the rows of a CSV file by their columns, each with the number of its last line.

    Raises:
        ValueError: no column file_name, a column that appears twice, or more cells than columns, as where a caption
            with commas is not in quotes.
    """
    reader = csv.DictReader(StringIO(decode(held), newline=""), strict=True)
    columns = reader.fieldnames or []
    if columns and "file_name" not in columns:
        raise ValueError(f"file_name is missing among its columns ({', '.join(columns)})")
    if len(set(columns)) < len(columns):
        raise ValueError(f"a column appears twice ({', '.join(columns)})")
    for row in reader:
        if None in row:
            raise ValueError(
                f"line {reader.line_num} has more cells than there are columns ({len(columns)}); put captions with "
                "commas in quotes"
            )
        yield reader.line_num, row
