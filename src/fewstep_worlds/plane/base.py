"""The learned diffusion model that students in the plane start from."""

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
from fewstep.training.loss import Loss
from fewstep.training.update import Batch, Update
from fewstep_worlds.common.training import fit
from fewstep_worlds.plane.mixture import Mixture
from fewstep_worlds.plane.network import PlaneNetwork, exact_output
from fewstep_worlds.plane.settings import BaseConfig

TIMES = 1000
"""Points of its training grid: all indices of Stable Diffusion's path."""


def learn_base(
    config: BaseConfig, network: PlaneNetwork, data: Mixture, out: Path, quiet: bool = False
) -> Mapping[str, Tensor]:
    """Train `network` to denoise draws from `data`, resuming what `out` holds; return the averaged weights.

    The target is the exact teacher's output at each noised point. It is the mean of the usual denoising target, so the
    minimum is the same and the gradient less noisy. The loss is the squared error of the network's output; an error of
    x0 has EDM's weight, because x0 is easy at little noise.
    """
    path = data.path
    points = data.sample(config.count, path.clean, torch.Generator().manual_seed(config.loop.seed)).float()
    grid = training_grid(path, TIMES)

    def loss(batch: Batch, rng: KeyedRng) -> Loss:
        x_0, eps = batch["points"], rng.normal("noise", (2,))
        t = grid[rng.integers("t", 0, len(grid))]
        x_t = add_noise(path, x_0, eps, t)
        error = (network(x_t, t) - exact_output(data, config.prediction, x_t, t)).square().mean(1)
        if config.prediction == "x0":
            error = expand(edm_weight(path, t, sigma_data=1.0), error) * error
        return Loss(error.mean(), error.detach(), None, {})

    def fetch(items: np.ndarray, _: KeyedRng) -> Batch:
        return {"points": points[torch.from_numpy(items)]}

    network.requires_grad_(True)
    update = Update("base", dict(network.named_parameters()), loss, config.optim)
    title, accelerator = "a diffusion model to start from", make_accelerator("fp32", torch.device("cpu"))
    weights = fit(title, [update], fetch, len(points), out, config, config.loop, accelerator, quiet=quiet)
    network.requires_grad_(False)
    return weights["base"]
