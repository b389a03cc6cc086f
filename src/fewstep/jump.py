"""Jump functions f(x_t, t -> s) along the probability-flow ODE, from a network's estimate at x_t.

All take the estimate of `schedule.interpret` and coefficients shaped to multiply x.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.schedule import Estimate


def first_order(estimate: Estimate, alpha_s: Tensor, sigma_s: Tensor) -> Tensor:
    """TCF(1), TCD's first-order trajectory consistency function (arXiv 2402.19159, section 4.1).

    x_s = alpha_s x0 + sigma_s eps. It equals (sigma_s/sigma_t) x_t - alpha_s (e^{-h} - 1) x0 with
    h = lambda_s - lambda_t, and the DDIM step; this form has no exponential, is finite at sigma_s = 0 and is
    the identity at s = t: f(x_s, s -> s) = x_s.
    """
    return alpha_s * estimate.x0 + sigma_s * estimate.eps


def skip_scalings(t: Tensor, timestep_scaling: float = 10.0, sigma_data: float = 0.5) -> tuple[Tensor, Tensor]:
    """LCM's (c_skip, c_out) as released: with tau = scaling * t, sigma_data^2 / (tau^2 + sigma_data^2) and
    tau / sqrt(tau^2 + sigma_data^2) (arXiv 2310.04378 and its code). float64, the shape of t.

    They are (1, 0) at t = 0 and close to (0, 1) from t = 1 on: they only enforce the identity at t = 0. Times
    below 0 (clean data on an indexed path) count as 0.
    """
    tau = timestep_scaling * t.double().clamp(min=0)
    norm = tau.square() + sigma_data**2
    return sigma_data**2 / norm, tau / torch.sqrt(norm)


def skip_connection(x_t: Tensor, estimate: Estimate, c_skip: Tensor, c_out: Tensor) -> Tensor:
    """LCM's consistency function, a jump to clean data: f = c_skip x_t + c_out x0."""
    return c_skip * x_t + c_out * estimate.x0
