"""The consistency objective: two jumps that start on the same path must land on the same point.

    L = d( f_theta(x_{t_n+k}, t_{n+k} -> s), sg f_target(x_{t_n}, t_n -> s) ).

Every method of the family is this loss with its choices filled in by a recipe file: where x_{t_n+k} comes from, which
times, which jump, what the network is told, where x_{t_n} comes from (a guided step of the frozen teacher, or the path
itself), who the student must agree with, where and by which distance. `docs/methods.md` has a page for each.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.denoiser import Denoiser
from fewstep.draws import Draws
from fewstep.grid import end_time
from fewstep.jump import student_step
from fewstep.jumper import Voice
from fewstep.loss import Loss
from fewstep.method_settings import ConsistencyConfig
from fewstep.names import Weight
from fewstep.objectives.adversarial import (
    Critic,
    discriminate,
    generator_loss,
    gradient_ratio,
    seen_by_critic,
)
from fewstep.objectives.denoising import denoising_loss
from fewstep.objectives.distance import FeaturesOf, distance
from fewstep.objectives.points import POINTS, Sample, Scene, path_through
from fewstep.objectives.times import draw_times
from fewstep.sampler import Jumper
from fewstep.schedule import Path, share_of


def implicit_pull(weight: Weight, path: Path, t: Tensor, s: Tensor) -> Tensor | None:
    """How far a change of eps, x0 or v at t moves the landing x_s of a first-order jump, float64 [B]; None for `none`.

    |df/deps| = alpha_s sigma_t/alpha_t - sigma_s, |df/dx0| = alpha_s - sigma_s alpha_t/sigma_t. Their squares differ by
    four orders of magnitude over a batch: gaps divided by them count every pair alike. `v` is x0's over sqrt(SNR + 1),
    the weight of v-prediction (MCM, arXiv 2403.06807). Where x_t is pure noise (alpha_t = 0, the flow path's start) eps
    moves the landing without bound: such a sample counts for nothing.
    """
    if weight == "none":
        return None
    alpha_t, sigma_t, alpha_s, sigma_s = (part(when) for when in (t, s) for part in (path.alpha, path.sigma))
    if weight == "eps":
        return alpha_s * sigma_t / alpha_t - sigma_s
    pull = alpha_s - sigma_s * alpha_t / sigma_t
    return pull if weight == "x0" else pull / ((alpha_t / sigma_t).square() + 1).sqrt()


def set_scene(config: ConsistencyConfig, denoiser: Denoiser, sample: Sample, draws: Draws) -> Scene:
    """Draw times, guidance and noise of a micro-batch, and say who jumps."""
    times = draw_times(config, denoiser.path, draws)
    omega = sample.omega if sample.omega is not None else draws.uniform("omega", *config.guidance.omegas)
    step = student_step(config.jump, config.r, config.form)

    def jump_of(role: str) -> Jumper:
        return Voice(denoiser, sample.condition, role, config.told, w=omega).jumper(step)

    path_at = path_through(config, denoiser.path, sample, draws)
    return Scene(
        config=config,
        denoiser=denoiser,
        sample=sample,
        omega=omega,
        times=times,
        path_at=path_at,
        x_nk=path_at(times.t_nk, times.index_nk),
        student=jump_of("student"),
        judge=jump_of("target" if config.target == "ema" else "student"),
    )


def compared_at(scene: Scene) -> Tensor:
    """The times at which the two jumps are compared, float64 [B]."""
    config, s = scene.config, scene.times.s
    return s if config.compare == "landing" else torch.full_like(s, end_time(scene.denoiser.path, config.end))


def student_lands(scene: Scene) -> Tensor:
    """f_theta(x_{t_n+k}, t_{n+k} -> s), pushed on to the end point by the target where they are compared there."""
    landed = scene.student(scene.x_nk, scene.times.t_nk, scene.times.s)
    if scene.config.compare == "landing":
        return landed
    return scene.judge(landed, scene.times.s, compared_at(scene))  # frozen weights: the gradient passes through


@torch.no_grad()
def target_lands(scene: Scene) -> Tensor:
    """sg f_target(x_{t_n}, t_n -> s), pushed on likewise."""
    config, times = scene.config, scene.times
    x_n = POINTS[config.point](scene)
    wanted = x_n if config.s == "next" else scene.judge(x_n, times.t_n, times.s)
    return wanted if config.compare == "landing" else scene.judge(wanted, times.s, compared_at(scene))


def consistency_loss(
    config: ConsistencyConfig,
    denoiser: Denoiser,
    sample: Sample,
    draws: Draws,
    features: FeaturesOf | None = None,
    critic: Critic | None = None,
    outlet: Tensor | None = None,
) -> Loss:
    """The loss of one micro-batch, with the further terms that the recipe names.

    Args:
        features: of a frozen network, for the distance in them.
        critic: judges where the student lands, for the adversarial term; it learns by `critic_loss`.
        outlet: the student's last trained weight, where the terms' gradients are balanced.
    """
    path = denoiser.path
    scene = set_scene(config, denoiser, sample, draws)
    # The student before the target: autocast of older torch keeps the cast weights of the first call, and those of a
    # call without gradient would leave the student without one.
    landed, at, times = student_lands(scene), compared_at(scene), scene.times
    pull = implicit_pull(config.weight, path, times.t_nk, times.s)
    per_sample = distance(config, landed, target_lands(scene), at, sample.condition, features, pull)
    scalars = {"consistency": per_sample.detach().mean()}
    own, per_sample = per_sample, config.consistency * per_sample

    def add(name: str, weight: float, term: Tensor) -> Tensor:
        scalars[name] = term.detach().mean()
        if config.balance == "gradient" and outlet is not None:
            term = gradient_ratio(own, term, outlet) * term
        return per_sample + weight * term

    if config.denoising:
        fit = denoising_loss(config, denoiser, sample.data, sample.condition, draws)
        per_sample = add("denoising", config.denoising, fit)
    if config.adversarial.weight and critic is not None:
        x, t = seen_by_critic(config.adversarial, path, landed, at, times.top, draws, "fake")
        fooled = generator_loss(config.adversarial, critic(x, t, sample.condition))
        per_sample = add("adversarial", config.adversarial.weight, fooled)
    alone = len(scalars) == 1
    t_share = share_of(path, times.t_nk)
    return Loss(per_sample.mean(), per_sample.detach(), t_share, {} if alone else scalars)


def critic_loss(config: ConsistencyConfig, denoiser: Denoiser, sample: Sample, draws: Draws, critic: Critic) -> Loss:
    """The critic's own loss on the same jumps: real points are the data, or where the target landed."""
    own, path = config.adversarial, denoiser.path
    with torch.no_grad():
        scene = set_scene(config, denoiser, sample, draws)
        fake, at = student_lands(scene), compared_at(scene)
        real, real_at = (
            (sample.data, torch.full_like(at, path.clean)) if own.real == "data" else (target_lands(scene), at)
        )
        top = scene.times.top
        seen_fake = seen_by_critic(own, path, fake, at, top, draws, "fake")
        seen_real = seen_by_critic(own, path, real, real_at, top, draws, "real", to=seen_fake[1])
    return discriminate(own, critic, seen_real, seen_fake, sample.condition)
