"""Jump functions f(x_t, t -> s) along the probability-flow ODE.

All have the signature (denoise, path, x_t, t, s) -> x_s, with per-sample times t, s float64 [B]. A solver's step is a
jump of the teacher: `solver` is built on these functions.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from fewstep.common.choices import Form
from fewstep.common.choices import Jump as JumpName
from fewstep.diffusion.schedule import PURE_NOISE, Estimate, Path, expand, index_of

Denoise = Callable[[Tensor, Tensor], Estimate]
"""(x_t [B, ...], t float64 [B]) -> x0 and eps; see `denoiser`."""
Step = Callable[[Denoise, Path, Tensor, Tensor, Tensor], Tensor]
"""(denoise, path, x_t, t, s) -> x_s."""


def land(estimate: Estimate, path: Path, s: Tensor) -> Tensor:
    """Return x_s = alpha_s x0 + sigma_s eps of an estimate."""
    return expand(path.alpha(s), estimate.x0) * estimate.x0 + expand(path.sigma(s), estimate.x0) * estimate.eps


def first_order(denoise: Denoise, path: Path, x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """Jump by TCF(1), TCD's first-order trajectory consistency function (arXiv 2402.19159, section 4.1). One call.

    x_s = alpha_s x0 + sigma_s eps. It equals (sigma_s/sigma_t) x_t - alpha_s (e^{-h} - 1) x0 and
    (alpha_s/alpha_t) x_t - sigma_s (e^h - 1) eps with h = lambda_s - lambda_t, the DDIM step, CTM's G on a variance
    exploding path and the Euler step of a flow. This form has no exponential, is finite at sigma_s = 0 and is the
    identity at s = t: f(x_s, s -> s) = x_s. Local error O(h^2).
    """
    return land(denoise(x_t, t), path, s)


def second_order(
    denoise: Denoise, path: Path, x_t: Tensor, t: Tensor, s: Tensor, r: float = 0.5, form: Form = "x0"
) -> Tensor:
    """Jump by TCF(2), the second-order trajectory consistency function (arXiv 2402.19159, section 4.1). Two calls.

    The mid-point u lies at lambda_u = lambda_t + r h, in general between two training indices. With data
    predictions (DPM-Solver++(2S), arXiv 2211.01095, algorithm 1):
    x_u = (sigma_u/sigma_t) x_t - alpha_u (e^{-rh} - 1) x0(x_t, t);
    D = (1 - 1/2r) x0(x_t, t) + (1/2r) x0(x_u, u);  x_s = (sigma_s/sigma_t) x_t - alpha_s (e^{-h} - 1) D.
    With noise predictions (DPM-Solver-2, arXiv 2206.00927):
    x_u = (alpha_u/alpha_t) x_t - sigma_u (e^{rh} - 1) eps(x_t, t);
    x_s = (alpha_s/alpha_t) x_t - sigma_s (e^h - 1) [eps(x_t, t) + (1/2r) (eps(x_u, u) - eps(x_t, t))].
    Local error O(h^3) in both.

    Onto clean data (sigma_s = 0) and from pure noise (alpha_t = 0) lambda is infinite, and at s = t the step is empty:
    those samples take the first-order step and repeat the call, which `samplers.sample_ode` leaves out.
    """
    alpha_t, sigma_t, alpha_s, sigma_s = (part(when) for when in (t, s) for part in (path.alpha, path.sigma))
    single = (sigma_s == 0) | (alpha_t < PURE_NOISE) | (t == s)
    h = torch.where(single, 0, path.log_snr(s) - path.log_snr(t))
    u = torch.where(single, t, path.time_of(path.log_snr(t) + r * h))
    alpha_u, sigma_u = path.alpha(u), path.sigma(u)
    at_t = denoise(x_t, t)
    # x_t is multiplied by sigma_s/sigma_t or alpha_s/alpha_t, made finite where the first-order step is taken
    a, b = (sigma_t, alpha_t) if form == "x0" else (alpha_t, sigma_t)
    a = torch.where(a == 0, 1, a)
    (a_u, b_u), (a_s, b_s) = (
        ((sigma_u, alpha_u), (sigma_s, alpha_s)) if form == "x0" else ((alpha_u, sigma_u), (alpha_s, sigma_s))
    )

    def prediction_of(estimate: Estimate) -> Tensor:
        return estimate.x0 if form == "x0" else estimate.eps

    def step(keep: Tensor, gain: Tensor, prediction: Tensor) -> Tensor:
        return expand(keep, x_t) * x_t + expand(gain, x_t) * prediction

    # -alpha_u (e^{-rh} - 1) = alpha_u - (sigma_u/sigma_t) alpha_t, and likewise with noise
    at_u = denoise(step(a_u / a, b_u - a_u / a * b, prediction_of(at_t)), u)
    blend = (1 - 0.5 / r) * prediction_of(at_t) + (0.5 / r) * prediction_of(at_u)
    x_s = step(a_s / a, b_s - a_s / a * b, blend)
    return torch.where(expand(single, x_t).bool(), land(at_t, path, s), x_s)


def lcm_scalings(t: Tensor, timestep_scaling: float = 10.0, sigma_data: float = 0.5) -> tuple[Tensor, Tensor]:
    """Return LCM's (c_skip, c_out) as released (arXiv 2310.04378 and its code), float64, the shape of t.

    sigma_data^2 / (tau^2 + sigma_data^2) and tau / sqrt(tau^2 + sigma_data^2) with tau = scaling * t, t in training
    indices. They are (1, 0) at t = 0 and close to (0, 1) from t = 1 on. Times below 0 (clean data) count as 0.
    """
    tau = timestep_scaling * t.double().clamp(min=0)
    norm = tau.square() + sigma_data**2
    return sigma_data**2 / norm, tau / torch.sqrt(norm)


def lcm_skip(denoise: Denoise, path: Path, x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """Jump to clean data for every s, by LCM's consistency function f = c_skip x_t + c_out x0. One call."""
    c_skip, c_out = lcm_scalings(index_of(path, t))
    return expand(c_skip, x_t) * x_t + expand(c_out, x_t) * denoise(x_t, t).x0


def cm_skip(denoise: Denoise, path: Path, x_t: Tensor, t: Tensor, s: Tensor, sigma_data: float = 0.5) -> Tensor:
    """Jump to the end point s by the consistency function of CD and CT (arXiv 2303.01469, appendix C). One call.

    On a variance exploding path with end point eps: c_skip x + c_out F with c_skip = d^2/((t - eps)^2 + d^2) and
    c_out = d (t - eps)/sqrt(t^2 + d^2), d = sigma_data. F is the network inside EDM's denoiser
    x0 = d^2/(t^2 + d^2) x + d t/sqrt(t^2 + d^2) F; with it eliminated,
    f = c_skip x + (t - eps)/t (x0 - d^2/(t^2 + d^2) x). Other paths are rescaled: x/alpha has t = sigma/alpha.
    It is the identity at t = s, and x0 far from it.
    """
    alpha_t, sigma_t, alpha_s = path.alpha(t), path.sigma(t), path.alpha(s)
    away = sigma_t - path.sigma(s) / alpha_s * alpha_t  # alpha_t (t - eps)
    d2 = (sigma_data * alpha_t).square()
    share = torch.where(sigma_t == 0, 0, away / torch.where(sigma_t == 0, 1, sigma_t))
    skip = sigma_data**2 * alpha_t * (1 / (away.square() + d2) - share / (sigma_t.square() + d2))
    return expand(alpha_s * skip, x_t) * x_t + expand(alpha_s * share, x_t) * denoise(x_t, t).x0


def student_step(jump: JumpName, r: float = 0.5, form: Form = "x0") -> Step:
    """Return the named jump function; `r` and `form` are those of `second_order`."""
    if jump == "second_order":
        return partial(second_order, r=r, form=form)
    return {"skip": lcm_skip, "cm_skip": cm_skip, "first_order": first_order}[jump]
