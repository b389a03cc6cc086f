"""Bootstrap intervals of figures."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fewstep.common.errors import UserError
from fewstep.common.random_streams import generator
from fewstep.evaluation.metric import Array, Figure

RESAMPLES = 1000
"""Resamples of a mean. Distances between sets use fewer, because each costs more."""
COVER = 0.95


def counts(n: int, resamples: int, seed: int, purpose: str) -> npt.NDArray[np.float64]:
    """Return how often each of n items occurs in each resample of n with replacement, [resamples, n]."""
    return generator(seed, purpose).multinomial(n, np.full(n, 1 / n), size=resamples).astype(np.float64)


def centred_interval(value: float, resampled: Array) -> tuple[float, float]:
    """Return the interval of `resampled` figures, shifted so that their mean is `value`.

    Resampling repeats pictures, which biases a distance between sets upwards; only the spread is used.
    """
    low, high = np.quantile(resampled - resampled.mean(), [(1 - COVER) / 2, (1 + COVER) / 2])
    return float(value + low), float(value + high)


def mean_figure(scores: Array, seed: int, purpose: str = "bootstrap") -> Figure:
    """Return the mean of N numbers with its interval (None for a single number).

    Raises:
        UserError: there are no numbers, or one is not finite.
    """
    wide = np.asarray(scores, dtype=np.float64)
    if wide.ndim != 1 or not len(wide):
        raise UserError(f"scores have the shape {list(wide.shape)}; give at least 1 number in one dimension")
    if not np.isfinite(wide).all():
        raise UserError(f"score {int(np.flatnonzero(~np.isfinite(wide))[0])} is not finite, and so is no mean")
    value = float(wide.mean())
    if len(wide) == 1:
        return Figure(value, None, None, 1)
    resampled = counts(len(wide), RESAMPLES, seed, purpose) @ wide / len(wide)
    return Figure(value, *centred_interval(value, resampled), len(wide))


def paired_difference(ours: Array, theirs: Array, seed: int) -> Figure:
    """Return the mean of ours - theirs over prompts, with its interval; both are of the same prompts.

    Raises:
        UserError: not the same number of prompts.
    """
    if len(ours) != len(theirs):
        raise UserError(f"{len(ours)} scores cannot be paired with {len(theirs)}; give one of each per prompt")
    return mean_figure(np.asarray(ours, dtype=np.float64) - theirs, seed, "paired")
