"""Where the bundled world (pictures, captions, models) lies on this machine."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

from fewstep.errors import UserError

ENVIRONMENT = "FEWSTEP_WORLD"
DATA_PACKAGE = "fewstep_world"


def root() -> Path:
    """Return the folder that holds the bundled world (`emoji8/` and the models beside it).

    Looked for in this order: the environment variable `FEWSTEP_WORLD`, the checkout's top-level `world/`,
    the installed data package `fewstep_world`.

    Raises:
        UserError: none of the three is a folder, or `FEWSTEP_WORLD` names something that is not one.
    """
    named = os.environ.get(ENVIRONMENT)
    if named:
        folder = Path(named).expanduser()
        if not folder.is_dir():
            raise UserError(f"{ENVIRONMENT}={named} is not a folder; name the one that holds emoji8/, or unset it")
        return folder
    checkout = Path(__file__).resolve().parents[3] / "world"
    if checkout.is_dir():
        return checkout
    spec = importlib.util.find_spec(DATA_PACKAGE)
    for place in (spec.submodule_search_locations or []) if spec else []:
        if Path(place).is_dir():
            return Path(place)
    raise UserError(
        f"the bundled world was not found: set {ENVIRONMENT} to the world/ folder of a fewstep checkout, "
        f"or install the {DATA_PACKAGE} data package"
    )
