"""Draw latents with the inference settings stored with a student."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fewstep.diffusion.conditioned import ConditionedDenoiser
from fewstep.diffusion.config import Sampling
from fewstep.diffusion.denoiser import Condition, Denoiser
from fewstep.diffusion.grid import times_within
from fewstep.diffusion.jump import student_step
from fewstep.diffusion.samplers import (
    consistency_jumps,
    follow,
    picture_noise,
    sample_ode,
    sample_sde_dpmpp_2m,
    sss_jumps,
    start_size,
)
from fewstep.diffusion.schedule import Path, add_noise


@dataclass(frozen=True)
class Source:
    """Latents that drawing starts from instead of pure noise: image to image (SDEdit, arXiv 2108.01073).

    Attributes:
        latents: [1 or N, C, h, w], scaled as the network expects.
        strength: the share of the noisiest time that they are noised to, in (0, 1].
    """

    latents: Tensor
    strength: float


def call_times(sampling: Sampling, path: Path, strength: float = 1.0) -> list[float]:
    """Return the times of the sampler's steps, falling, from the share `strength` of the noisiest time down.

    Raises:
        UserError: more steps than the grid has points there.
    """
    count = sampling.steps // sampling.calls_a_step  # whole: `Sampling` refuses any other
    times = times_within(path, count, strength, grid=sampling.grid, spacing=sampling.spacing)
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
    source: Source | None = None,
    arrange: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Draw one latent a seed, float32 [N, *shape]; `condition` has N rows, `null` one or N.

    A latent depends on its own seed, condition and source, not on the batch.

    Args:
        source: noised to start from; None for pure noise.
        arrange: reorders a step's noise as the pipeline's own latents hold it (`Backbone.arranged`).
    """
    path = denoiser.path
    times = call_times(sampling, path, source.strength if source else 1.0)
    z, cpu_noise = picture_noise(seeds, shape)
    z = z.to(device)
    if source is None:
        x = z * start_size(path)
    else:
        begin = torch.full((len(z),), times[0], dtype=torch.float64)
        x = add_noise(path, source.latents.to(z).expand_as(z), z, begin)
    network = ConditionedDenoiser(denoiser, condition, role, sampling.extra_conditioning)
    if sampling.w is not None:
        network = replace(network, w=torch.full((len(x),), sampling.w, dtype=torch.float64))
    if sampling.omega > 0:
        wide = {k: v.expand(len(x), *v.shape[1:]) for k, v in null.items()}
        network = replace(network, null=wide, omega=torch.full((len(x),), sampling.omega))
    jump = network.jump(student_step(sampling.step_jump, sampling.r, sampling.form))

    def noise() -> Tensor:
        drawn = cpu_noise().to(device)
        return arrange(drawn) if arrange else drawn

    if sampling.sampler == "sss":
        jumps = sss_jumps(path, times, sampling.gamma, sampling.end, sampling.gamma_law, len(x))
        return follow(jumps, jump, path, x, noise)
    if sampling.sampler == "lcm":
        return follow(consistency_jumps(path, times, sampling.landing, len(x)), jump, path, x, noise)
    if sampling.sampler == "sde_dpmpp_2m":
        return sample_sde_dpmpp_2m(network.denoise, path, x, times, sampling.end, noise)
    return sample_ode(network.denoise, path, x, times, sampling.end, sampling.sampler)
