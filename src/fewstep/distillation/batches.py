"""What a micro-batch is made of, read while the step before it runs: latents, text states, a teacher's stored points.

Which of them a sample takes is drawn, and draws are keyed (`rng`): who reads ahead draws the same as the loss will.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fewstep.common.device import copy_async
from fewstep.common.mapped_tensors import MappedRows
from fewstep.common.rng import KeyedRng
from fewstep.distillation.prepare import Run
from fewstep.distillation.synthesis.dataset import FromSet
from fewstep.distillation.trajectories import Kept
from fewstep.methods.config import ConsistencyConfig
from fewstep.methods.pair import MicroBatch, StoredTrajectories
from fewstep.methods.start_points import noise_purposes
from fewstep.methods.times import PairTimes, draw_times
from fewstep.training.loop import Batch


@dataclass(frozen=True)
class PrefetchedPoints:
    """What a pair will ask of stored trajectories, on the device already.

    Attributes:
        times: of the pair.
        x_nk, x_n: the points at t_{n+k} and t_n; None where no one asks for the second.
        said: the network's outputs at t_{n+k}, with and without the prompt; None where no one asks.
    """

    times: PairTimes
    x_nk: Tensor
    x_n: Tensor | None
    said: tuple[Tensor, Tensor] | None

    def point(self, index: Tensor) -> Tensor:
        """x at one of the two times, which is named by its own tensor of indices."""
        if index is self.times.index_nk:
            return self.x_nk
        assert index is self.times.index_n
        assert self.x_n is not None
        return self.x_n

    def outputs(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """What the network said at t_{n+k}."""
        assert index is self.times.index_nk
        assert self.said is not None
        return self.said


def prefetch(
    stored: StoredTrajectories, method: ConsistencyConfig, times: PairTimes, device: torch.device
) -> PrefetchedPoints:
    """Read what `objectives` will ask of stored trajectories at these times."""

    def there(tensor: Tensor) -> Tensor:
        return copy_async(tensor, device).float()  # widened there: half the bytes go over

    x_n = there(stored.point(times.index_n)) if method.point == "path" else None
    said = None
    if method.point == "stored":
        with_prompt, without = stored.outputs(times.index_nk)
        said = there(with_prompt), there(without)
    return PrefetchedPoints(times, there(stored.point(times.index_nk)), x_n, said)


def fetch_of(run: Run) -> Callable[[np.ndarray, KeyedRng], Batch]:
    """(item numbers, the draws of their step) -> {"sample": what the objective is given}."""
    config, device = run.config, run.backbone.device
    method = config.method
    # a stored trajectory was drawn with its prompt, or without: another one would be told of a path that it is not on
    empty = config.data.empty_prompts if run.omega is None else 0.0
    nothing = run.data.null(1, device)  # on the device once, and for every step

    def fetch(items: np.ndarray, rng: KeyedRng) -> Batch:
        numbers = torch.from_numpy(items)
        prompts = run.data.drawn(numbers, rng, empty)
        states = run.data.states(prompts, device)
        null = {name: row.expand(len(numbers), *row.shape[1:]) for name, row in nothing.items()}
        if method.start == "trajectory":
            kept: StoredTrajectories
            if run.synthesis:
                kept = FromSet(run.synthesis, numbers)
            else:
                assert isinstance(run.data.latents, MappedRows)
                kept = Kept(run.data.latents, numbers)
            times = draw_times(method, run.backbone.path, rng)
            stored = prefetch(kept, method, times, device)
            # of data's shape, which is all that is asked of it but there
            data = (
                copy_async(kept.point(torch.full_like(numbers, -1)), device).float()
                if method.denoising
                else stored.x_nk
            )
            omega = None if run.omega is None else run.omega[numbers]
            return {"sample": MicroBatch(data, states, null, omega, stored, prompts, times)}
        data = copy_async(run.data.latents[numbers], device).float()
        for purpose in noise_purposes(method):
            rng.draw_ahead(purpose, tuple(data.shape[1:]))
        return {"sample": MicroBatch(data, states, null, prompts=prompts)}

    return fetch
