"""The denoising loss: with s = t the network learns E[x0 | x_t] (CTM, arXiv 2310.02279, section 3.3)."""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.common.rng import KeyedRng
from fewstep.diffusion.denoiser import Condition, Denoiser, extended
from fewstep.diffusion.grid import training_grid
from fewstep.diffusion.schedule import Path, add_noise, expand, index_of
from fewstep.methods.config import ConsistencyConfig


def edm_weight(path: Path, t: Tensor, sigma_data: float = 0.5) -> Tensor:
    """Return EDM's weight of x0 errors, (rho^2 + d^2)/(rho d)^2 with rho = sigma/alpha (arXiv 2206.00364, table 1)."""
    rho2 = (path.sigma(t) / path.alpha(t)).square()
    return 1 / sigma_data**2 + 1 / rho2


def denoising_loss(
    config: ConsistencyConfig, denoiser: Denoiser, x_0: Tensor, condition: Condition, rng: KeyedRng
) -> Tensor:
    """Return the weighted squared error of the student's x0 at times of the training grid, [B]; one student call.

    Its minimiser is E[x0 | x_t]: the diffusion model itself, at s = t, where a jump's slope is the PF-ODE's.
    """
    grid = training_grid(denoiser.path, config.grid)
    t = grid[rng.integers("denoising t", 0, len(grid))]
    eps = rng.normal("denoising noise", tuple(x_0.shape[1:]))
    x_t = add_noise(denoiser.path, x_0, eps, t)
    extra = extended(
        condition, s=index_of(denoiser.path, t), w=torch.zeros_like(t) if "w" in config.extra_conditioning else None
    )
    found = denoiser.estimate(x_t, t, extra, "student").x0
    error = (found - x_0).square().flatten(1).mean(1)
    return expand(edm_weight(denoiser.path, t), error) * error
