"""Typed configuration: YAML files, dotted overrides, one-line errors.

Every config of the project is a frozen pydantic model. Recipes, YAML files and `a.b.c=value` overrides are merged over
its defaults and validated here.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator, model_validator

from fewstep.common import core_yaml
from fewstep.common.errors import STATED, UserError, did_you_mean
from fewstep.common.text import read_text


class Config(BaseModel):
    """Base of every config: frozen, without unknown keys and infinities; numbers become text in text fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, coerce_numbers_to_str=True)

    renamed: ClassVar[Mapping[str, str]] = {}
    """Old names of fields -> their names, for files that an earlier version wrote."""

    @model_validator(mode="before")
    @classmethod
    def _current_names(cls, data: Any) -> Any:
        """Rename old names; values under old names override those under current ones."""
        if not isinstance(data, Mapping) or not cls.renamed.keys() & data.keys():
            return data
        current = {name: value for name, value in data.items() if name not in cls.renamed}
        return merge(current, {new: data[old] for old, new in cls.renamed.items() if old in data})

    @field_validator("*", mode="before")
    @classmethod
    def _numbers_are_no_truth_values(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse true and false for numbers; pydantic would read true as 1."""
        if isinstance(value, bool) and info.field_name is not None:
            annotation = cls.model_fields[info.field_name].annotation
            if not core_yaml.takes_truth(annotation):
                raise ValueError("must be a number or a word, not true or false")
        return value


ConfigT = TypeVar("ConfigT", bound=Config)


def read_yaml(path: Path | str, model: type[BaseModel] | None = None) -> dict[str, Any]:
    """Read a YAML mapping.

    Args:
        model: config of the mapping; plain scalars of its text fields stay text.

    Raises:
        UserError: missing, unreadable, not YAML, a key that appears twice, or not a mapping.
    """
    path = Path(path)
    try:
        data = core_yaml.load(read_text(path), model)
    except OSError as error:
        raise UserError(f"cannot read config {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise UserError(f"{path} must hold a mapping of keys to values, not {type(data).__name__}")
    return data


def merge(base: Mapping[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    """Return `base` overridden by `change`; nested mappings are merged, other values replaced.

    A mapping over a list of named items (stages) changes the items that it names.

    Raises:
        UserError: an item of that name does not exist.
    """
    result = dict(base)
    for key, value in change.items():
        old = result.get(key)
        if isinstance(old, Mapping) and isinstance(value, Mapping):
            result[key] = merge(old, value)
        elif isinstance(old, list | tuple) and _are_named(old) and isinstance(value, Mapping):
            result[key] = _merge_named(key, old, value)
        else:
            result[key] = value
    return result


def _are_named(items: Sequence[Any]) -> bool:
    """Return whether all items are mappings with a name."""
    return bool(items) and all(isinstance(item, Mapping) and "name" in item for item in items)


def _merge_named(key: str, items: Sequence[Any], change: Mapping[str, Any]) -> list[Any]:
    """Return a list of named mappings with changes to some of them."""
    names = [str(item["name"]) for item in items]
    for name, own in change.items():
        if name not in names:
            known = f"{key} holds {', '.join(names)}{did_you_mean(str(name), names)}"
            raise UserError(f"{key}.{name}: {known}", field=f"{key}.{name}")
        if not isinstance(own, Mapping):
            raise UserError(f"{key}.{name} = {own!r} must be a mapping, e.g. {{share: 100}}")
    return [merge(item, change.get(name, {})) for name, item in zip(names, items, strict=True)]


def parse_overrides(overrides: str | Iterable[str], model: type[BaseModel] | None = None) -> dict[str, Any]:
    """Parse ["optim.lr=1e-4", ...], or one such string, to a nested mapping.

    Values of text fields are taken literally, without quotes around them; others are YAML.

    Args:
        model: config of the overrides; None reads every value as YAML.

    Raises:
        UserError: an override without `=`, with an empty key, or with a value that is not YAML.
    """
    result: dict[str, Any] = {}
    for override in [overrides] if isinstance(overrides, str) else overrides:
        key, equals, text = override.partition("=")
        parts = key.split(".")
        if key != key.strip():
            raise UserError(f"override {override!r}: write {key.strip()}={text.strip()}, without spaces around the =")
        if not equals or not key or "" in parts:
            raise UserError(f"override {override!r} is not of the form key=value, e.g. optim.lr=1e-4")
        try:
            value = core_yaml.parse(text, core_yaml.annotation_at(model, parts))
        except ValueError as error:
            raise UserError(
                f"override {override!r}: {text!r} is not a YAML value ({' '.join(str(error).split())})"
            ) from error
        for part in reversed(parts):
            value = {part: value}
        result = merge(result, value)
    return result


def dotted_keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Return every key of a config with its section: ["loop", "loop.steps", ...]."""
    keys = []
    for name, field in model.model_fields.items():
        keys.append(prefix + name)
        nested = core_yaml.model_of(field.annotation)
        if nested is not None:
            keys += dotted_keys(nested, f"{prefix}{name}.")
    return keys


def similar_key(model: type[BaseModel], wrong: str) -> str:
    """Return "; did you mean x?" for the dotted key with the most similar last word; empty if none is similar.

    Ties go to the same section, then to the top level.
    """
    section, _, word = wrong.rpartition(".")

    def likeness(key: str) -> tuple[float, int]:
        own_section, _, own_word = key.rpartition(".")
        alike = difflib.SequenceMatcher(None, word, own_word).ratio() + 0.2 * (own_section == section)
        return alike, -key.count(".")

    best = max(dotted_keys(model), key=likeness)
    return f"; did you mean {best}?" if likeness(best)[0] >= 0.75 else ""


BOUNDS = {
    "greater_than_equal": ("ge", "at least"),
    "less_than_equal": ("le", "at most"),
    "greater_than": ("gt", "above"),
    "less_than": ("lt", "below"),
}
"""pydantic's error type -> (name of the bound in it, words)."""

SHAPES = {
    "tuple_type": "a list, e.g. [a, b]",
    "list_type": "a list, e.g. [a, b]",
    "model_type": "a mapping of keys to values",
    "dict_type": "a mapping of keys to values",
    "string_type": "text",
}
"""pydantic's error type -> the required kind of value."""


def _located(error: ValidationError) -> tuple[str, str]:
    """Return the dotted name of the first wrong field and the message about it, which names the field first."""
    first = error.errors()[0]
    place, given = ".".join(str(part) for part in first["loc"]), first["input"]
    message = first["msg"].removeprefix("Value error, ")
    if not isinstance(given, Mapping | BaseModel):
        return place, f"{place} = {given!r}: {message}"
    stated = STATED.match(message)
    if stated is None:
        return place, f"{place}: {message}" if place else message
    if not place or stated[1].startswith(f"{place}."):
        return stated[1], message
    return f"{place}.{stated[1]}", f"{place}.{message}"


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """Return the first error of pydantic as one line: field, value, reason, remedy."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    kind, given = first["type"], first["input"]
    if kind == "extra_forbidden" and "." in str(first["loc"][-1]):
        *sections, last = str(first["loc"][-1]).split(".")
        nested = "".join(f"{section}: {{" for section in sections) + f"{last}: ..." + "}" * len(sections)
        return f"unknown key {where}; in a mapping sections are nested: {nested}"
    if kind == "extra_forbidden":
        return f"unknown key {where}{similar_key(model, where)}"
    if kind == "missing":
        return f"{where} is missing"
    if kind == "literal_error":
        legal = [word.strip("' ") for word in first["ctx"]["expected"].replace(" or ", ", ").split(",")]
        return f"{where} = {given!r} is not one of {', '.join(legal)}{did_you_mean(str(given), legal)}"
    if kind in BOUNDS:
        name, words = BOUNDS[kind]
        bound = first["ctx"][name]
        return f"{where} = {given!r} must be {words} {bound:g}"
    if kind in SHAPES and where:
        return f"{where} = {given!r} must be {SHAPES[kind]}"
    return _located(error)[1]


def section_defaults(model: type[BaseModel]) -> dict[str, Any]:
    """Return the values that a model's defaults set in its sections, so that one key of a section can be overridden."""
    return {
        name: merge(section_defaults(type(field.default)), field.default.model_dump(exclude_unset=True))
        for name, field in model.model_fields.items()
        if isinstance(field.default, BaseModel)
    }


def validate(model: type[ConfigT], data: Mapping[str, Any]) -> ConfigT:
    """Build a config from a mapping over the defaults of its sections.

    Raises:
        UserError: for the first wrong field.
    """
    try:
        return model.model_validate(merge(section_defaults(model), data))
    except ValidationError as error:
        raise UserError(explain(error, model), field=_located(error)[0]) from error


def first_difference(old: Any, new: Any, prefix: str = "") -> str:
    """Describe the first entry in which two nested mappings differ, with both values."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *new]:
            if old.get(key) != new.get(key):
                return first_difference(old.get(key), new.get(key), f"{prefix}.{key}" if prefix else str(key))
    return f"{prefix} ({old!r}, now {new!r})"


def as_pair(size: Any) -> Any:
    """Return a size of pictures as (width, height): 96, [96, 64] and "96x64" are understood; others as they are."""
    if isinstance(size, str):
        found = re.fullmatch(r"\s*(\d+)(?:\s*[x×,]\s*(\d+))?\s*", size)
        return (int(found[1]), int(found[2] or found[1])) if found else size
    return (size, size) if isinstance(size, int) and not isinstance(size, bool) else size
