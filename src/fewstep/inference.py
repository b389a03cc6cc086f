"""Drawing latents by the inference settings that travel with a student."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fewstep.denoiser import Condition, Denoiser
from fewstep.grid import inference_times
from fewstep.jump import student_step
from fewstep.jumper import Voice
from fewstep.sampler import picture_noise, sample_consistency, sample_ode, sample_sde_dpmpp_2m, sample_sss, start_size
from fewstep.settings import Sampling


def call_times(sampling: Sampling, denoiser: Denoiser) -> list[float]:
    """The times of the solver's or sampler's steps, falling.

    Raises:
        UserError: more steps than the grid has points.
    """
    count = sampling.steps // sampling.calls_a_step  # whole: `Sampling` refuses any other
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
    times, path = call_times(sampling, denoiser), denoiser.path
    x, cpu_noise = picture_noise(seeds, shape)
    x = x.to(device) * start_size(path)
    voice = Voice(denoiser, condition, role, sampling.told)
    if sampling.w is not None:
        voice = replace(voice, w=torch.full((len(x),), sampling.w, dtype=torch.float64))
    if sampling.omega > 0:
        wide = {k: v.expand(len(x), *v.shape[1:]) for k, v in null.items()}
        voice = replace(voice, null=wide, omega=torch.full((len(x),), sampling.omega))
    jump = voice.jumper(student_step(sampling.step_jump, sampling.r, sampling.form))

    def noise() -> Tensor:
        return cpu_noise().to(device)

    if sampling.sampler == "sss":
        return sample_sss(jump, path, x, times, sampling.gamma, sampling.end, noise, sampling.gamma_law)
    if sampling.sampler == "lcm":
        return sample_consistency(jump, path, x, times, sampling.landing, noise)
    if sampling.sampler == "sde_dpmpp_2m":
        return sample_sde_dpmpp_2m(voice.denoise, path, x, times, sampling.end, noise)
    return sample_ode(voice.denoise, path, x, times, sampling.end, sampling.sampler)
