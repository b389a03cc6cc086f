"""KID: the squared maximum mean discrepancy of features under a cubic kernel (arXiv 1801.01401), unbiased.

The usual code averages over random subsets of 1,000. Here all pairs are used, in blocks of rows to bound memory, which
has the least variance on small sets and is unbiased too.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fewstep.common.errors import UserError
from fewstep.evaluation.bootstrap import centred_interval, counts
from fewstep.evaluation.features import Features, SetDistance
from fewstep.evaluation.limits import KID_FEWEST
from fewstep.evaluation.metric import Array, Figure, Identity

RESAMPLES = 200
ROWS = 1024
"""Rows of the kernel matrix held at a time."""

Wide = npt.NDArray[np.float64]


def kernel(x: Array, y: Array) -> Wide:
    """Return k(x, y) = (x.y / D + 1)^3 for all rows of [N, D] and [M, D], float64 [N, M]."""
    product = (x @ y.T).astype(np.float64)
    result: Wide = np.power(product / x.shape[1] + 1, 3, out=product)
    return result


def within(x: Array, weights: Wide) -> Wide:
    """Return the mean of k over ordered pairs of different rows, for each weighting [R, N] of the rows: [R].

    Repeats of one row in a resample are not paired with each other: they are not two independent samples.
    """
    return between_matched(x, x, weights)


def between(x: Array, y: Array, weights_x: Wide, weights_y: Wide) -> Wide:
    """Return the mean of k over pairs of a row of x and a row of y, for each pair of weightings: [R]."""
    total = np.zeros(len(weights_x))
    for start in range(0, len(x), ROWS):
        rows = slice(start, start + ROWS)
        total += ((weights_x[:, rows] @ kernel(x[rows], y)) * weights_y).sum(1)
    mean: Wide = total / (weights_x.sum(1) * weights_y.sum(1))
    return mean


def between_matched(x: Array, y: Array, weights: Wide) -> Wide:
    """Return the mean of k over pairs of row i of x and row j != i of y, for each weighting of the rows of both: [R].

    Rows of equal number are pictures of one prompt: they are more alike than independent samples and would bias the
    distance downwards.
    """
    total = np.zeros(len(weights))
    for start in range(0, len(x), ROWS):
        rows = slice(start, start + ROWS)
        block = kernel(x[rows], y)
        block[np.arange(len(block)), np.arange(start, start + len(block))] = 0
        total += ((weights[:, rows] @ block) * weights).sum(1)
    mean: Wide = total / (np.square(weights.sum(1)) - np.square(weights).sum(1))
    return mean


class KernelDistance(SetDistance):
    """KID of pictures from a set of others, through one network."""

    def __init__(self, features: Features, name: str = "KID-Lite0") -> None:
        identity = Identity(
            name=name,
            group="quality",
            against="real",
            measures="squared kernel distance between the features of two picture sets",
            better="lower",
            unit="",
            reduction=(
                "unbiased squared MMD over all pairs, kernel (x.y / D + 1)^3, "
                f"interval: {RESAMPLES} bootstrap resamples of both sets, centred; of sets that answer the same "
                "prompts, without pairs of one prompt, resampled by prompt"
            ),
            **features.identity_fields,
        )
        super().__init__(features, identity, KID_FEWEST)

    def distance(self, features: Array, against: Array) -> float:
        """Return the distance alone, without an interval."""
        against = self.checked(features, against)
        ours, theirs = np.ones((1, len(features))), np.ones((1, len(against)))
        value = within(features, ours) + within(against, theirs)
        return float((value - 2 * between(features, against, ours, theirs))[0])

    def reduce(self, features: Array, against: Array | None, seed: int, *, matched: bool = False) -> Figure:
        """Return the distance with its interval.

        Args:
            matched: both sets have the same prompts in the same order, and different noise.

        Raises:
            UserError: fewer than 10 pictures on either side, or matched sets of different sizes.
        """
        against = self.checked(features, against)
        if matched and len(features) != len(against):
            raise UserError(f"{len(features)} and {len(against)} pictures cannot have the same prompts")
        ours = _with_resamples(len(features), seed, "kid")
        theirs = ours if matched else _with_resamples(len(against), seed, "kid against")
        values = within(features, ours) + within(against, theirs)
        cross = between_matched(features, against, ours) if matched else between(features, against, ours, theirs)
        values -= 2 * cross
        value = float(values[0])
        return Figure(value, *centred_interval(value, values[1:]), len(features))


def _with_resamples(n: int, seed: int, purpose: str) -> Wide:
    """Return weightings of n rows: all ones in row 0, bootstrap resamples below."""
    return np.concatenate([np.ones((1, n)), counts(n, RESAMPLES, seed, purpose)])
