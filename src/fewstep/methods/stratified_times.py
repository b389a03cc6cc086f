"""Roll-outs of different lengths, in calls that are much alike for all micro-batches.

Processes whose weights are split must call the network as often as one another, and a compiled network has a graph for
each number of rows. So lengths are not left to chance: samples take the R parts of the grid in turn. In R samples in a
row every length stands once (where R divides the grid's points), in fewer of them the lengths are well spread; a round
is then of as many rows in every micro-batch of a multiple of R, and of one more or less in others.
"""

from __future__ import annotations

from math import gcd

import torch
from torch import Tensor

from fewstep.common.rng import KeyedRng


def stride(count: int) -> int:
    """How far samples in a row step through `count` parts: all of them in turn, a few already well spread.

    The nearest number to the golden section of `count` that shares no divisor with it.
    """
    return min((n for n in range(1, count + 1) if gcd(n, count) == 1), key=lambda n: abs(n - 0.618 * count))


def in_turn(rng: KeyedRng, count: int, points: int) -> Tensor:
    """Where on a grid of `points` samples start, int64 [B]: `count` samples in a row take its `count` parts in turn.

    Each step begins at a part of its own, so that each sample's index is uniform, as it is elsewhere; but the samples
    of a step together are spread evenly, which independent draws are on average alone.
    """
    turn = torch.tensor(rng.indices) * stride(count) + rng.shared("part", 0, count)
    return (turn % count * points + rng.integers("n", 0, points)) // count
