"""Path of the bundled world (pictures, captions, models)."""

from __future__ import annotations

import os
from pathlib import Path

from fewstep.common.errors import UserError

ENVIRONMENT = "FEWSTEP_WORLD"
STICKERS, EMOJI8 = "stickers", "emoji8"
"""Folders of the pictures, one of which a world holds."""


def root() -> Path:
    """Return the folder that holds the bundled world (`stickers/` or `emoji8/`, and the models beside it).

    Looked for in this order: the environment variable `FEWSTEP_WORLD`, the checkout's top-level `world/`. It is no
    part of the installed package.

    Raises:
        UserError: neither is a folder, or `FEWSTEP_WORLD` names no folder, or the one above the world's.
    """
    named = os.environ.get(ENVIRONMENT)
    if named:
        folder = Path(named).expanduser()
        if not folder.is_dir():
            raise UserError(f"{ENVIRONMENT}={named} is not a folder; name the one that holds {STICKERS}/, or unset it")
        inner = folder / "world"
        if not _holds_world(folder) and _holds_world(inner):
            raise UserError(f"{ENVIRONMENT}={named} holds the bundled world in a folder of its own; set it to {inner}")
        return folder
    checkout = Path(__file__).resolve().parents[3] / "world"
    if checkout.is_dir():
        return checkout
    raise UserError(f"the bundled world was not found: set {ENVIRONMENT} to the world/ folder of a fewstep checkout")


def _holds_world(folder: Path) -> bool:
    return any((folder / pictures).is_dir() for pictures in (STICKERS, EMOJI8))
