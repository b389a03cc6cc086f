"""Refuse a set of real pictures that is too small to measure against."""

from __future__ import annotations

from pathlib import Path

from fewstep.common.errors import UserError
from fewstep.evaluation.limits import KID_FEWEST


def check_real(folder: Path) -> None:
    """Refuse a folder without enough pictures to measure against.

    Raises:
        UserError: it is one.
    """
    from fewstep.data.captions import SUFFIXES
    from fewstep.data.images import find_pictures

    count = len(find_pictures(folder))
    if not folder.is_dir():
        raise UserError(f"real = {str(folder)!r} is not a folder; leave it out for Emoji-8")
    if count < KID_FEWEST:
        raise UserError(
            f"real = {str(folder)!r} holds {count} pictures ({', '.join(SUFFIXES)}); KID needs at least {KID_FEWEST}"
        )
