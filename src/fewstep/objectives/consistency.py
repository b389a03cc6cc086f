"""The consistency objective: two jumps that start on the same path must land on the same point.

    L = d( f_theta(x_{t_n+k}, t_{n+k} -> s), sg f_target(x_{t_n}, t_n -> s) ).

Every method of the family is this loss with its choices filled in by a recipe file: where x_{t_n+k} comes from, which
times, which jump, what the network is told, where x_{t_n} comes from (a guided step of the frozen teacher, or the path
itself), who the student must agree with, where and by which distance. `docs/methods.md` has a page for each.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.denoiser import Denoiser
from fewstep.draws import Draws
from fewstep.grid import end_time
from fewstep.jump import student_step
from fewstep.jumper import Voice
from fewstep.loss import Loss
from fewstep.method_settings import ConsistencyConfig
from fewstep.objectives.adversarial import (
    Critic,
    discriminate,
    generator_loss,
    gradient_ratio,
    seen_by_critic,
)
from fewstep.objectives.denoising import denoising_loss
from fewstep.objectives.distance import FeaturesOf, distance
from fewstep.objectives.points import POINTS, Sample, Scene, points_on_path
from fewstep.objectives.times import Triple, draw_times
from fewstep.sampler import Jumper
from fewstep.schedule import Path, expand, share_of


def implicit_pull(weight: str, path: Path, t: Tensor, s: Tensor) -> Tensor | None:
    """How far a change of eps (or x0) at t moves the landing x_s of a first-order jump, float64 [B]; None for `none`.

    |df/deps| = alpha_s sigma_t/alpha_t - sigma_s, |df/dx0| = alpha_s - sigma_s alpha_t/sigma_t. Their squares differ by
    four orders of magnitude over a batch: divided by them, an L2 distance counts every pair alike.
    """
    alpha_t, sigma_t, alpha_s, sigma_s = (part(when) for when in (t, s) for part in (path.alpha, path.sigma))
    if weight == "eps":
        return alpha_s * sigma_t / alpha_t - sigma_s
    if weight == "x0":
        return alpha_s - sigma_s * alpha_t / sigma_t
    return None


@dataclass(frozen=True)
class Pair:
    """Two jumps of a batch that must agree.

    Attributes:
        landed: where the student came to, with gradient; [B, ...].
        wanted: where it should be, without.
        at: the time of both, float64 [B].
        times: what was jumped between.
    """

    landed: Tensor
    wanted: Tensor
    at: Tensor
    times: Triple


def jump_pair(config: ConsistencyConfig, denoiser: Denoiser, sample: Sample, draws: Draws) -> Pair:
    """Both jumps of a micro-batch.

    `ConsistencyConfig.calls` counts the network calls: the student's with gradient, the target's, and the teacher's
    (one batched call of 2B for each solver stage with guidance, of B without).
    """
    path = denoiser.path
    times = draw_times(config, path, draws)
    omega = sample.omega if sample.omega is not None else draws.uniform("omega", *config.guidance.omegas)
    step = student_step(config.jump, config.r, config.form)

    def jump_of(role: str) -> Jumper:
        return Voice(denoiser, sample.condition, role, config.told, w=omega).jumper(step)

    student = jump_of("student")
    judge = jump_of("target" if config.target == "ema" else "student")
    x_nk, x_n = points_on_path(config, path, sample, times, draws)
    scene = Scene(config, denoiser, sample, omega, times, x_nk, x_n, judge)
    # The student before the target: autocast of older torch keeps the cast weights of the first call, and those of a
    # call without gradient would leave the student without one.
    landed, at = student(x_nk, times.t_nk, times.s), times.s
    with torch.no_grad():
        x_n = POINTS[config.point](scene)
        wanted = x_n if config.s == "next" else judge(x_n, times.t_n, times.s)
    if config.compare == "end":
        at = torch.full_like(times.s, end_time(path, config.end))
        landed = judge(landed, times.s, at)  # its weights are frozen: the gradient passes through to the student
        with torch.no_grad():
            wanted = judge(wanted, times.s, at)
    return Pair(landed, wanted, at, times)


def consistency_loss(
    config: ConsistencyConfig,
    denoiser: Denoiser,
    sample: Sample,
    draws: Draws,
    features: FeaturesOf | None = None,
    critic: Critic | None = None,
) -> Loss:
    """The loss of one micro-batch, with the further terms that the recipe names.

    Args:
        features: of a frozen network, for the distance in them.
        critic: judges where the student lands, for the adversarial term; it learns by `critic_loss`.
    """
    path = denoiser.path
    pair = jump_pair(config, denoiser, sample, draws)
    per_sample = distance(config, pair.landed, pair.wanted, pair.at, sample.condition, features)
    pull = implicit_pull(config.weight, path, pair.times.t_nk, pair.times.s)
    if pull is not None:
        per_sample = per_sample / expand(pull.square(), per_sample)
    scalars = {"consistency": per_sample.detach().mean()}
    own, per_sample = per_sample, config.consistency * per_sample

    def add(name: str, weight: float, term: Tensor, at: Tensor) -> Tensor:
        scalars[name] = term.detach().mean()
        if config.balance == "gradient":
            term = gradient_ratio(own, pair.landed, term, at) * term
        return per_sample + weight * term

    if config.denoising:
        fit, found = denoising_loss(config, denoiser, sample.data, sample.condition, draws)
        per_sample = add("denoising", config.denoising, fit, found)
    if config.adversarial.weight and critic is not None:
        x, t = seen_by_critic(config.adversarial, path, pair.landed, pair.at, draws, "fake")
        fooled = generator_loss(config.adversarial, critic(x, t, sample.condition))
        per_sample = add("adversarial", config.adversarial.weight, fooled, pair.landed)
    alone = len(scalars) == 1
    t_share = share_of(path, pair.times.t_nk)
    return Loss(per_sample.mean(), per_sample.detach(), t_share, {} if alone else scalars)


def critic_loss(config: ConsistencyConfig, denoiser: Denoiser, sample: Sample, draws: Draws, critic: Critic) -> Loss:
    """The critic's own loss on the same jumps: real points are the data, or where the target landed."""
    own, path = config.adversarial, denoiser.path
    with torch.no_grad():
        pair = jump_pair(config, denoiser, sample, draws)
        real = sample.data if own.real == "data" else pair.wanted
        at = torch.full_like(pair.at, path.clean) if own.real == "data" else pair.at
    fake_x, fake_t = seen_by_critic(own, path, pair.landed, pair.at, draws, "fake")
    real_x, real_t = seen_by_critic(own, path, real, at, draws, "real", to=fake_t)
    return discriminate(own, critic, (real_x, real_t), (fake_x, fake_t), sample.condition)
