"""Typed configuration: YAML files, dotted overrides, one-line refusals.

Every config of the project is a frozen pydantic model; `resolve` builds one from a recipe, a YAML file and
`a.b.c=value` overrides, in that order, and names the nearest known key for every unknown one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from fewstep.errors import UserError, nearest


class Config(BaseModel):
    """Base of every config: frozen, and closed to unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


ConfigT = TypeVar("ConfigT", bound=Config)


def read_yaml(path: Path | str) -> dict[str, Any]:
    """Read a YAML mapping.

    Raises:
        UserError: missing, unreadable, not YAML, or not a mapping.
    """
    path = Path(path)
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read config {path}: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise UserError(f"{path} must hold a mapping of keys to values, not {type(data).__name__}")
    return data


def merge(base: Mapping[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    """Return `base` with `change` laid over it; nested mappings are merged, anything else is replaced."""
    result = dict(base)
    for key, value in change.items():
        old = result.get(key)
        result[key] = merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return result


def parse_overrides(overrides: Iterable[str]) -> dict[str, Any]:
    """Turn ["optim.lr=1e-4", ...] into a nested mapping; values are read as YAML.

    Raises:
        UserError: an override without `=`, or with an empty key.
    """
    result: dict[str, Any] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key or "" in key.split("."):
            raise UserError(f"override {override!r} is not of the form key=value, e.g. optim.lr=1e-4")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise UserError(f"override {override!r}: {text!r} is not a YAML value") from error
        if isinstance(value, str):  # YAML 1.1 reads 1e-4 as a string
            try:
                value = float(value)
            except ValueError:
                pass
        for part in reversed(key.split(".")):
            value = {part: value}
        result = merge(result, value)
    return result


def _keys_at(model: type[BaseModel], path: tuple[Any, ...]) -> list[str]:
    """The legal keys of the (nested) model that `path` leads to."""
    for part in path:
        field = model.model_fields.get(str(part))
        if field is None:
            continue
        nested = [a for a in (field.annotation, *get_args(field.annotation)) if isinstance(a, type)]
        nested = [a for a in nested if issubclass(a, BaseModel)]
        if nested:
            model = nested[0]
    return list(model.model_fields)


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """Turn the first complaint of pydantic into one line: field, value, nearest legal value."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        legal = _keys_at(model, first["loc"][:-1])
        best = nearest(str(first["loc"][-1]), legal)
        prefix = ".".join(str(part) for part in first["loc"][:-1])
        return f"unknown key {where}; the nearest known one is {prefix + '.' if prefix else ''}{best}"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "missing":
        return f"{where} is missing"
    if first["type"] == "literal_error":
        legal = [word.strip("' ") for word in first["ctx"]["expected"].replace(" or ", ", ").split(",")]
        best = nearest(str(first["input"]), legal)
        return f"{where} = {first['input']!r} is not one of {', '.join(legal)}; the nearest is {best}"
    return f"{where} = {first['input']!r}: {message}" if where else message


def validate(model: type[ConfigT], data: Mapping[str, Any]) -> ConfigT:
    """Build a config from a mapping.

    Raises:
        UserError: one line naming the first wrong field, its value and the nearest legal one.
    """
    try:
        return model.model_validate(dict(data))
    except ValidationError as error:
        raise UserError(explain(error, model)) from error
