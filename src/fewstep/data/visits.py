"""Which pictures and captions the steps of a run will ask for: draws are keyed, so that it is known beforehand."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from fewstep.common.rng import KeyedRng
from fewstep.data.latents import Known, Wanted, drawn_captions


def used(
    of: Known, visits: Callable[[int, int], np.ndarray], steps: range, batch: int, seed: int, empty: float
) -> Wanted:
    """Return the pictures and captions that training asks for in some steps, or all where that saves little.

    Args:
        visits: (start, stop) -> the items at these positions of the endless pass.
        batch: samples a step, over all processes.
        empty: share of samples that are trained with the empty prompt.
    """
    samples = len(steps) * batch
    if samples >= 2 * max(len(of.rows), len(of.said)):
        return Wanted()
    pictures, captions = [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=np.int64)]
    for step in steps:
        items = visits(step * batch, (step + 1) * batch)
        rng = KeyedRng(seed, step, tuple(range(step * batch, (step + 1) * batch)))
        pictures.append(items)
        captions.append(drawn_captions(of.rows, len(of.said), torch.from_numpy(items), rng, empty).numpy())
    said = np.unique(np.concatenate(captions))
    return Wanted(np.unique(np.concatenate(pictures)), said[said < len(of.said)])
