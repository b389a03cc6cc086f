"""The pictures and captions that the steps of a run use: random numbers are keyed, so they are known beforehand."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from fewstep.common.rng import KeyedRng
from fewstep.data.latents import DataIdentity, Wanted, drawn_captions


def used(
    identity: DataIdentity, visits: Callable[[int, int], np.ndarray], steps: range, batch: int, seed: int, empty: float
) -> Wanted:
    """Return the pictures and captions that some steps use, or all if that saves little.

    Args:
        visits: (start, stop) -> the items at these positions of the order of visits.
        batch: samples a step, over all processes.
        empty: share of samples that are trained with the empty prompt.
    """
    samples, count = len(steps) * batch, len(identity.prompts)
    if samples >= 2 * max(len(identity.rows), count):
        return Wanted()
    pictures, captions = [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=np.int64)]
    for step in steps:
        items = visits(step * batch, (step + 1) * batch)
        rng = KeyedRng(seed, step, tuple(range(step * batch, (step + 1) * batch)))
        pictures.append(items)
        captions.append(drawn_captions(identity.rows, count, torch.from_numpy(items), rng, empty).numpy())
    used_captions = np.unique(np.concatenate(captions))
    return Wanted(np.unique(np.concatenate(pictures)), used_captions[used_captions < count])
