"""What our diffusers schedulers refuse, and as what."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from numbers import Real
from typing import Any, get_args

import numpy as np

from fewstep.backbones.scheduler_config import PREDICTIONS
from fewstep.common.choices import End, Form, Spacing
from fewstep.common.errors import UserError, nearest


class SchedulerError(UserError, ValueError):
    """A request that a scheduler refuses; a ValueError too, as diffusers' own refusals are."""


@contextmanager
def refusing() -> Iterator[None]:
    """Let refusals of the functions below be a scheduler's own."""
    try:
        yield
    except UserError as error:
        raise SchedulerError(str(error)) from None


def check_word(field: str, value: str, legal: Sequence[str]) -> None:
    """Refuse a word that is none of the legal ones."""
    if value not in legal:
        raise SchedulerError(
            f"{field} = {value!r} is not one of {', '.join(legal)}; the nearest is {nearest(value, legal)!r}"
        )


def nearest_number(value: Any, low: float, high: float) -> float:
    """The number from low to high that is nearest to a value; low where it says none."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return low
    return min(max(number, low), high) if number == number else low


def _real(field: str, value: Any, legal: float) -> float:
    """A number as a plain one; it may be numpy's, or a tensor of a whole one."""
    if isinstance(value, bool) or not (isinstance(value, Real) or hasattr(value, "__index__")):
        raise SchedulerError(
            f"{field} = {value!r} is no number but a {type(value).__name__}; the nearest legal one is {legal:g}"
        )
    return float(value)


def check_number(field: str, value: object, low: float, high: float) -> float:
    """Refuse what is no number from low to high."""
    legal = nearest_number(value, low, high)
    number = _real(field, value, legal)
    if not low <= number <= high:
        raise SchedulerError(f"{field} = {value!r} is outside [{low:g}, {high:g}]; the nearest legal one is {legal:g}")
    return number


def check_strength(strength: object) -> None:
    """Refuse what is no share of the noise to begin at."""
    legal = nearest_number(strength, 0.01, 1.0)
    if not 0 < _real("strength", strength, legal) <= 1:
        raise SchedulerError(f"strength = {strength} is outside (0, 1]; the nearest legal one is {legal:g}")


def check_count(count: object) -> int:
    """The number of jumps that is asked for, if it is one."""
    legal = max(1, round(nearest_number(count, 1, 1000)))
    whole = _real("num_inference_steps", count, legal)
    if not whole.is_integer():
        raise SchedulerError(f"num_inference_steps = {count!r} is no whole number; the nearest is {legal}")
    return int(whole)


def count_of_sigmas(sigmas: Sequence[float], count: int | None) -> int:
    """How many jumps sigmas stand for: the plain list 1, 1 - 1/n, ..., 1/n that Flux's pipeline hands to every
    scheduler; a student has times of its own.

    Args:
        count: how many are asked for beside them, if it is said.
    """
    try:
        given = np.array([float(sigma) for sigma in sigmas])
    except (TypeError, ValueError):
        given = np.zeros(0)
    n = len(given)
    if not n or not np.allclose(given, np.linspace(1.0, 1 / n, n), atol=1e-6):
        shown = f"{', '.join(f'{sigma:g}' for sigma in given[:4])}{', ...' * (n > 4)}" if n else repr(sigmas)
        raise SchedulerError(
            f"sigmas = {shown} are not taken: a student has times of its own; the nearest is "
            f"num_inference_steps = {count or n or 4}"
        )
    if count not in (None, n):
        raise SchedulerError(f"num_inference_steps = {count!r} is not the number of sigmas; the nearest is {n}")
    return n


def check_common(path: str, prediction_type: str, spacing: str, end: str, form: str) -> None:
    """Refuse what no scheduler takes."""
    check_word("path", path, ("vp", "flow"))
    check_word("prediction_type", prediction_type, tuple(PREDICTIONS))
    check_word("spacing", spacing, get_args(Spacing))
    check_word("end", end, get_args(End))
    check_word("form", form, get_args(Form))


def check_origin(original_inference_steps: int, grid: int | Sequence[float]) -> None:
    """Refuse another training grid than the scheduler's own."""
    points = grid if isinstance(grid, int) else len(grid)
    if original_inference_steps != points:
        raise SchedulerError(
            f"original_inference_steps = {original_inference_steps} is not this scheduler's grid; the nearest legal "
            f"one is {points}"
        )
