"""Drawing latents by the inference settings that travel with a student."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fewstep.denoiser import Condition, Denoiser
from fewstep.grid import inference_times
from fewstep.names import CALLS
from fewstep.sampler import picture_noise, sample_consistency, sample_ode, sample_sss
from fewstep.settings import Sampling


def call_times(sampling: Sampling, denoiser: Denoiser) -> list[float]:
    """The times of the solver's or sampler's steps, falling.

    Raises:
        UserError: more steps than the grid has points.
    """
    count = sampling.steps // CALLS[sampling.sampler]  # whole: `Sampling` refuses any other
    times = inference_times(denoiser.path, count, grid=sampling.grid, spacing=sampling.spacing)
    return [float(t) for t in times]


@torch.no_grad()
def draw_latents(
    denoiser: Denoiser,
    condition: Condition,
    null: Condition,
    sampling: Sampling,
    seeds: Sequence[int],
    shape: tuple[int, ...],
    role: str,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Draw one latent a seed, float32 [N, *shape]; `condition` has N rows, `null` one or N.

    A latent depends on its own seed and condition alone, not on the batch.
    """
    times = call_times(sampling, denoiser)
    x, cpu_noise = picture_noise(seeds, shape)
    x = x.to(device)
    if sampling.omega > 0:
        wide = {k: v.expand(len(x), *v.shape[1:]) for k, v in null.items()}
        omega = torch.full((len(x),), sampling.omega)
        denoise = denoiser.bind_guided(condition, wide, omega, role)
    else:
        denoise = denoiser.bind(condition, role)
    if sampling.sampler == "sss":
        noise = lambda: cpu_noise().to(device)  # noqa: E731
        return sample_sss(denoise, denoiser.path, x, times, sampling.gamma, sampling.end, noise)
    if sampling.sampler == "lcm":
        return sample_consistency(denoise, denoiser.path, x, times, lambda: cpu_noise().to(device))
    return sample_ode(denoise, denoiser.path, x, times, sampling.end, sampling.sampler)
