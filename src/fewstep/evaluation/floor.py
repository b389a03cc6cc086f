"""Real versus real: the figure that pictures as good as the real ones would get."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from fewstep.draws import generator
from fewstep.errors import UserError
from fewstep.evaluation.metric import Array, Figure


def real_versus_real(
    distance: Callable[[Array, Array], float], features: Array, n: int, seed: int, repeats: int = 5
) -> Figure:
    """Measure n real pictures against the rest of them, `repeats` times with other pictures.

    Args:
        distance: of features [n, D] from features [N - n, D], e.g. `FrechetDistance.distance`.
        features: of all real pictures, [N, D].
        n: pictures in a repeat.
        seed: of the drawing of those.
        repeats: how often.

    Returns:
        The mean, with the smallest and the largest of the repeats for an interval.

    Raises:
        UserError: n leaves no picture to measure against.
    """
    if not 0 < n < len(features):
        raise UserError(f"n={n} of {len(features)} real pictures leaves none to measure against; halve it")
    values = []
    for repeat in range(repeats):
        shuffled = generator(seed, "real versus real", step=repeat).permutation(len(features))
        values.append(distance(features[shuffled[:n]], features[shuffled[n:]]))
    return Figure(float(np.mean(values)), min(values), max(values), n)
