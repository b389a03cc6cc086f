"""What students in the plane start from: a diffusion model as networks learn them, near the exact teacher."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fewstep.common.accelerator import make_accelerator
from fewstep.common.rng import KeyedRng
from fewstep.diffusion.grid import training_grid
from fewstep.diffusion.schedule import add_noise, expand
from fewstep.methods.denoising import edm_weight
from fewstep.training.loop import Batch, Update, train
from fewstep.training.loss import Loss
from fewstep.training.run_folder import RunLog
from fewstep_worlds.plane.mixture import Mixture
from fewstep_worlds.plane.planar import Planar, said_by
from fewstep_worlds.plane.settings import BaseConfig

TIMES = 1000
"""Points of the grid that it learns at: all indices of Stable Diffusion's path."""


def learn_base(
    config: BaseConfig, network: Planar, data: Mixture, out: Path, quiet: bool = False
) -> Mapping[str, Tensor]:
    """Train `network` to denoise draws from `data`, resuming what `out` holds; return the averaged weights.

    It regresses onto what the exact teacher says of each noised point: the mean of what denoising it would regress
    onto, and so the same minimum, without that noise. The loss is the squared error of what the network says; of x0,
    which is easy at little noise, in EDM's weight.
    """
    path = data.path
    points = data.sample(config.count, path.clean, torch.Generator().manual_seed(config.loop.seed)).float()
    grid = training_grid(path, TIMES)

    def loss(batch: Batch, rng: KeyedRng) -> Loss:
        x_0, eps = batch["points"], rng.normal("noise", (2,))
        t = grid[rng.integers("t", 0, len(grid))]
        x_t = add_noise(path, x_0, eps, t)
        error = (network(x_t, t) - said_by(data, config.prediction, x_t, t)).square().mean(1)
        if config.prediction == "x0":
            error = expand(edm_weight(path, t, sigma_data=1.0), error) * error
        return Loss(error.mean(), error.detach(), None, {})

    def fetch(items: np.ndarray, _: KeyedRng) -> Batch:
        return {"points": points[torch.from_numpy(items)]}

    network.requires_grad_(True)
    update = Update("base", dict(network.named_parameters()), loss, config.optim)
    with RunLog(out, config, title="a diffusion model to start from", quiet=quiet) as log:
        trained = train([update], fetch, len(points), config.loop, log, make_accelerator("fp32", torch.device("cpu")))
    network.requires_grad_(False)
    return trained.weights["base"]
