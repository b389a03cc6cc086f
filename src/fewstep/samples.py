"""What a micro-batch is made of, read while the step before it runs: latents, text states, a teacher's stored points.

Which of them a sample takes is drawn, and draws are keyed (`draws`): who reads ahead draws the same as the loss will.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fewstep.draws import Draws
from fewstep.method_settings import ConsistencyConfig
from fewstep.objectives.scene import HeldTrajectories, Sample, Stored
from fewstep.objectives.times import Triple, draw_times
from fewstep.preparation import Run
from fewstep.synthesized import FromSet
from fewstep.training.loop import Batch


@dataclass(frozen=True)
class Foreseen:
    """The points of stored trajectories that a pair will ask for, on the device already.

    Attributes:
        points: x by where it lies on the grid, as a list of numbers.
        said: the network's outputs at t_{n+k}, with and without the prompt; None where no one asks.
    """

    points: dict[tuple[int, ...], Tensor]
    said: tuple[Tensor, Tensor] | None

    def point(self, index: Tensor) -> Tensor:
        """x at those times of the training grid."""
        return self.points[tuple(index.tolist())]

    def outputs(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """What the network said at t_{n+k}."""
        assert self.said is not None
        return self.said


def foresee(stored: Stored, method: ConsistencyConfig, times: Triple, device: torch.device) -> Foreseen:
    """Read what `objectives` will ask of stored trajectories at these times."""
    wanted = [times.index_nk, times.index_n] if method.point == "path" else [times.index_nk]

    def there(tensor: Tensor) -> Tensor:
        return tensor.float().to(device, non_blocking=True)

    said = None
    if method.point == "stored":
        with_prompt, without = stored.outputs(times.index_nk)
        said = there(with_prompt), there(without)
    return Foreseen({tuple(index.tolist()): there(stored.point(index)) for index in wanted}, said)


def fetch_of(run: Run) -> Callable[[np.ndarray, Draws], Batch]:
    """(item numbers, the draws of their step) -> {"sample": what the objective is given}."""
    config, device = run.config, run.backbone.device
    # a stored trajectory was drawn with its prompt, or without: another one would be told of a path that it is not on
    empty = config.data.empty_prompts if run.omega is None else 0.0

    def fetch(items: np.ndarray, draws: Draws) -> Batch:
        numbers = torch.from_numpy(items)
        prompts = run.data.drawn(numbers, draws, empty)
        states, null = run.data.states(prompts, device), run.data.null(len(numbers), device)
        omega = None if run.omega is None else run.omega[numbers]
        stored: Foreseen | None = None
        if config.method.start == "trajectory":
            held = run.data.latents
            kept: Stored = FromSet(run.synthesis, numbers) if run.synthesis else HeldTrajectories(held[numbers])
            stored = foresee(kept, config.method, draw_times(config.method, run.backbone.path, draws), device)
            first = next(iter(stored.points.values()))  # of data's shape, which is all that is asked of it but there
            data = kept.point(torch.full_like(numbers, -1)).to(first) if config.method.denoising else first
        else:
            data = run.data.latents[numbers].float().to(device, non_blocking=True)
        return {"sample": Sample(data, states, null, omega, stored, prompts)}

    return fetch
