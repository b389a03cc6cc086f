"""One step of the probability-flow ODE, from t to s, with a denoiser in the place of the score.

A denoiser is a function (x_t, t) -> Estimate with per-sample times t, float64 [B]; see `denoiser.py`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fewstep.jump import first_order
from fewstep.names import SolverName
from fewstep.schedule import PURE_NOISE, Estimate, Path, expand

Denoise = Callable[[Tensor, Tensor], Estimate]


def ddim(denoise: Denoise, path: Path, x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """DDIM with eta = 0 (arXiv 2010.02502): x_s = alpha_s x0 + sigma_s eps. One call, local error O(h^2)."""
    return first_order(denoise(x_t, t), expand(path.alpha(s), x_t), expand(path.sigma(s), x_t))


def euler(denoise: Denoise, path: Path, x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """Euler in sigma (arXiv 2206.00364): with y = x/alpha and rho = sigma/alpha, dy/drho = eps.

    One call. On the same two times it is DDIM exactly: alpha_s (x_t/alpha_t + (rho_s - rho_t) eps)
    = alpha_s x0 + sigma_s eps. It is kept apart because people ask for it by name. From pure noise
    (alpha_t = 0, where y and rho are infinite; `schedule.PURE_NOISE`) that second form is the limit, and is taken.
    """
    at_t = denoise(x_t, t)
    alpha_t, alpha_s, sigma_s = path.alpha(t), path.alpha(s), path.sigma(s)
    pure = alpha_t < PURE_NOISE
    alpha_t = torch.where(pure, 1, alpha_t)
    y = x_t / expand(alpha_t, x_t)
    x_s = expand(alpha_s, x_t) * y + expand(sigma_s - alpha_s * path.sigma(t) / alpha_t, x_t) * at_t.eps
    limit = first_order(at_t, expand(alpha_s, x_t), expand(sigma_s, x_t))
    return torch.where(expand(pure, x_t).bool(), limit, x_s)


def dpmpp_2s(denoise: Denoise, path: Path, x_t: Tensor, t: Tensor, s: Tensor, r: float = 0.5) -> Tensor:
    """DPM-Solver++(2S) (arXiv 2211.01095, algorithm 1): mid-point u at lambda_u = lambda_t + r h. Two calls.

    x_u = (sigma_u/sigma_t) x_t - alpha_u (e^{-rh} - 1) x0(x_t, t);
    D = (1 - 1/2r) x0(x_t, t) + (1/2r) x0(x_u, u);
    x_s = (sigma_s/sigma_t) x_t - alpha_s (e^{-h} - 1) D. Local error O(h^3).

    Onto clean data (sigma_s = 0) and from pure noise (alpha_t = 0) lambda is infinite and there is no
    mid-point: those samples take the first-order step, as the authors' last step does. Their second call is
    spent on the same point again; `sampler.sample_ode`, which knows its times beforehand, does not make it.
    """
    endless = (path.sigma(s) == 0) | (path.alpha(t) < PURE_NOISE)
    lambda_t = path.log_snr(t)
    h = torch.where(endless, 0, path.log_snr(s) - lambda_t)
    at_t = denoise(x_t, t)
    u = path.time_of(lambda_t + r * h)
    alpha_u, sigma_u = path.alpha(u), path.sigma(u)
    ratio = expand(sigma_u / path.sigma(t), x_t)
    x_u = ratio * x_t - expand(alpha_u * torch.expm1(-r * h), x_t) * at_t.x0
    blend = (1 - 0.5 / r) * at_t.x0 + (0.5 / r) * denoise(x_u, u).x0
    x0 = torch.where(expand(endless, x_t).bool(), at_t.x0, blend)
    # sigma_s/sigma_t x_t - alpha_s (e^{-h} - 1) D, with e^{-h} written as (sigma_s/alpha_s)(alpha_t/sigma_t)
    keep = path.sigma(s) / path.sigma(t)
    return expand(keep, x_t) * x_t + expand(path.alpha(s) - keep * path.alpha(t), x_t) * x0


SOLVERS: dict[SolverName, Callable[[Denoise, Path, Tensor, Tensor, Tensor], Tensor]] = {
    "ddim": ddim,
    "euler": euler,
    "dpmpp_2s": dpmpp_2s,
}
