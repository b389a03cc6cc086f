"""Path of the bundled world (pictures, captions, models)."""

from __future__ import annotations

import os
from pathlib import Path

from fewstep.common.errors import UserError

ENVIRONMENT = "FEWSTEP_WORLD"
STICKERS = "stickers"
"""Folder of the sprite sheets in the world's."""
PACKAGED = Path(__file__).resolve().parents[1] / "bundled"
"""The world in an installed package."""
CHECKOUT = Path(__file__).resolve().parents[3] / "world"
"""The world in a checkout."""


def root() -> Path:
    """Return the folder that holds the bundled world (`stickers/`, and the models beside it).

    Looked for in this order: the environment variable `FEWSTEP_WORLD`, the installed package, the checkout's top-level
    `world/`.

    Raises:
        UserError: neither is a folder, or `FEWSTEP_WORLD` names no folder, or the one above the world's.
    """
    named = os.environ.get(ENVIRONMENT)
    if named:
        folder = Path(named).expanduser()
        if not folder.is_dir():
            raise UserError(f"{ENVIRONMENT}={named} is not a folder; name the one that holds {STICKERS}/, or unset it")
        inner = folder / "world"
        if not (folder / STICKERS).is_dir() and (inner / STICKERS).is_dir():
            raise UserError(f"{ENVIRONMENT}={named} holds the bundled world in a folder of its own; set it to {inner}")
        return folder
    found = next((folder for folder in (PACKAGED, CHECKOUT) if folder.is_dir()), None)
    if found is None:
        raise UserError(f"the bundled world is missing; set {ENVIRONMENT} to the world/ folder of a fewstep checkout")
    return found
