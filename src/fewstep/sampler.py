"""Sampling: pure step functions, and the loops built on them.

A step takes the network's estimate at x_t and returns x at the next time; nothing has state. Loops take the
list of call times (one at least) from `grid.inference_times` and a `noise()` that returns fresh standard
normal noise shaped like x.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from fewstep.errors import UserError
from fewstep.grid import end_time
from fewstep.jump import first_order, skip_connection, skip_scalings
from fewstep.names import End, SolverName
from fewstep.schedule import PURE_NOISE, Estimate, Path, VariancePreserving, expand
from fewstep.solver import SOLVERS, Denoise, ddim

Noise = Callable[[], Tensor]


def check_gamma(gamma: float) -> float:
    """Return gamma if it lies in [0, 1].

    Raises:
        UserError: it does not.
    """
    if not 0 <= gamma <= 1:
        legal = min(max(gamma, 0.0), 1.0)
        raise UserError(f"gamma = {gamma} is outside [0, 1]; the nearest legal one is {legal}")
    return gamma


def diffuse(path: Path, x_s: Tensor, s: Tensor, t: Tensor, z: Tensor) -> Tensor:
    """Add the noise that lies between s and the noisier t: x_t = (alpha_t/alpha_s) x_s + std z.

    std^2 = sigma_t^2 - (alpha_t/alpha_s)^2 sigma_s^2, which on a variance-preserving path is
    1 - alpha_t^2/alpha_s^2 (TCD, algorithm 4). It is 0 at s = t; rounding below 0 is clamped.
    """
    ratio = path.alpha(t) / path.alpha(s)
    std = (path.sigma(t).square() - (ratio * path.sigma(s)).square()).clamp_min(0).sqrt()
    return expand(ratio, x_s) * x_s + expand(std, x_s) * z


def sss_target(path: Path, t_next: Tensor, gamma: float) -> Tensor:
    """SSS's denoising target s = (1 - gamma) t_next; floored to an index on an indexed path, as released."""
    s = (1 - gamma) * t_next
    if gamma == 0 or not isinstance(path, VariancePreserving):
        return s
    # .7 * 90 is 62.99...: what is whole but for rounding must not lose an index
    return (s + 1e-9).floor()


def sss_step(path: Path, estimate: Estimate, t_next: Tensor, gamma: float, z: Tensor) -> Tensor:
    """Strategic stochastic sampling (TCD, algorithm 4): jump to s = (1 - gamma) t_next, then diffuse.

    gamma = 0 is the deterministic jump to t_next; gamma = 1 returns to the least noisy index and re-noises
    fully, as multistep consistency sampling does. With the first-order jump it is DDIM with noise of standard
    deviation sqrt(1 - alpha_next^2/alpha_s^2).
    """
    s = sss_target(path, t_next, gamma)
    x_s = first_order(estimate, expand(path.alpha(s), estimate.x0), expand(path.sigma(s), estimate.x0))
    return diffuse(path, x_s, s, t_next, z)


def consistency_step(path: Path, x_0: Tensor, t_next: Tensor, z: Tensor) -> Tensor:
    """Multistep consistency sampling: noise the jump's end point x_0 afresh, to t_next."""
    return expand(path.alpha(t_next), x_0) * x_0 + expand(path.sigma(t_next), x_0) * z


def _batch(t: float, x: Tensor) -> Tensor:
    return torch.full((len(x),), t, dtype=torch.float64)


def sample_sss(
    denoise: Denoise, path: Path, x: Tensor, times: Sequence[float], gamma: float, end: End, noise: Noise
) -> Tensor:
    """Draw with SSS from x at times[0]; len(times) network calls, no noise after the last."""
    check_gamma(gamma)
    for t, t_next in pairwise(times):
        estimate = denoise(x, _batch(t, x))
        z = noise() if gamma > 0 else torch.zeros_like(x)
        x = sss_step(path, estimate, _batch(t_next, x), gamma, z)
    return ddim(denoise, path, x, _batch(times[-1], x), _batch(end_time(path, end), x))


def sample_consistency(denoise: Denoise, path: Path, x: Tensor, times: Sequence[float], noise: Noise) -> Tensor:
    """LCM's multistep consistency sampling (arXiv 2310.04378, algorithm 3); it ends on clean data."""

    def jump(x: Tensor, t: float) -> Tensor:
        now = _batch(t, x)
        c_skip, c_out = skip_scalings(now)
        return skip_connection(x, denoise(x, now), expand(c_skip, x), expand(c_out, x))

    for t, t_next in pairwise(times):
        x = consistency_step(path, jump(x, t), _batch(t_next, x), noise())
    return jump(x, times[-1])


def sample_ode(
    denoise: Denoise, path: Path, x: Tensor, times: Sequence[float], end: End, solver: SolverName = "ddim"
) -> Tensor:
    """Follow the probability-flow ODE from x at times[0] to the end point, one solver step a time.

    A step from pure noise or onto clean data, where lambda is infinite, is of first order: one call.
    """
    for t, s in pairwise([*times, end_time(path, end)]):
        now = _batch(t, x)
        endless = s == path.clean or float(path.alpha(torch.tensor(t, dtype=torch.float64))) < PURE_NOISE
        x = (ddim if endless else SOLVERS[solver])(denoise, path, x, now, _batch(s, x))
    return x


def picture_noise(seeds: Sequence[int], shape: tuple[int, ...]) -> tuple[Tensor, Noise]:
    """Start noise [len(seeds), *shape] and the step noise after it, from one CPU generator per picture.

    The order of the draws is that of a diffusers pipeline given a list of CPU generators, so that pictures
    are the same there, and a picture does not depend on the batch it is drawn in.
    """
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]

    def noise() -> Tensor:
        return torch.cat([torch.randn((1, *shape), generator=g) for g in generators])

    return noise(), noise
