"""Types of the public functions' arguments, checked in one place before any of them runs."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Callable, Mapping, Sequence
from functools import cache, wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from fewstep.common.errors import UserError

P = ParamSpec("P")
T = TypeVar("T")
STRICT = ConfigDict(strict=True, arbitrary_types_allowed=True)


def argument_types(function: Callable[..., Any]) -> dict[str, Any]:
    """Return the types of a function's arguments by name; its return type may name what is not imported yet."""
    named = {name: kind for name, kind in function.__annotations__.items() if name != "return"}
    return get_type_hints(type(function.__name__, (), {"__annotations__": named}), inspect.unwrap(function).__globals__)


@cache
def _adapters(function: Callable[..., Any]) -> dict[str, TypeAdapter[Any]]:
    return {name: TypeAdapter(kind, config=STRICT) for name, kind in argument_types(function).items()}


def _plain(value: Any) -> Any:
    """Return ranges and numpy's and torch's numbers as Python's lists and numbers, other libraries' paths as `Path`."""
    if isinstance(value, range):
        return list(value)
    if hasattr(value, "shape") and hasattr(value, "tolist"):
        return value.tolist()
    return Path(value) if isinstance(value, os.PathLike) and not isinstance(value, Path) else value


def checked(function: Callable[P, T]) -> Callable[P, T]:
    """Check the arguments of a public function against its annotations, without conversion: "0" is not a number.

    Raises:
        UserError: in the call, an argument of another type.
    """
    signature = inspect.signature(function)

    @wraps(function)
    def call(*args: P.args, **options: P.kwargs) -> T:
        try:
            bound = signature.bind(*args, **options)
        except TypeError:  # Python's own message for an argument that is missing or unknown
            return function(*args, **options)
        for name, adapter in _adapters(function).items():
            if name not in bound.arguments:
                continue
            value = bound.arguments[name]
            plain = _plain(value)
            try:
                adapter.validate_python(plain)
            except ValidationError as error:
                items = [part for part in error.errors()[-1]["loc"] if isinstance(part, int)]
                shown = repr(value) if len(repr(value)) < 80 else f"{repr(value)[:77]}..."
                raise UserError(
                    f"{name} = {shown} is of type {type(value).__name__}{f' (item {items[0]})' if items else ''}; "
                    f"{function.__name__} takes {function.__annotations__[name]}"
                ) from None
            bound.arguments[name] = plain
        return function(*bound.args, **bound.kwargs)

    return call


def arguments_of(like: Callable[P, Any]) -> Callable[[Callable[..., T]], Callable[P, T]]:
    """Give a function of keyword arguments the arguments of another function, with their types and defaults."""
    signature = inspect.signature(like)

    def decorate(function: Callable[..., T]) -> Callable[P, T]:
        @wraps(function)
        def call(*args: P.args, **options: P.kwargs) -> T:
            bound = signature.bind(*args, **options)
            bound.apply_defaults()
            return function(**bound.arguments)

        result = function.__annotations__["return"]
        call.__signature__ = signature.replace(return_annotation=result)  # type: ignore[attr-defined]
        call.__annotations__ = {**like.__annotations__, "return": result}
        return call

    return decorate


def with_options(overrides: Mapping[str, Any] | str | Sequence[str], options: Mapping[str, Any]) -> list[str]:
    """Return overrides (`key=value`) that set the options which are given, then `overrides` over them."""
    given = [f"{key}={value}" for key, value in options.items() if value is not None]
    if isinstance(overrides, Mapping):
        return [*given, *dotted(overrides)]
    return [*given, *([overrides] if isinstance(overrides, str) else overrides)]


def dotted(settings: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Return settings by name as overrides; a section may be a mapping, or a dotted name."""
    found = []
    for name, value in settings.items():
        if isinstance(value, Mapping):
            found += dotted(value, f"{prefix}{name}.")
        else:
            text = str(value) if isinstance(value, str | os.PathLike) else json.dumps(value)
            found.append(f"{prefix}{name}={text}")
    return found
