"""Types of the public functions' arguments, checked in one place before any of them runs."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from functools import cache, wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from fewstep.common.errors import UserError

P = ParamSpec("P")
T = TypeVar("T")
STRICT = ConfigDict(strict=True, arbitrary_types_allowed=True)


@cache
def _adapters(function: Callable[..., Any]) -> dict[str, TypeAdapter[Any]]:
    """One validator for each annotated parameter; the return type may name what is not imported yet."""
    named = {name: kind for name, kind in function.__annotations__.items() if name != "return"}
    stand_in = type(function.__name__, (), {"__annotations__": named})
    hints = get_type_hints(stand_in, function.__globals__)
    return {name: TypeAdapter(kind, config=STRICT) for name, kind in hints.items()}


def _plain(value: Any) -> Any:
    """Return numbers and lists of numpy and torch as Python's, and paths of other libraries as `Path`."""
    if hasattr(value, "shape") and hasattr(value, "tolist"):
        return value.tolist()
    return Path(value) if isinstance(value, os.PathLike) and not isinstance(value, Path) else value


def checked(function: Callable[P, T]) -> Callable[P, T]:
    """Check the arguments of a public function by its annotations, without converting: "0" is no number.

    Raises:
        UserError: in the call, an argument of another type, naming it.
    """
    signature = inspect.signature(function)

    @wraps(function)
    def call(*args: P.args, **options: P.kwargs) -> T:
        try:
            bound = signature.bind(*args, **options)
        except TypeError:  # Python's own words for an argument that is missing or unknown
            return function(*args, **options)
        for name, value in bound.arguments.items():
            adapter = _adapters(function).get(name)
            if adapter is None:
                continue
            plain = _plain(value)
            try:
                adapter.validate_python(plain)
            except ValidationError as error:
                places = [part for part in error.errors()[-1]["loc"] if isinstance(part, int)]
                shown = repr(value) if len(repr(value)) < 80 else f"{repr(value)[:77]}..."
                raise UserError(
                    f"{name} = {shown} is of type {type(value).__name__}{f' (item {places[0]})' if places else ''}; "
                    f"{function.__name__} takes {function.__annotations__[name]}"
                ) from None
            bound.arguments[name] = plain
        return function(*bound.args, **bound.kwargs)

    return call
