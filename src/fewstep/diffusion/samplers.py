"""Samplers, without state.

They take the call times (one at least) from `grid.inference_times`, a jump of the network, and `noise()`, which returns
fresh standard normal noise shaped like x.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from fewstep.common.choices import End, GammaRule, SolverName
from fewstep.diffusion.grid import end_time
from fewstep.diffusion.jump import Denoise, Step
from fewstep.diffusion.schedule import PURE_NOISE, Path, VarianceExploding, VariancePreserving, expand
from fewstep.diffusion.solver import SOLVERS, ddim

Noise = Callable[[], Tensor]
JumpFn = Callable[[Tensor, Tensor, Tensor], Tensor]
"""A network's jump: (x_t [B, ...], t [B], s [B]) -> x_s; see `ConditionedDenoiser.jump`."""


def diffuse(path: Path, x_s: Tensor, s: Tensor, t: Tensor, z: Tensor) -> Tensor:
    """Add the noise that lies between s and the noisier t: x_t = (alpha_t/alpha_s) x_s + std z.

    std^2 = sigma_t^2 - (alpha_t/alpha_s)^2 sigma_s^2, on a variance-preserving path 1 - alpha_t^2/alpha_s^2 (TCD, arXiv
    2402.19159, algorithm 4). It is 0 at s = t; rounding below 0 is clamped.
    """
    ratio = path.alpha(t) / path.alpha(s)
    std = (path.sigma(t).square() - (ratio * path.sigma(s)).square()).clamp_min(0).sqrt()
    return expand(ratio, x_s) * x_s + expand(std, x_s) * z


def linear_in_time(path: Path, t_next: Tensor, gamma: float) -> Tensor:
    """Return TCD's landing s = (1 - gamma) t_next (arXiv 2402.19159, algorithm 4), floored on an indexed path."""
    if gamma == 1:  # clean data lies at t = -1 on an indexed path
        return torch.full_like(t_next, path.clean)
    s = (1 - gamma) * t_next
    if gamma == 0 or not isinstance(path, VariancePreserving):
        return s
    # .7 * 90 is 62.99...: a whole number must not lose an index to rounding
    return (s + 1e-9).floor()


def linear_in_noise(path: Path, t_next: Tensor, gamma: float) -> Tensor:
    """Return CTM's landing, sigma_s = sqrt(1 - gamma^2) sigma_next where alpha = 1 (arXiv 2310.02279, algorithm 3).

    Other paths take sigma/alpha for sigma. The fresh noise then has the share gamma^2 of the variance sigma_next^2 at
    any time and number of steps; TCD's share grows with t_next.
    """
    if gamma == 0:
        return t_next
    if gamma == 1:
        return torch.full_like(t_next, path.clean)
    kept = (1 - gamma**2) ** 0.5 * path.sigma(t_next) / path.alpha(t_next)
    return torch.where(kept == 0, path.clean, path.time_of(-kept.log()))


SSS_RULES: dict[GammaRule, Callable[[Path, Tensor, float], Tensor]] = {"time": linear_in_time, "noise": linear_in_noise}
"""(path, t_next float64 [B], gamma) -> the landing s <= t_next of a jump, before noise brings x back to t_next.

Times are those of the path. `sss_jumps` raises s to the end point where a rule returns less. gamma = 0 returns t_next.
"""


@dataclass(frozen=True)
class PlannedJump:
    """One jump of a sampler: from t to s, then noise up to `noise_to`, if any. Times float64 [B].

    Samplers here and our diffusers schedulers follow the same plans.
    """

    t: Tensor
    s: Tensor
    noise_to: Tensor | None = None

    def renoise(self, path: Path, x_s: Tensor, noise: Noise) -> Tensor:
        """Return x where the next jump starts."""
        return x_s if self.noise_to is None else diffuse(path, x_s, self.s, self.noise_to, noise())


def _batch(t: float, rows: int) -> Tensor:
    return torch.full((rows,), t, dtype=torch.float64)


def sss_jumps(
    path: Path, times: Sequence[float], gamma: float, end: End, rule: GammaRule = "time", rows: int = 1
) -> list[PlannedJump]:
    """Plan strategic stochastic sampling (TCD, arXiv 2402.19159, algorithm 4) over the falling `times`.

    Each jump lands at s by a rule of `SSS_RULES`, at or above the end point, and noise brings x up to the next time.
    gamma = 0 is the deterministic jump to the next time. With both bundled rules gamma = 1 lands at the end point and
    re-noises fully, as multistep consistency sampling does. The last jump lands at the end point, without noise. With
    a second-order jump it is the paper's SSS of second order: DPM-Solver++(2S) to s, then noise.
    """
    lowest = end_time(path, end)
    jumps = []
    for t, t_next in pairwise(times):
        to = _batch(t_next, rows)
        s = SSS_RULES[rule](path, to, gamma).clamp(min=lowest)
        jumps.append(PlannedJump(_batch(t, rows), s, to if gamma > 0 else None))
    return [*jumps, PlannedJump(_batch(times[-1], rows), _batch(lowest, rows))]


def consistency_jumps(path: Path, times: Sequence[float], end: End, rows: int = 1) -> list[PlannedJump]:
    """Plan multistep consistency sampling (CM, arXiv 2303.01469, algorithm 1): jump to the end point, re-noise fully.

    LCM's own jump lands on clean data; with `end = clean` this is its algorithm 3 (arXiv 2310.04378).
    """
    s = _batch(end_time(path, end), rows)
    return [
        *(PlannedJump(_batch(t, rows), s, _batch(t_next, rows)) for t, t_next in pairwise(times)),
        PlannedJump(_batch(times[-1], rows), s),
    ]


def follow(jumps: Sequence[PlannedJump], jump: JumpFn, path: Path, x: Tensor, noise: Noise) -> Tensor:
    """Draw by a plan of jumps (`sss_jumps`, `consistency_jumps`) from x at the first jump's time."""
    for planned in jumps:
        x = planned.renoise(path, jump(x, planned.t, planned.s), noise)
    return x


def sample_ode(
    denoise: Denoise, path: Path, x: Tensor, times: Sequence[float], end: End, solver: SolverName = "ddim"
) -> Tensor:
    """Integrate the probability-flow ODE from x at times[0] to the end point, one solver step a time.

    Steps from pure noise and onto clean data, where lambda is infinite, are of first order: one call.
    """
    for t, s in pairwise([*times, end_time(path, end)]):
        x = step_between(path, t, s, solver)(denoise, path, x, _batch(t, len(x)), _batch(s, len(x)))
    return x


def step_between(path: Path, t: float, s: float, solver: SolverName) -> Step:
    """Return the solver's step from t to s: DDIM, one call, from pure noise and onto clean data."""
    endless = s == path.clean or float(path.alpha(torch.tensor(t, dtype=torch.float64))) < PURE_NOISE
    return ddim if endless else SOLVERS[solver]


def sample_sde_dpmpp_2m(
    denoise: Denoise, path: Path, x: Tensor, times: Sequence[float], end: End, noise: Noise
) -> Tensor:
    """Draw by SDE-DPM-Solver++(2M) (arXiv 2211.01095, appendix): one call a step, which uses the last prediction again.

    With h = lambda_s - lambda_t and r = (the h before)/h:
    x_s = (sigma_s/sigma_t) e^{-h} x_t + alpha_s (1 - e^{-2h}) [D + (D - D_before)/2r] + sigma_s sqrt(1 - e^{-2h}) z.
    The first step and those from pure noise and onto clean data have no finite h or no last prediction: D alone.
    """
    before: Tensor | None = None
    h_before = 0.0
    for t, s in pairwise([*times, end_time(path, end)]):
        now, then = _batch(t, len(x)), _batch(s, len(x))
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
    """Return the factor of N(0, I) at the start: sigma_max on a variance exploding path, else 1.

    diffusers pipelines start at 1 on a variance preserving path too, whose sigma is a little below it.
    """
    return path.noisiest if isinstance(path, VarianceExploding) else 1.0


def picture_noise(seeds: Sequence[int], shape: tuple[int, ...]) -> tuple[Tensor, Noise]:
    """Return start noise [len(seeds), *shape] and a function that draws step noise, from one CPU generator per picture.

    The draws are in the order of a diffusers pipeline with a list of CPU generators: pictures are the same there, and
    do not depend on their batch.
    """
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]

    def noise() -> Tensor:
        return torch.cat([torch.randn((1, *shape), generator=g) for g in generators])

    return noise(), noise
