"""Least numbers of pictures, checked before torch is imported."""

from __future__ import annotations

from pathlib import Path

from fewstep.common.errors import UserError

FD_FEWEST = 500
"""Pictures below which FD is refused: it would mostly measure its own bias."""
FD_ADVISED = 1000
"""Pictures from which FD is worth quoting."""
KID_FEWEST = 10
"""Pictures below which KID is refused."""


def find_real(folder: Path) -> list[Path]:
    """Return the pictures of a folder of real ones.

    Raises:
        UserError: not a folder, or too few pictures in it to measure against.
    """
    from fewstep.data.captions import SUFFIXES
    from fewstep.data.images import find_pictures

    if not folder.is_dir():
        raise UserError(f"real = {str(folder)!r} is not a folder; leave it out for the bundled world's pictures")
    files = find_pictures(folder)
    if len(files) < KID_FEWEST:
        raise UserError(
            f"real = {str(folder)!r} holds {len(files)} pictures ({', '.join(SUFFIXES)}); "
            f"KID needs at least {KID_FEWEST}"
        )
    return files
