"""Prompt files, one prompt a line."""

from __future__ import annotations

import re
from pathlib import Path

from fewstep.common.errors import UserError
from fewstep.common.text import lines_of, read_text
from fewstep.data.captions import KINDS, SUFFIXES


def read_prompts(path: Path | str, field: str = "prompts") -> list[str]:
    """Return the lines of a text file, without those that are empty.

    Args:
        field: the setting that names the file, for errors.

    Raises:
        UserError: missing, a table or an archive by its suffix, not text, or without a prompt.
    """
    check_suffix(path, field)
    try:
        lines = lines_of(read_text(path))
    except OSError as error:
        raise UserError(f"{field} = {str(path)!r} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise UserError(f"{field} = {str(path)!r} is {error}") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"{field} = {str(path)!r} holds no prompt; write one a line")
    return prompts


def check_suffix(path: Path | str, field: str) -> None:
    """Refuse a file that is no list of prompts, by its suffix."""
    suffix = Path(path).suffix.lower()
    picture = {"kind": "one picture", "remedy": "give the folder that it lies in, or a text file", "suffixes": SUFFIXES}
    for each in [*KINDS["no_prompts"], picture]:
        if suffix in each["suffixes"]:
            raise UserError(f"{field} = {str(path)!r} is {each['kind']} ({suffix}); {each['remedy']}")


def is_prompt_file(named: str) -> bool:
    """Return whether a setting names a prompt file, and not a list of the bundled world."""
    return named.endswith(".txt") or (Path(named).is_file() and not is_shards(named))


def is_shards(named: str) -> bool:
    """Return whether a setting names webdataset shards: tar files, by braces ({000..099}) or a pattern (*)."""
    return re.search(r"\.tar(\?|$)", named) is not None
