"""diffusers' FlowMatchLCMScheduler, SCMScheduler and FlowMapEulerDiscreteScheduler beside our samplers, on flows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.diffusion.config import Sampling
from fewstep.diffusion.denoiser import Denoiser
from fewstep.diffusion.draw_latents import call_times, draw_latents
from fewstep.diffusion.schedule import FlowMatching
from fewstep.inference.schedulers.few_step import ConsistencyScheduler, SSSScheduler

SHAPE = (2, 3, 3)
SEED = 7
RENOISED = [Sampling(sampler="lcm", jump="first_order", end="clean"), Sampling(sampler="sss", gamma=1.0, end="clean")]
"""Two names of one sampler where jumps end on clean data."""


def velocity(x: Tensor, level: Tensor, landing: Tensor | None = None) -> Tensor:
    """A network: u of x at sigma (and to the landing's sigma), both [B] or numbers."""
    level = torch.as_tensor(level).to(x).reshape(-1, 1, 1, 1)
    to = 0 if landing is None else torch.as_tensor(landing).to(x).reshape(-1, 1, 1, 1)
    return torch.tanh(x.roll(1, 1) * (1 + level) + 0.3 * to) - 0.5 * x


def ours(sampling: Sampling, path: FlowMatching, told: bool = False) -> Tensor:
    def call(x: Tensor, t: Tensor, condition: Any, role: str) -> Tensor:
        return velocity(x, path.sigma(t), condition["s"] / 1000 if told else None)

    denoiser = Denoiser(call, path, "flow")
    return draw_latents(denoiser, {}, {}, sampling, [SEED], SHAPE, "teacher")


def generator() -> tuple[Tensor, torch.Generator]:
    """The start, and the generator of the noise after it."""
    drawn = torch.Generator().manual_seed(SEED)
    return torch.randn((1, *SHAPE), generator=drawn), drawn


def through(scheduler: Any, network: Callable[[Tensor, Tensor], Tensor], steps: int, **how: Any) -> Tensor:
    x, drawn = generator()
    scheduler.set_timesteps(steps, **how)
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t / 1000), t, x, generator=drawn, return_dict=False)[0]
    return x


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("sampling", RENOISED, ids=["lcm", "gamma 1"])
def test_flow_match_lcm_is_ours_at_full_noise(sampling: Sampling, shift: float, steps: int) -> None:
    """Given our times: its own list ends at sigma_min, ours at the grid's last called point."""
    from diffusers import FlowMatchLCMScheduler

    path, sampling = FlowMatching(shift), sampling.model_copy(update={"steps": steps})
    drawn = ours(sampling, path)
    theirs = FlowMatchLCMScheduler(shift=shift)
    torch.testing.assert_close(through(theirs, velocity, steps, sigmas=call_times(sampling, path)), drawn)
    kind = ConsistencyScheduler if sampling.sampler == "lcm" else SSSScheduler
    how = {"jump": "first_order"} if sampling.sampler == "lcm" else {"gamma": 1.0}
    made = kind.from_config(theirs.config, end="clean", **how)
    torch.testing.assert_close(through(made, velocity, steps), drawn)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_scm_scheduler_is_ours_at_full_noise(steps: int) -> None:
    """On TrigFlow's circle: x/sqrt(alpha^2 + sigma^2), F = v by SANA-Sprint's conversion of a flow's output."""
    from diffusers import SCMScheduler

    path, sampling = FlowMatching(), RENOISED[1].model_copy(update={"steps": steps})
    times = torch.tensor(call_times(sampling, path), dtype=torch.float64)
    angles = torch.atan2(path.sigma(times), path.alpha(times)).float()
    scheduler = SCMScheduler(sigma_data=1.0)
    scheduler.set_timesteps(steps, timesteps=[*angles.tolist(), 0.0], max_timesteps=None, intermediate_timesteps=None)
    x, drawn = generator()
    for angle in scheduler.timesteps[:-1]:
        level = angle.sin() / (angle.sin() + angle.cos())
        own = x / (angle.sin() + angle.cos())
        turned = (1 - 2 * level) * own + (1 - 2 * level + 2 * level**2) * velocity(own, level)
        output = turned / torch.sqrt(level**2 + (1 - level) ** 2)
        x = scheduler.step(output, angle, x, generator=drawn, return_dict=False)[0]
    torch.testing.assert_close(x, ours(sampling, path), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("steps", [1, 2, 5, 10])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_map_euler_is_our_deterministic_jump(shift: float, steps: int) -> None:
    """A student that takes s: each step is one jump to the next time, and the lists are one where steps divide N."""
    from diffusers import FlowMapEulerDiscreteScheduler

    path = FlowMatching(shift)
    sampling = Sampling(sampler="sss", gamma=0.0, end="clean", steps=steps, extra_conditioning=("s",))
    scheduler = FlowMapEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(steps)
    x, _ = generator()
    for t, low in zip(scheduler.timesteps, scheduler.sigmas[1:], strict=True):
        x = scheduler.step(velocity(x, t / 1000, low), t, x, return_dict=False)[0]
    torch.testing.assert_close(x, ours(sampling, path, told=True))
