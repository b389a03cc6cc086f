"""Stratified times for roll-outs, so that all micro-batches make calls of nearly the same numbers of rows.

Processes with sharded weights must call the network equally often, and a compiled network has a graph for each number
of rows. Samples therefore take the R parts of the grid in turn: R samples in a row have every length once (where R
divides the grid's points), fewer of them well spread lengths.
"""

from __future__ import annotations

from math import gcd

import torch
from torch import Tensor

from fewstep.common.rng import KeyedRng


def stride(count: int) -> int:
    """Return the step between the parts of samples in a row, which visits all `count` parts.

    It is the number coprime to `count` that is nearest to its golden section, so that few samples are well spread.
    """
    return min((n for n in range(1, count + 1) if gcd(n, count) == 1), key=lambda n: abs(n - 0.618 * count))


def in_turn(rng: KeyedRng, count: int, points: int) -> Tensor:
    """Draw grid indices of `points` stratified over `count` parts, int64 [B].

    Each training step begins at a random part, so that each sample's index is uniform.
    """
    turn = torch.tensor(rng.indices) * stride(count) + rng.shared("part", 0, count)
    return (turn % count * points + rng.integers("n", 0, points)) // count
