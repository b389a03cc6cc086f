"""The continuous-time limits of a pair: its two jumps start infinitely near each other, or land so.

The teacher moves x_t along its path, and with it the landing of a jump to a fixed s; the landing must not move
(Eulerian; sCM, arXiv 2410.11081; MeanFlow, 2505.13447; AYF-EMD, 2506.14603). Or s moves, and the landing must move as
the teacher there does (Lagrangian; AYF-LMD). Divided by the step, the gap of the two jumps becomes a derivative, and
the gradient of the squared loss its product with that of the student's output.

Both are written in coordinates in which a first-order jump is x_s = A x - B F: F = eps - x0 on the straight path
x = (1 - tau) x0 + tau eps, with A = 1 and B = tau - tau_s; or F = v on TrigFlow's circle,
x = cos(tau) x0 + sin(tau) eps, with A = cos(tau - tau_s) and B = sin(tau - tau_s). Points of any path are such points,
scaled.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import NamedTuple
from weakref import WeakSet

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fewstep.common.choices import Coordinates
from fewstep.common.errors import UserError
from fewstep.common.rng import KeyedRng
from fewstep.diffusion.conditioned import ConditionedDenoiser
from fewstep.diffusion.denoiser import Call
from fewstep.diffusion.jump import land
from fewstep.diffusion.schedule import Estimate, Path, expand
from fewstep.methods.pair import Pair
from fewstep.methods.term_config import TangentConfig

WITHOUT_FORWARD_MODE: WeakSet[Call] = WeakSet()
"""Networks that an attempt has shown to have an operation without forward mode."""


class Place(NamedTuple):
    """Some times in the coordinates, float64 [B] each.

    Attributes:
        tau: the coordinates' time.
        scale: path's x over the coordinates'.
        d_t, d_alpha, d_sigma: derivatives of the path's t, alpha and sigma by tau.
    """

    tau: Tensor
    scale: Tensor
    d_t: Tensor
    d_alpha: Tensor
    d_sigma: Tensor


def place_of(coordinates: Coordinates, path: Path, t: Tensor) -> Place:
    """Return the place of times t float64 [B] of a path."""
    one = torch.ones_like(t)
    alpha, by_alpha = torch.func.jvp(path.alpha, (t,), (one,))[:2]
    sigma, by_sigma = torch.func.jvp(path.sigma, (t,), (one,))[:2]
    linear = coordinates == "linear"
    scale = alpha + sigma if linear else torch.hypot(alpha, sigma)
    tau = sigma / scale if linear else torch.atan2(sigma, alpha)
    d_t = scale.square() / (by_sigma * alpha - sigma * by_alpha)
    return Place(tau, scale, d_t, by_alpha * d_t, by_sigma * d_t)


def velocity(coordinates: Coordinates, path: Path, estimate: Estimate, t: Tensor) -> Tensor:
    """Return the coordinates' F of an estimate at t: eps - x0, or v = cos(tau) eps - sin(tau) x0."""
    if coordinates == "linear":
        return estimate.eps - estimate.x0
    alpha, sigma = path.alpha(t), path.sigma(t)
    norm = torch.hypot(alpha, sigma)
    return expand(alpha / norm, estimate.x0) * estimate.eps - expand(sigma / norm, estimate.x0) * estimate.x0


def jump_factors(coordinates: Coordinates, ahead: Tensor) -> tuple[Tensor, Tensor, float]:
    """Return A and B of a jump over `ahead` of tau, and the factor of x in the derivative of F along the path.

    d/dtau (A x - B F) = A dx/dtau - A F - B (curl x + dF/dtau): on the circle A and B turn as x does.
    """
    if coordinates == "linear":
        return torch.ones_like(ahead), ahead, 0.0
    return ahead.cos(), ahead.sin(), 1.0


Inputs = tuple[Tensor, ...]
"""Inputs of a function, the last one times float64 [B]; or their derivatives by tau."""


def finite(function: Callable[..., Tensor], at: Inputs, along: Inputs, width: float, path: Path) -> Tensor:
    """Return the derivative along a direction by a difference over 2 width of tau, one-sided where the path ends."""
    t, d_t = at[-1], along[-1]
    up, down = (torch.clamp(room / d_t, max=width) for room in (path.noisiest - t, t - path.least))

    def shifted(by: Tensor) -> Tensor:
        return function(*(x + expand(by, x) * d for x, d in zip(at, along, strict=True)))

    rise = shifted(up) - shifted(-down)
    return rise / expand(up + down, rise)


def derivative(pair: Pair, function: Callable[..., Tensor], at: Inputs, along: Inputs) -> Tensor:
    """Return the derivative of a function of the network along a direction, computed without autocast.

    Forward mode (`torch.func.jvp`) is exact, and is used where every operation of the network has it. Fused attention
    has not: there differences are taken, unless the recipe asks for forward mode, whose attention the math kernel
    computes. A network is tried once. In bf16 the rounding of a difference is as large as the derivative.
    """
    config, call = pair.config.tangent, pair.denoiser.call
    forced = config.derivative == "forward"
    with torch.autocast(pair.x_nk.device.type, enabled=False):
        if forced or (config.derivative == "auto" and call not in WITHOUT_FORWARD_MODE):
            try:
                with sdpa_kernel(SDPBackend.MATH) if forced else nullcontext():
                    return torch.func.jvp(function, at, along)[1]  # type: ignore[no-any-return]
            except (RuntimeError, UserError) as error:
                why = error.__cause__ if isinstance(error, UserError) else error  # a backbone names a network's errors
                if forced or not isinstance(why, RuntimeError) or isinstance(why, torch.OutOfMemoryError):
                    raise
                WITHOUT_FORWARD_MODE.add(call)
        return finite(function, at, along, config.width, pair.denoiser.path)


def share_of_derivative(config: TangentConfig, rng: KeyedRng) -> float:
    """Return r, the weight of the derivative, which rises over the warm-up (sCM, section 4.1; AYF, section 3.4)."""
    if rng.steps is None or not config.warmup:
        return config.most
    return min(config.most, rng.step / (config.warmup * rng.steps))


def eulerian(pair: Pair, student: ConditionedDenoiser, landing: Tensor, output: Tensor, share: float) -> Tensor:
    """Return A times the speed of the landing while the teacher moves x_t towards noise, with minus sign.

    A (A (F - v) + r B (curl x + dF/dtau)), the gap of F; v is the teacher's F. With A = 1 it is MeanFlow's (eq 10) and
    AYF's (algorithm 1), on the circle sCM's -g (algorithm 1).
    """
    config, path, t, s = pair.config.tangent, pair.denoiser.path, pair.times.t_nk, pair.times.s
    here = place_of(config.coordinates, path, t)
    teacher = pair.followed.denoise(pair.x_nk, t)
    along = expand(here.d_alpha, teacher.x0) * teacher.x0 + expand(here.d_sigma, teacher.x0) * teacher.eps

    def output_at(x: Tensor, t: Tensor) -> Tensor:
        return velocity(config.coordinates, path, student.estimate(x, t, s), t)

    inputs, by_tau = (pair.x_nk, t), (along.to(pair.x_nk.dtype), here.d_t)
    slope = derivative(pair, output_at, inputs, by_tau)
    a, b, curl = jump_factors(config.coordinates, here.tau - place_of(config.coordinates, path, s).tau)
    off = output - velocity(config.coordinates, path, teacher, t)
    turned = curl / expand(here.scale, slope) * pair.x_nk + slope
    return expand(a * a, off) * off + share * expand(a * b, off) * turned


def lagrangian(pair: Pair, student: ConditionedDenoiser, landing: Tensor, output: Tensor, share: float) -> Tensor:
    """Return A times the speed of the landing while s moves towards noise, less the teacher's speed there.

    A (A F - v(x_s, s) + r B (curl x - dF/dtau_s)) (AYF-LMD, theorem 3.3, with A = 1).
    """
    config, path, t, s = pair.config.tangent, pair.denoiser.path, pair.times.t_nk, pair.times.s
    here, there = (place_of(config.coordinates, path, when) for when in (t, s))

    def output_at(s: Tensor) -> Tensor:
        return velocity(config.coordinates, path, student.estimate(pair.x_nk, t, s), t)

    slope = derivative(pair, output_at, (s,), (there.d_t,))
    a, b, curl = jump_factors(config.coordinates, here.tau - there.tau)
    off = expand(a, output) * output - velocity(config.coordinates, path, pair.followed.denoise(landing, s), s)
    turned = curl / expand(here.scale, slope) * pair.x_nk - slope
    return expand(a, off) * (off + share * expand(b, off) * turned)


class Outputs(NamedTuple):
    """The student's landing, its output F, both with gradient, and the F that it is compared with, [B, ...] each."""

    landing: Tensor
    output: Tensor
    wanted: Tensor


def limit_outputs(pair: Pair, rng: KeyedRng) -> Outputs:
    """Return the student's output and the one without the gap; one student call with gradient."""
    config, path, times = pair.config, pair.denoiser.path, pair.times
    extra = config.extra_conditioning
    student = ConditionedDenoiser(pair.denoiser, pair.batch.condition, "student", extra, w=pair.omega)
    estimate = student.estimate(pair.x_nk, times.t_nk, times.s)
    landing, output = land(estimate, path, times.s), velocity(config.tangent.coordinates, path, estimate, times.t_nk)
    gap_of = eulerian if config.point == "eulerian" else lagrangian
    with torch.no_grad():
        share = share_of_derivative(config.tangent, rng)
        gap = gap_of(pair, student, landing.detach(), output.detach(), share)
    return Outputs(landing, output, output.detach() - gap)
