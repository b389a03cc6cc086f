"""Sampling: pure step functions, and the loops built on them.

A step takes x at one time and returns x at the next; nothing has state. Loops take the list of call times (one at
least) from `grid.inference_times`, a jump of the network's, and a `noise()` that returns fresh standard normal noise
shaped like x.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from fewstep.common.choices import End, GammaLaw, SolverName
from fewstep.common.errors import UserError
from fewstep.diffusion.grid import end_time
from fewstep.diffusion.jump import Denoise, Step, land
from fewstep.diffusion.schedule import PURE_NOISE, Estimate, Path, VarianceExploding, VariancePreserving, expand
from fewstep.diffusion.solver import SOLVERS, ddim

Noise = Callable[[], Tensor]
JumpFn = Callable[[Tensor, Tensor, Tensor], Tensor]
"""A network's own jump: (x_t [B, ...], t [B], s [B]) -> x_s. See `jumper`."""


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


def ctm_target(path: Path, t_next: Tensor, gamma: float) -> Tensor:
    """CTM's denoising target (arXiv 2310.02279, algorithm 3): sigma_s = sqrt(1 - gamma^2) sigma_next where alpha = 1.

    On other paths sigma/alpha takes sigma's place, so that the noise that is put back has the share gamma^2 of the
    variance sigma_next^2 at any t_next and any number of steps; SSS's share grows with t_next.
    """
    if gamma == 0:
        return t_next
    if gamma == 1:
        return torch.full_like(t_next, path.clean)
    kept = (1 - gamma**2) ** 0.5 * path.sigma(t_next) / path.alpha(t_next)
    return torch.where(kept == 0, path.clean, path.time_of(-kept.log()))


TARGETS: dict[GammaLaw, Callable[[Path, Tensor, float], Tensor]] = {"time": sss_target, "noise": ctm_target}
"""(path, t_next, gamma) -> where to denoise to, before noise brings x back to t_next."""


def sss_landing(path: Path, t_next: Tensor, gamma: float, end: End, law: GammaLaw = "time") -> Tensor:
    """Where SSS denoises to before noise brings x back to t_next [B]: by a law of `TARGETS`, at or above the end point.

    A network is not asked for less than it was trained to; full re-noising returns to the end point itself.
    """
    lowest = end_time(path, end)
    return torch.full_like(t_next, lowest) if gamma == 1 else TARGETS[law](path, t_next, gamma).clamp(min=lowest)


def sss_step(path: Path, estimate: Estimate, t_next: Tensor, gamma: float, z: Tensor, law: GammaLaw = "time") -> Tensor:
    """Strategic stochastic sampling (TCD, algorithm 4) with the first-order jump: to s, then diffuse to t_next.

    By TCD's law s = (1 - gamma) t_next. gamma = 0 is the deterministic jump to t_next; gamma = 1 returns to the least
    noisy index and re-noises fully, as multistep consistency sampling does. It is DDIM with noise of standard
    deviation sqrt(sigma_next^2 - (alpha_next/alpha_s)^2 sigma_s^2).
    """
    s = TARGETS[law](path, t_next, gamma)
    return diffuse(path, land(estimate, path, s), s, t_next, z)


def _batch(t: float, x: Tensor) -> Tensor:
    return torch.full((len(x),), t, dtype=torch.float64)


def sample_sss(
    jump: JumpFn,
    path: Path,
    x: Tensor,
    times: Sequence[float],
    gamma: float,
    end: End,
    noise: Noise,
    law: GammaLaw = "time",
) -> Tensor:
    """Draw with SSS from x at times[0]; one jump a time, no noise after the last.

    With a second-order jump this is the paper's SSS of second order: denoise by DPM-Solver++(2S) to s, then diffuse.
    """
    check_gamma(gamma)
    for t, t_next in pairwise(times):
        then = _batch(t_next, x)
        s = sss_landing(path, then, gamma, end, law)
        x_s = jump(x, _batch(t, x), s)
        x = diffuse(path, x_s, s, then, noise()) if gamma > 0 else x_s
    return jump(x, _batch(times[-1], x), _batch(end_time(path, end), x))


def sample_consistency(jump: JumpFn, path: Path, x: Tensor, times: Sequence[float], end: End, noise: Noise) -> Tensor:
    """Multistep consistency sampling (arXiv 2303.01469, algorithm 1): jump to the end point, add the noise above it.

    LCM's own jump lands on clean data; with `end = clean` this is its algorithm 3 (arXiv 2310.04378).
    """
    s = _batch(end_time(path, end), x)
    for t, t_next in pairwise(times):
        x = diffuse(path, jump(x, _batch(t, x), s), s, _batch(t_next, x), noise())
    return jump(x, _batch(times[-1], x), s)


def sample_ode(
    denoise: Denoise, path: Path, x: Tensor, times: Sequence[float], end: End, solver: SolverName = "ddim"
) -> Tensor:
    """Follow the probability-flow ODE from x at times[0] to the end point, one solver step a time.

    A step from pure noise or onto clean data, where lambda is infinite, is of first order: one call.
    """
    for t, s in pairwise([*times, end_time(path, end)]):
        x = step_between(path, t, s, solver)(denoise, path, x, _batch(t, x), _batch(s, x))
    return x


def step_between(path: Path, t: float, s: float, solver: SolverName) -> Step:
    """The solver's step from t to s; of first order, one call, from pure noise or onto clean data."""
    endless = s == path.clean or float(path.alpha(torch.tensor(t, dtype=torch.float64))) < PURE_NOISE
    return ddim if endless else SOLVERS[solver]


def sample_sde_dpmpp_2m(
    denoise: Denoise, path: Path, x: Tensor, times: Sequence[float], end: End, noise: Noise
) -> Tensor:
    """SDE-DPM-Solver++(2M) (arXiv 2211.01095, appendix): one call a step, the last data prediction is used again.

    With h = lambda_s - lambda_t and r = (the h before)/h:
    x_s = (sigma_s/sigma_t) e^{-h} x_t + alpha_s (1 - e^{-2h}) [D + (D - D_before)/2r] + sigma_s sqrt(1 - e^{-2h}) z.
    The first step, and the one onto clean data, have no h to compare with and take D alone; from pure noise too.
    """
    before: Tensor | None = None
    h_before = 0.0
    for t, s in pairwise([*times, end_time(path, end)]):
        now, then = _batch(t, x), _batch(s, x)
        alpha_t, sigma_t, alpha_s, sigma_s = (part(u)[:1] for u in (now, then) for part in (path.alpha, path.sigma))
        x0 = denoise(x, now).x0
        endless = float(sigma_s) == 0 or float(alpha_t) < PURE_NOISE
        # e^{-h} = (sigma_s/sigma_t)(alpha_t/alpha_s), which is 0 at both ends
        shrink = (sigma_s * alpha_t) / (sigma_t * alpha_s)
        fresh = 1 - shrink.square()
        h = 0.0 if endless else -float(shrink.log())
        data = x0 if before is None or endless or not h_before else x0 + (0.5 * h / h_before) * (x0 - before)
        x = expand(sigma_s / sigma_t * shrink, x) * x + expand(alpha_s * fresh, x) * data
        if float(sigma_s) > 0:
            x = x + expand(sigma_s * fresh.sqrt(), x) * noise()
        before, h_before = x0, h
    return x


def start_size(path: Path) -> float:
    """What N(0, I) is multiplied by at the start: sigma_max on a variance exploding path.

    1 elsewhere, on a variance preserving path too, whose sigma is a little below it: as pipelines start.
    """
    return path.noisiest if isinstance(path, VarianceExploding) else 1.0


def picture_noise(seeds: Sequence[int], shape: tuple[int, ...]) -> tuple[Tensor, Noise]:
    """Start noise [len(seeds), *shape] and the step noise after it, from one CPU generator per picture.

    The order of the draws is that of a diffusers pipeline given a list of CPU generators, so that pictures
    are the same there, and a picture does not depend on the batch it is drawn in.
    """
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]

    def noise() -> Tensor:
        return torch.cat([torch.randn((1, *shape), generator=g) for g in generators])

    return noise(), noise
