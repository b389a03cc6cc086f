"""Prompt files: one prompt a line; and what a setting that names a source means."""

from __future__ import annotations

import re
from pathlib import Path

from fewstep.errors import UserError


def read_prompts(path: Path | str, field: str = "prompts") -> list[str]:
    """Read the non-empty lines of a UTF-8 text file.

    Args:
        field: the setting that names the file, for errors.

    Raises:
        UserError: missing, not text, or without a prompt.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise UserError(f"{field} = {str(path)!r} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{field} = {str(path)!r} is not UTF-8 text: {error}") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"{field} = {str(path)!r} holds no prompt; write one a line")
    return prompts


def is_prompt_file(named: str) -> bool:
    """Whether a setting means a file and not a bundled list."""
    return named.endswith(".txt") or (Path(named).is_file() and not is_shards(named))


def is_shards(named: str) -> bool:
    """Whether a setting means webdataset shards: one tar file, or several by braces ({000..099}) or a pattern (*)."""
    return re.search(r"\.tar(\?|$)", named) is not None
