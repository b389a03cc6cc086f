"""Recipes: one short YAML file per row of the table of methods."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

from fewstep.config import read_yaml
from fewstep.errors import UserError, nearest


def names() -> list[str]:
    """The bundled recipes."""
    return sorted(p.name[:-5] for p in resources.files(__name__).iterdir() if p.name.endswith(".yaml"))


def read_recipe(name: str) -> dict[str, Any]:
    """Read a bundled recipe by name, or any YAML file by path.

    Raises:
        UserError: no such recipe.
    """
    if name.endswith((".yaml", ".yml")):
        return read_yaml(Path(name))
    if name not in names():
        known = names()
        raise UserError(f"recipe = {name!r} is not one of {', '.join(known)}; the nearest is {nearest(name, known)}")
    return read_yaml(Path(str(resources.files(__name__) / f"{name}.yaml")))
