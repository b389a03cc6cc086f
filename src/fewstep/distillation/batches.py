"""The data of a micro-batch, read while the step before it runs: latents, text states, stored points of the teacher.

Random numbers are keyed (`rng`), so that what is drawn here equals what the loss draws.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from fewstep.common.device import copy_async
from fewstep.common.rng import KeyedRng
from fewstep.distillation.prepare import Run
from fewstep.distillation.trajectory import Trajectories
from fewstep.methods.config import ConsistencyConfig
from fewstep.methods.pair import MicroBatch, StoredPoints
from fewstep.methods.start_points import noise_purposes
from fewstep.methods.times import PairTimes, draw_times
from fewstep.training.update import Batch


def prefetch(
    stored: Trajectories, items: Tensor, method: ConsistencyConfig, times: PairTimes, device: torch.device
) -> StoredPoints:
    """Read the stored points of samples that the recipe uses at a pair's times."""

    def there(tensor: Tensor) -> Tensor:
        return copy_async(tensor, device).float()  # widened on the device: half the bytes are copied

    x_n = there(stored.point(items, times.index_n)) if method.point == "path" else None
    outputs = None
    if method.point == "stored":
        assert stored.outputs is not None
        with_prompt, without_prompt = (there(rows.at(items, times.index_nk)) for rows in stored.outputs)
        outputs = with_prompt, without_prompt
    return StoredPoints(times, there(stored.point(items, times.index_nk)), x_n, outputs)


def fetch_of(run: Run) -> Callable[[np.ndarray, KeyedRng], Batch]:
    """Return the function that reads a micro-batch: (item numbers, their step's rng) -> {"sample": a `MicroBatch`}."""
    config, device = run.config, run.backbone.device
    method, trajectories = config.method, run.trajectories
    # the prompt of a stored trajectory is the one that it was drawn with
    empty = 0.0 if trajectories else config.data.empty_prompts
    null_row = run.data.null(1, device)  # on the device once, for every step

    def fetch(items: np.ndarray, rng: KeyedRng) -> Batch:
        numbers = torch.from_numpy(items)
        prompts = run.data.drawn(numbers, rng, empty)
        states = run.data.states(prompts, device)
        null = {name: row.expand(len(numbers), *row.shape[1:]) for name, row in null_row.items()}
        if trajectories:
            times = draw_times(method, run.backbone.path, rng)
            stored = prefetch(trajectories, numbers, method, times, device)
            omega = trajectories.omega[numbers]
            return {"sample": MicroBatch(stored.x_nk, states, null, omega, stored, prompts)}  # data: for its shape
        data = copy_async(run.data.latents[numbers], device).float()
        for purpose in noise_purposes(method):
            rng.draw_ahead(purpose, tuple(data.shape[1:]))
        return {"sample": MicroBatch(data, states, null, prompts=prompts)}

    return fetch
