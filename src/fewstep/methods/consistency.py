"""The consistency objective: two jumps that start on the same path must land on the same point.

    L = d( f_theta(x_{t_n+k}, t_{n+k} -> s), sg f_target(x_{t_n}, t_n -> s) ).

Every method of the family is this loss with its choices filled in by a recipe file: where x_{t_n+k} comes from, which
times, which jump, what the network is told, where x_{t_n} comes from (a guided step of the frozen teacher, or the path
itself), who the student must agree with, where and by which distance. `docs/methods.md` has a page for each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fewstep.common.rng import KeyedRng
from fewstep.diffusion.conditioned import ConditionedDenoiser
from fewstep.diffusion.denoiser import Denoiser
from fewstep.diffusion.grid import end_time
from fewstep.diffusion.jump import student_step
from fewstep.diffusion.samplers import JumpFn
from fewstep.diffusion.schedule import share_of
from fewstep.methods.adversarial import ANY_RATIO, Critic, discriminate, gradient_ratio, seen_by_critic
from fewstep.methods.config import ConsistencyConfig
from fewstep.methods.distances import NetworkDistance, distance
from fewstep.methods.next_points import POINTS
from fewstep.methods.pair import Cast, Sample, Scene
from fewstep.methods.start_points import STARTS
from fewstep.methods.times import draw_times
from fewstep.training.loss import Loss


def set_scene(config: ConsistencyConfig, denoiser: Denoiser, sample: Sample, rng: KeyedRng) -> Scene:
    """Draw times, guidance and noise of a micro-batch, come to its first points, and say who jumps."""
    times = sample.times or draw_times(config, denoiser.path, rng)
    omega = rng.uniform("omega", *config.guidance.omegas)
    if sample.omega is not None and config.point != "stored":  # by stored outputs any other guidance can be formed
        omega = sample.omega
    step = student_step(config.jump, config.r, config.form)

    def jump_of(role: str) -> JumpFn:
        return ConditionedDenoiser(denoiser, sample.condition, role, config.extra_conditioning, w=omega).jumper(step)

    student, judge = jump_of("student"), jump_of("target" if config.target == "ema" else "student")
    cast = Cast(config, denoiser, sample, omega, times, student, judge)
    origin = STARTS[config.start](cast, rng)
    return Scene(config, denoiser, sample, omega, times, student, judge, *origin)


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


class Term(NamedTuple):
    """A term beside the consistency loss.

    Attributes:
        name: in the log.
        weight: in the sum.
        loss: (scene, where the student landed [B, ...], at which times float64 [B], draws) -> [B].
        start: share of the run's steps before it enters the loss.
        clip: range of its balancing factor (`adversarial.gradient_ratio`).
    """

    name: str
    weight: float
    loss: Callable[[Scene, Tensor, Tensor, KeyedRng], Tensor]
    start: float = 0.0
    clip: tuple[float, float] = ANY_RATIO


def consistency_loss(
    scene: Scene,
    rng: KeyedRng,
    terms: Sequence[Term] = (),
    network_distance: NetworkDistance | None = None,
    outlet: Tensor | None = None,
) -> Loss:
    """The loss of one micro-batch, with the further terms that the recipe names.

    Args:
        look: a distance by a frozen network, for recipes that name one.
        outlet: the student's last trained weight, where the terms' gradients are balanced.
    """
    config = scene.config
    # The student before the target: autocast of older torch keeps the cast weights of the first call, and those of a
    # call without gradient would leave the student without one.
    landed, at = student_lands(scene), compared_at(scene)
    scalars: dict[str, Tensor] = {}
    per_sample = landed.new_zeros(len(landed))
    if config.consistency:
        own = distance(scene, landed, target_lands(scene), at, network_distance)
        scalars["consistency"] = own.detach().mean()
        per_sample = config.consistency * own
    for name, weight, loss, start, clip in terms:
        if not rng.reached(start):
            continue
        term = loss(scene, landed, at, rng)
        scalars[name] = term.detach().mean()
        if config.balance == "gradient" and outlet is not None:
            term = gradient_ratio(own, term, outlet, clip) * term
        per_sample = per_sample + weight * term
    t_share = share_of(scene.denoiser.path, scene.times.t_nk)
    return Loss(per_sample.mean(), per_sample.detach(), t_share, scalars if terms else {})


def critic_loss(scene: Scene, rng: KeyedRng, critic: Critic) -> Loss:
    """The critic's own loss on the same jumps: real points are the data, or where the target landed."""
    own, path, times = scene.config.adversarial, scene.denoiser.path, scene.times
    with torch.no_grad():
        fake, at = student_lands(scene), compared_at(scene)
        if own.real == "target":
            real, real_at = target_lands(scene), at
        else:
            assert scene.clean is not None
            assert scene.clean_at is not None
            real, real_at = scene.clean, torch.full_like(at, scene.clean_at)
        seen_fake = seen_by_critic(own, path, fake, at, times.top, rng, "fake")
        seen_real = seen_by_critic(own, path, real, real_at, times.top, rng, "real", to=seen_fake[1])
    return discriminate(own, critic, seen_real, seen_fake, scene.sample.condition)
