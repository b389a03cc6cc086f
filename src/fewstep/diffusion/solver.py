"""Solvers of the probability-flow ODE, and the step by a teacher's stored outputs.

The jump functions of `jump` are solvers too: DDIM, DPM-Solver-2, DPM-Solver++(2S).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from fewstep.common.choices import Prediction, SolverName
from fewstep.diffusion.jump import Denoise, Step, first_order, land, second_order
from fewstep.diffusion.schedule import PURE_NOISE, Path, expand, interpret

ddim: Step = first_order
"""DDIM with eta = 0 (arXiv 2010.02502)."""
dpm_2: Step = partial(second_order, form="eps")
"""DPM-Solver-2 (arXiv 2206.00927)."""
dpmpp_2s: Step = partial(second_order, form="x0")
"""DPM-Solver++(2S) (arXiv 2211.01095)."""


def euler(denoise: Denoise, path: Path, x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """Step by Euler in sigma (arXiv 2206.00364): with y = x/alpha and rho = sigma/alpha, dy/drho = eps.

    One call. On the same two times it is DDIM exactly: alpha_s (x_t/alpha_t + (rho_s - rho_t) eps)
    = alpha_s x0 + sigma_s eps. The limit from pure noise (alpha_t = 0)
    is the second form, since y and rho are infinite there.
    """
    at_t = denoise(x_t, t)
    pure = path.alpha(t) < PURE_NOISE
    return torch.where(expand(pure, x_t).bool(), land(at_t, path, s), _along(path, x_t, t, s, at_t.eps))


def heun(denoise: Denoise, path: Path, x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """Step by Heun in sigma (EDM, arXiv 2206.00364, algorithm 1): the mean of the slopes eps at both ends. Two calls.

    Local error O(h^3). Onto clean data and from pure noise it is Euler's step, as EDM's last one; the second call of
    those samples repeats the first. `samplers.sample_ode` leaves it out.
    """
    at_t = denoise(x_t, t)
    lone = (path.sigma(s) == 0) | (path.alpha(t) < PURE_NOISE) | (t == s)
    single = expand(lone, x_t).bool()
    x_s = land(at_t, path, s)
    at_s = denoise(torch.where(single, x_t, x_s), torch.where(lone, t, s))
    return torch.where(single, x_s, _along(path, x_t, t, s, (at_t.eps + at_s.eps) / 2))


def _along(path: Path, x_t: Tensor, t: Tensor, s: Tensor, slope: Tensor) -> Tensor:
    """Return x_s = alpha_s (x_t/alpha_t + (rho_s - rho_t) slope); finite but meaningless from pure noise."""
    alpha_t = path.alpha(t)
    keep = path.alpha(s) / torch.where(alpha_t < PURE_NOISE, 1, alpha_t)
    return expand(keep, x_t) * x_t + expand(path.sigma(s) - keep * path.sigma(t), x_t) * slope


SOLVERS: Mapping[SolverName, Step] = {
    "ddim": ddim,
    "euler": euler,
    "heun": heun,
    "dpm_2": dpm_2,
    "dpmpp_2s": dpmpp_2s,
}


def integrate(step: Step, denoise: Denoise, path: Path, x: Tensor, times: Tensor) -> Tensor:
    """Integrate from x at times[0] through times[1], ..., to times[-1]; times float64 [n + 1, B], falling.

    Samples of one batch take the same number of steps; a step of no length is the identity, but costs its calls.
    """
    for t, s in pairwise(times):
        x = step(denoise, path, x, t, s)
    return x


def guided_output(with_prompt: Tensor, without_prompt: Tensor, omega: Tensor) -> Tensor:
    """Return (1 + omega) output(c) - omega output(null), omega [B], as `Denoiser.guided` computes it."""
    return with_prompt + expand(omega, with_prompt) * (with_prompt - without_prompt)


def step_from_stored(
    path: Path,
    prediction: Prediction,
    x_t: Tensor,
    with_prompt: Tensor,
    without_prompt: Tensor,
    omega: Tensor,
    t: Tensor,
    s: Tensor,
) -> Tensor:
    """Return the guided DDIM step from a stored point x_t at t to any cleaner s, under any omega.

    It equals `ddim` with the guided teacher there, to the precision that the three tensors are stored in.

    Args:
        prediction: the kind of the stored outputs.
        x_t, with_prompt, without_prompt: [B, ...].
        omega, t, s: float64 [B].

    Returns:
        x_s, [B, ...].
    """
    output = guided_output(with_prompt, without_prompt, omega)
    estimate = interpret(prediction, output, x_t, expand(path.alpha(t), x_t), expand(path.sigma(t), x_t))
    return land(estimate, path, s)
