"""The consistency loss: two jumps that start on the same path must land on the same point.

    L = d( f_theta(x_{t_n+k}, t_{n+k} -> s), sg f_target(x_{t_n}, t_n -> s) )

(CM, arXiv 2303.01469, eq 7, with s its end point; TCD, 2402.19159, with any s.)

Every method of the family is this loss with its choices filled in by a recipe; `docs/methods.md` describes each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from fewstep.common.rng import KeyedRng
from fewstep.diffusion.conditioned import ConditionedDenoiser
from fewstep.diffusion.denoiser import BASE, START, Denoiser
from fewstep.diffusion.grid import end_time
from fewstep.diffusion.jump import student_step
from fewstep.diffusion.schedule import share_of
from fewstep.methods.adversarial import ANY_RATIO, Critic, discriminate, gradient_ratio, noised_for_critic
from fewstep.methods.config import ConsistencyConfig
from fewstep.methods.distances import NetworkDistance, Weigh, distance
from fewstep.methods.next_points import POINTS
from fewstep.methods.pair import MicroBatch, Pair
from fewstep.methods.start_points import STARTS, StartInputs
from fewstep.methods.tangent import limit_outputs
from fewstep.methods.times import draw_times
from fewstep.training.loss import Loss


def make_pair(config: ConsistencyConfig, denoiser: Denoiser, batch: MicroBatch, rng: KeyedRng) -> Pair:
    """Draw times and guidance of a micro-batch and compute x_{t_n+k}."""
    times = batch.stored.times if batch.stored else draw_times(config, denoiser.path, rng)
    omega = rng.uniform("omega", *config.guidance.omegas)
    if batch.omega is not None and config.point != "stored":  # stored outputs can be guided by any omega
        omega = batch.omega
    step = student_step(config.jump, config.r, config.form)

    def role(name: str) -> ConditionedDenoiser:
        return ConditionedDenoiser(denoiser, batch.condition, name, config.extra_conditioning, w=omega)

    student, target = (role(name).jump(step) for name in ("student", "target" if config.target == "ema" else "student"))
    teacher = ConditionedDenoiser(denoiser, batch.condition, BASE)
    if config.guidance.convention != "none":
        teacher = replace(teacher, null=batch.null, omega=omega)
    followed = ConditionedDenoiser(denoiser, batch.condition, START) if config.follow == "start" else teacher
    student_of = lambda rows: role("student").rows(rows).jump(step)  # noqa: E731
    start = STARTS[config.start](StartInputs(config, batch, times, student, student_of, followed, rng))
    return Pair(config, denoiser, batch, times, omega, student, target, teacher, followed, *start)


def compared_at(pair: Pair) -> Tensor:
    """Return the times at which the two jumps are compared, float64 [B]."""
    config, s = pair.config, pair.times.s
    return s if config.compare == "landing" else torch.full_like(s, end_time(pair.denoiser.path, config.end))


def _compared(pair: Pair, x_s: Tensor) -> Tensor:
    """Return x_s, or the target's jump from it to the end point, where jumps are compared there (CTM, 2310.02279)."""
    return x_s if pair.config.compare == "landing" else pair.target(x_s, pair.times.s, compared_at(pair))


def student_landing(pair: Pair) -> Tensor:
    """Return f_theta(x_{t_n+k}, t_{n+k} -> s) as it is compared, with gradient."""
    return _compared(pair, pair.student(pair.x_nk, pair.times.t_nk, pair.times.s))


@torch.no_grad()
def target_landing(pair: Pair) -> Tensor:
    """Return sg f_target(x_{t_n}, t_n -> s) as it is compared; x_{t_n} itself where s = t_n."""
    x_n = POINTS[pair.config.point](pair)
    return _compared(pair, x_n if pair.config.s == "next" else pair.target(x_n, pair.times.t_n, pair.times.s))


class Term(NamedTuple):
    """A term beside the consistency loss.

    Attributes:
        name: in the log.
        weight: in the sum.
        loss: (pair, the student's landing [B, ...], its times float64 [B], rng) -> [B].
        start: share of the run's steps before it enters the loss.
        clip: range of its balancing factor (`adversarial.gradient_ratio`).
    """

    name: str
    weight: float
    loss: Callable[[Pair, Tensor, Tensor, KeyedRng], Tensor]
    start: float = 0.0
    clip: tuple[float, float] = ANY_RATIO


def consistency_loss(
    pair: Pair,
    rng: KeyedRng,
    terms: Sequence[Term] = (),
    network_distance: NetworkDistance | None = None,
    outlet: Tensor | None = None,
    weigh: Weigh | None = None,
) -> Loss:
    """Return the loss of one micro-batch, with the recipe's further terms.

    Args:
        network_distance: of recipes whose distance is a frozen network's.
        outlet: the student's last trained weight, where the gradients of the terms are balanced.
        weigh: (loss of each sample [B], times [B] as shares of the path) -> the loss with its learned weight.
    """
    config = pair.config
    # The student comes first: autocast of older torch caches the cast weights of the first call, and those of a call
    # without gradient would leave the student without one.
    at, t_share = compared_at(pair), share_of(pair.denoiser.path, pair.times.t_nk)
    if config.continuous:
        landing, output, wanted = limit_outputs(pair, rng)
    else:
        landing = output = student_landing(pair)
        wanted = target_landing(pair) if config.consistency else landing
    scalars: dict[str, Tensor] = {}
    per_sample = landing.new_zeros(len(landing))
    if config.consistency:
        own = distance(pair, output, wanted, at, network_distance)
        scalars["consistency"] = own.detach().mean()
        own = weigh(own, t_share) if weigh else own
        per_sample = config.consistency * own
    for term in terms:
        if not rng.reached(term.start):
            continue
        value = term.loss(pair, landing, at, rng)
        scalars[term.name] = value.detach().mean()
        if config.balance == "gradient" and outlet is not None:
            value = gradient_ratio(own, value, outlet, term.clip) * value
        per_sample = per_sample + term.weight * value
    return Loss(per_sample.mean(), per_sample.detach(), t_share, scalars | pair.scalars if terms else {})


def critic_loss(pair: Pair, rng: KeyedRng, critic: Critic) -> Loss:
    """Return the critic's own loss on the same jumps; real points are the data, or the target's landings."""
    config, path, top = pair.config.adversarial, pair.denoiser.path, pair.times.top
    with torch.no_grad():
        fake, at = student_landing(pair), compared_at(pair)
        if config.real == "target":
            real, real_at = target_landing(pair), at
        else:
            assert pair.clean is not None
            assert pair.clean_at is not None
            real, real_at = pair.clean, torch.full_like(at, pair.clean_at)
        noised_fake = noised_for_critic(config, path, fake, at, top, rng, "fake")
        noised_real = noised_for_critic(config, path, real, real_at, top, rng, "real", to=noised_fake[1])
    return discriminate(config, critic, noised_real, noised_fake, pair.batch.condition)
