"""Recipes: one short YAML file per row of the table of methods, and per list of stages."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from fewstep.common.choices import check_choice
from fewstep.common.config import read_yaml


def names() -> list[str]:
    """Return the names of the bundled recipes."""
    return sorted(p.name[:-5] for p in resources.files(__name__).iterdir() if p.name.endswith(".yaml"))


NO_ROWS = ("tlcm", "lcm-full", "style")
"""Recipes that are no row of the table: a list of objectives, `lcm` for full training with guidance as an input, and
the training of a style, which distils nothing."""


def rows() -> list[str]:
    """Return the names of the bundled recipes that are rows of the table."""
    return [name for name in names() if name not in NO_ROWS]


def recipe_name(name: str) -> str:
    """Return a recipe's name as it is listed: bundled names are read in any case, paths of YAML files as they are."""
    return name if name.endswith((".yaml", ".yml")) else name.lower()


ABOUT = ("paper", "about")
"""Keys of a recipe that describe it: arXiv number, and what it is good for."""


def describe(name: str, model: type[BaseModel] | None = None) -> dict[str, str]:
    """Return the description of a bundled recipe or YAML file, by the keys of `ABOUT`; an empty string for none."""
    data = _read(name, model)
    return {key: str(data.get(key, "")) for key in ABOUT}


def read_recipe(name: str, model: type[BaseModel] | None = None) -> dict[str, Any]:
    """Return the settings of a bundled recipe by name, or of any YAML file by path.

    Args:
        model: config that the settings are for, see `read_yaml`.

    Raises:
        UserError: no such recipe.
    """
    return {key: value for key, value in _read(name, model).items() if key not in ABOUT}


def _read(name: str, model: type[BaseModel] | None = None) -> Mapping[str, Any]:
    """Return everything in a recipe's file."""
    name = recipe_name(name)
    if name.endswith((".yaml", ".yml")):
        return read_yaml(Path(name), model)
    check_choice("recipe", name, names())
    return _bundled(name, model)


@cache
def _bundled(name: str, model: type[BaseModel] | None) -> Mapping[str, Any]:
    """Return everything in a bundled recipe's file."""
    return read_yaml(Path(str(resources.files(__name__) / f"{name}.yaml")), model)
