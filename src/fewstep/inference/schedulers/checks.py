"""Checks of the arguments of our diffusers schedulers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Real
from typing import Any, get_args

import numpy as np

from fewstep.backbones.scheduler_config import PREDICTIONS
from fewstep.common.choices import End, Form, GammaRule, Spacing, check_choice
from fewstep.common.errors import UserError


class SchedulerError(UserError, ValueError):
    """A wrong argument of a scheduler; a ValueError too, as diffusers' own errors are."""


@contextmanager
def scheduler_errors() -> Iterator[None]:
    """Raise a UserError of the block as a SchedulerError."""
    try:
        yield
    except UserError as error:
        raise SchedulerError(str(error), field=error.field) from None


def check_words(config: Mapping[str, Any], jumps: Sequence[str]) -> None:
    """Refuse illegal words in the settings of a scheduler, whose `jump` is one of `jumps`."""
    legal: dict[str, Sequence[str]] = {
        **{"gamma_law": get_args(GammaRule), "jump": jumps, "path": ("vp", "flow"), "prediction_type": [*PREDICTIONS]},
        **{"spacing": get_args(Spacing), "end": get_args(End), "form": get_args(Form)},
    }
    with scheduler_errors():
        for field, words in legal.items():
            check_choice(field, str(config.get(field, words[0])), words)


def _real(field: str, value: Any) -> float:
    """Return a number of Python or numpy, or a tensor of a whole number, as a float."""
    if isinstance(value, bool) or not (isinstance(value, Real) or hasattr(value, "__index__")):
        raise SchedulerError(f"{field} = {value!r} must be a number, not a {type(value).__name__}")
    return float(value)


def check_number(field: str, value: object, low: float, high: float) -> float:
    """Return a number as a float; refuse one outside [low, high]."""
    number = _real(field, value)
    if not low <= number <= high:
        raise SchedulerError(f"{field} = {value!r} must be at least {low:g} and at most {high:g}")
    return number


def check_strength(strength: object) -> None:
    """Refuse a share of the noise to begin at that is outside (0, 1]."""
    if not 0 < _real("strength", strength) <= 1:
        raise SchedulerError(f"strength = {strength} must be above 0 and at most 1")


def check_count(count: object) -> int:
    """Return a number of jumps as an int; refuse one that is not whole."""
    number = _real("num_inference_steps", count)
    if not number.is_integer():
        raise SchedulerError(f"num_inference_steps = {count!r} must be a whole number")
    return int(number)


def count_of_sigmas(sigmas: Sequence[float], count: int | None) -> int:
    """Return the number of jumps of the list 1, 1 - 1/n, ..., 1/n that Flux's pipeline passes to every scheduler.

    Other sigmas are refused: a student has times of its own.

    Args:
        count: num_inference_steps, if it is given as well.
    """
    try:
        given = np.array([float(sigma) for sigma in sigmas])
    except (TypeError, ValueError):
        given = np.zeros(0)
    n = len(given)
    if not n or not np.allclose(given, np.linspace(1.0, 1 / n, n), atol=1e-6):
        shown = f"{', '.join(f'{sigma:g}' for sigma in given[:4])}{', ...' * (n > 4)}" if n else repr(sigmas)
        raise SchedulerError(
            f"sigmas = {shown} cannot be set, as a student has times of its own; give num_inference_steps"
        )
    if count not in (None, n):
        raise SchedulerError(f"num_inference_steps = {count!r} is not the number of sigmas; use {n}")
    return n


def check_origin(original_inference_steps: int, grid: int | Sequence[float]) -> None:
    """Refuse another training grid than the scheduler's own."""
    points = grid if isinstance(grid, int) else len(grid)
    if original_inference_steps != points:
        raise SchedulerError(
            f"original_inference_steps = {original_inference_steps} differs from this scheduler's grid; use {points}"
        )
