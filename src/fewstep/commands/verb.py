"""Registers public functions as commands: the signature gives the options, the docstring their help."""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from cyclopts import App, Group, Parameter

from fewstep.common.arguments import argument_types

OPTION_GROUPS = {
    name: Group(title, sort_key=place)
    for place, (title, names) in enumerate(
        {
            "Model": "teacher teacher_config lora style style_scale adapter student",
            "Input": "prompts prompt_file negative_prompt pictures pairs folders image strength "
            "real reference reference_omega split",
            "Sampling": "steps gamma omega guidance_scale sampler width height seed count",
            "Metrics": "suite metrics weights skip_unavailable",
            "Settings": "recipe config overrides settings",
            "Output": "out format scale form push quiet",
            "Machine": "device precision compile batch host port dry_run",
        }.items()
    )
    for name in names.split()
}
"""Option -> its heading in a verb's help."""
FURTHER = Group("Further", sort_key=9)
"""Heading of the other options."""


def print_once(text: str) -> None:
    """Print text, once for all processes of a launch (`torchrun` gives each its RANK)."""
    if os.environ.get("RANK", "0") == "0":
        print(text, flush=True)


def written(result: Any, arguments: Mapping[str, Any]) -> list[str]:
    """Return the line of a verb that returns the file or folder it wrote."""
    return [f"wrote {result}"]


def shown(result: Any, arguments: Mapping[str, Any]) -> list[str]:
    """Return the lines of a verb that returns what it prints."""
    return [str(result)]


def nothing(result: Any, arguments: Mapping[str, Any]) -> list[str]:
    """Return no lines, of a verb that prints by itself."""
    return []


def add(
    app: App,
    function: Callable[..., Any],
    group: Group | None = None,
    *,
    name: str = "",
    show: Callable[[Any, Mapping[str, Any]], Iterable[str]] = written,
    estimate: Callable[..., Any] | None = None,
) -> None:
    """Register a public function as a command.

    Args:
        app: where it is registered.
        function: a `checked` function with a Google-style docstring; Args become the help of the options.
        group: heading in the help of `app`.
        name: of the command; empty for the function's own, with hyphens.
        show: (result, arguments) -> lines to print.
        estimate: function of the same arguments that --dry-run calls instead; it returns an object with `lines()`, or
            a list of them.
    """
    signature = inspect.signature(function)

    def command(*args: Any, dry_run: bool = False, **options: Any) -> None:
        bound = signature.bind(*args, **options)
        bound.apply_defaults()
        if dry_run and estimate is not None:
            parts = estimate(*args, **options)
            lines = [line for part in (parts if isinstance(parts, list) else [parts]) for line in part.lines()]
        else:
            lines = list(show(function(*args, **options), bound.arguments))
        if lines:
            print_once("\n".join(lines))

    kinds = argument_types(function)
    parameters = [
        parameter.replace(annotation=option(name, kinds[name], parameter.default))
        for name, parameter in signature.parameters.items()
        if not any(get_origin(member) is Callable for member in get_args(kinds[name]))  # of Python alone
    ]
    if estimate is not None:
        dry = Annotated[
            bool, Parameter(negative=(), help="print the estimated cost and stop.", group=OPTION_GROUPS["dry_run"])
        ]
        parameters.append(inspect.Parameter("dry_run", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=dry))
    command.__annotations__ = {}
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__doc__ = unwrapped(inspect.getdoc(function) or "")
    app.command(command, name=name or function.__name__.replace("_", "-"), group=group)


def option(name: str, kind: Any, default: Any) -> Any:
    """Return the annotation of a command's option; paths stay text (`Path` would change a hub id's slashes)."""
    members = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    items = [get_args(member)[0] for member in members if get_origin(member) is Sequence]
    numbers = bool(items) and items[0] in (int, float)
    if items:
        members = (list[items[0]], *(member for member in members if member is type(None)))  # type: ignore[valid-type]
    elif str in members:
        members = tuple(member for member in members if member is not Path)
    return Annotated[
        Union[members],  # noqa: UP007
        Parameter(
            name=("--set", "-s") if items and name in ("overrides", "settings") else None,
            negative=None if default is True else (),
            show_default=_default if default not in (None, "", ()) and default is not False else False,
            converter=_whole_numbers if items[:1] == [int] else _whole_number if int in members else None,
            consume_multiple=numbers or None,
            group=OPTION_GROUPS.get(name, FURTHER),
        ),
    ]


def _default(value: Any) -> str:
    return ",".join(value) if isinstance(value, tuple) else str(value)


def _whole_number(kind: Any, tokens: Sequence[Any]) -> int:
    """Convert an option's text; cyclopts itself would round 4.5.

    Raises:
        ValueError: not an integer.
    """
    try:
        return int(tokens[0].value)
    except ValueError:
        raise ValueError(f"{tokens[0].value!r} is not an integer") from None


def _whole_numbers(kind: Any, tokens: Sequence[Any]) -> list[int]:
    """Convert the texts of an option of several integers."""
    return [_whole_number(int, [token]) for token in tokens]


def unwrapped(doc: str) -> str:
    """Return a docstring with each paragraph, and each entry of Args, on one line, for terminals of any width."""
    return re.sub(r"(?<=\S)\n(?=\S)|\n {8}(?=\S)", " ", doc)
