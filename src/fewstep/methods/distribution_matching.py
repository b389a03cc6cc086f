"""Distribution matching: move the student's samples along the gap of the teacher's score and a fake score.

The gradient of KL(student || teacher) over all noise levels is the gap of two scores at the noised sample: the guided
teacher's, and that of a fake score, another adapter on the same base that is fitted to the student's samples (DMD,
arXiv 2311.18828, eq 7; DMD2, 2405.14867; TLCM, 2406.05768, section 3.3).
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from fewstep.common.choices import Levels, Normaliser
from fewstep.common.rng import KeyedRng
from fewstep.diffusion.conditioned import ConditionedDenoiser
from fewstep.diffusion.denoiser import FAKE
from fewstep.diffusion.grid import end_time, inference_times
from fewstep.diffusion.samplers import diffuse, sss_jumps
from fewstep.diffusion.schedule import Path, expand, share_of, target_of
from fewstep.methods.consistency import compared_at, student_landing
from fewstep.methods.distances import huber_norm, implied_x0, l2, landing_derivative
from fewstep.methods.pair import Pair
from fewstep.methods.term_config import MatchingConfig
from fewstep.training.loss import Loss

MIN_GAP = 1e-6
"""Lower bound of the normaliser, below which differences are rounding."""


def drawn_noise(config: MatchingConfig, path: Path, rng: KeyedRng, purpose: str) -> Tensor:
    """Draw times at which scores are compared, uniform in the share low..high of the path, float64 [B]."""
    return path.clean + (path.noisiest - path.clean) * rng.uniform(purpose, config.low, config.high)


def as_data(path: Path, landed: Tensor, at: Tensor) -> Tensor:
    """Return landings as data x_0. Those that end at index 0 keep their little noise."""
    return landed / expand(path.alpha(at), landed)


def gap_factor(normaliser: Normaliser, path: Path, t: Tensor, x0: Tensor, real: Tensor) -> Tensor:
    """Return the factor of the gap of two x0, [B].

    dmd: 1 / mean |x0 - real x0| of each sample (DMD, eq 8). score: (alpha/sigma)^2, which turns the gap of x0 into that
    of the scores times alpha, the gradient of KL. none: 1.

    Args:
        x0: the student's samples, [B, ...].
        real: the teacher's x0, [B, ...].
    """
    if normaliser == "dmd":
        return 1 / (x0 - real).abs().flatten(1).mean(1).clamp(min=MIN_GAP)
    if normaliser == "score":
        return (path.alpha(t) / path.sigma(t)).square().to(x0.device, x0.dtype, non_blocking=True)
    return torch.ones(len(x0), device=x0.device, dtype=x0.dtype)


def drawn_level(config: MatchingConfig, levels: Levels, pair: Pair, rng: KeyedRng, purpose: str) -> Tensor:
    """Draw times by a rule of noise levels, float64 [B].

    `jump` is uniform from s to t_{n+k}, as far as low and high allow: levels of different steps do not overlap, so that
    one fake score serves all (TDM, arXiv 2503.06674), and guidance adds what the jump has still to resolve (Decoupled
    DMD, arXiv 2511.22677).
    """
    path = pair.denoiser.path
    if levels == "all":
        return drawn_noise(config, path, rng, purpose)
    low, high = (path.clean + (path.noisiest - path.clean) * share for share in (config.low, config.high))
    below = pair.times.s.clamp(low, high)
    return below + (pair.times.t_nk.clamp(max=high) - below).clamp(min=0) * rng.uniform(purpose)


class Points(NamedTuple):
    """Points of the student that are noised: x [B, ...] at times float64 [B], 0 noise at the end point."""

    x: Tensor
    at: Tensor

    def noised(self, path: Path, t: Tensor, z: Tensor) -> Tensor:
        """Return them diffused to t; themselves where t is not above."""
        return diffuse(path, self.x, self.at, torch.maximum(t, self.at), z)


def matched_at(pair: Pair) -> Tensor:
    """Return the times of what is matched, float64 [B]."""
    at = compared_at(pair)
    return torch.full_like(at, end_time(pair.denoiser.path, pair.config.end)) if pair.config.matches_at_end else at


def points_of(pair: Pair, landed: Tensor, at: Tensor) -> Points:
    """Return landings as points: as data x_0 where they lie at the end point, else at their own times."""
    path = pair.denoiser.path
    at_end = pair.config.matches_at_end
    return Points(as_data(path, landed, at), torch.full_like(at, path.clean)) if at_end else Points(landed, at)


def simulated_end(pair: Pair) -> Tensor:
    """Return the end of the student's own sampling from x_{t_n+k}, pure noise, by `student_steps` jumps at gamma 0.

    The first jump has no gradient, which is left to the regression (DP-DMD, arXiv 2602.03139).
    """
    config, path = pair.config, pair.denoiser.path
    times = inference_times(path, config.student_steps, grid=config.grid).tolist()
    first, *others = sss_jumps(path, times, 0.0, config.end, rows=len(pair.x_nk))
    with torch.no_grad():
        x = pair.student(pair.x_nk, first.t, first.s)
    torch.clear_autocast_cache()  # type: ignore[no-untyped-call]  # as in `start_points.by_student`
    for planned in others:
        x = pair.student(x, planned.t, planned.s)
    return x


def implied(pair: Pair, x: Tensor) -> Tensor:
    """Return the x0 of points: of a landing above the end point that by which a first-order jump lands there."""
    if pair.config.matches_at_end:
        return x
    derivative = landing_derivative("x0", pair.denoiser.path, pair.times.t_nk, pair.times.s)
    assert derivative is not None
    return implied_x0(pair, x, derivative)


@torch.no_grad()
def score_gap(config: MatchingConfig, pair: Pair, points: Points, x0: Tensor, rng: KeyedRng) -> Tensor:
    """Return (fake x0 - real x0) at a drawn noise level, normalised, [B, ...]: the gradient at x_0.

    With `guidance_levels` the real score is unguided, and guidance is a term of its own at a level of its own, with its
    own normaliser: -omega (real x0 - real x0 without prompt) (Decoupled DMD, arXiv 2511.22677, eq 8).

    The log gets the denoising errors of both scores on the points: the fake one's is the smaller where it tracks them.
    """
    path, teacher = pair.denoiser.path, pair.teacher

    def noised(purpose: str, levels: Levels) -> tuple[Tensor, Tensor, Tensor]:
        t = drawn_level(config, levels, pair, rng, f"{purpose} t")
        z = rng.normal(f"{purpose} noise", tuple(x0.shape[1:]))
        return points.noised(path, t, z), t, z

    def normalised(gap: Tensor, t: Tensor, real: Tensor) -> Tensor:
        return expand(gap_factor(config.normaliser, path, t, x0, real), x0) * gap

    if config.omega is not None and teacher.omega is not None:
        teacher = replace(teacher, omega=torch.full_like(teacher.omega, config.omega))
    plain = teacher if teacher.omega is None else replace(teacher, omega=torch.zeros_like(teacher.omega))
    apart = config.guidance_levels is not None and teacher.omega is not None
    x_t, t, z = noised("matching", config.levels)
    real = (plain if apart else teacher).denoise(x_t, t).x0
    fake = ConditionedDenoiser(pair.denoiser, pair.batch.condition, FAKE).denoise(x_t, t).x0
    share, wanted = denoising_target(path, points, torch.maximum(t, points.at), z)
    for name, found in (("fake_error", fake), ("teacher_error", real)):
        pair.scalars[name] = l2(expand(share, found) * found - wanted).mean()
    gap = normalised(fake - real, t, real)
    if apart and config.guidance_levels is not None:
        x_t, t, _ = noised("guidance", config.guidance_levels)
        guided = teacher.denoise(x_t, t).x0
        gap = gap - normalised(guided - plain.denoise(x_t, t).x0, t, guided)
    return gap


def matching_loss(config: MatchingConfig, pair: Pair, landed: Tensor, at: Tensor, rng: KeyedRng) -> Tensor:
    """Return 1/2 |x_0 - sg(x_0 - gap)|^2, mean over all axes but the first, [B]; its gradient at x_0 is the gap.

    `huber_norm` is sqrt(|gap|^2 + C^2) - C instead, with the C of `method.huber_c` (TDM, arXiv 2503.06674).
    """
    if config.matched == "simulation":
        landed, at = simulated_end(pair), matched_at(pair)
    points = points_of(pair, landed, at)
    x0 = implied(pair, points.x)
    aim = x0.detach() - score_gap(config, pair, points, x0.detach(), rng)
    return 0.5 * l2(x0 - aim) if config.distance == "l2" else huber_norm(x0 - aim, pair.config.huber_c)


@torch.no_grad()
def fake_points(config: MatchingConfig, pair: Pair) -> tuple[Tensor, Tensor]:
    """Return the points that the fake score is fitted to, [B, ...], and their times, float64 [B].

    `landing`: what is matched, one jump of the student from x_{t_n+k}, the distribution in the gradient of KL (DMD2,
    arXiv 2405.14867), or the end of its own sampling. `sample`: the student's own sample of `student_steps` jumps,
    which x_{t_n+k} was noised from (TLCM, section 3.3).
    """
    if config.fit == "sample":
        assert pair.clean is not None
        assert pair.clean_at is not None
        return pair.clean, torch.full_like(pair.times.s, pair.clean_at)
    landed = simulated_end(pair) if config.matched == "simulation" else student_landing(pair)
    torch.clear_autocast_cache()  # type: ignore[no-untyped-call]  # as in `start_points.by_student`
    return landed, matched_at(pair)


def denoising_target(path: Path, points: Points, t: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """Return std/sigma_t, [B], and that times the x0 of points which were diffused to t by z, [B, ...].

    Points at a noisy time s are noised from there, x_t = r x_s + std z with r = alpha_t/alpha_s: the score of these is
    -E[z]/std, and so eps = sigma_t z/std, x0 = x_s/alpha_s - r sigma_s^2 z/(alpha_s std). The factor std/sigma_t is
    denoising score matching's weight, which keeps the error finite as t comes to s (TDM, arXiv 2503.06674).
    """
    alpha_s, sigma_s, alpha, sigma = (part(when) for when in (points.at, t) for part in (path.alpha, path.sigma))
    ratio = alpha / alpha_s
    share = (1 - (ratio * sigma_s / sigma).square()).clamp(min=0).sqrt()
    return share, expand(share / alpha_s, z) * points.x - expand(ratio * sigma_s.square() / (alpha_s * sigma), z) * z


def fake_loss(config: MatchingConfig, pair: Pair, landed: Tensor, at: Tensor, rng: KeyedRng) -> Loss:
    """Return the fake score's denoising loss on the student's points: squared error of the network's own output.

    With an eps network it is noise prediction, as in the paper; the other predictions keep their own target.

    The error is multiplied by the factor of `denoising_target`.
    """
    denoiser, path = pair.denoiser, pair.denoiser.path
    points = points_of(pair, landed, at)
    t = torch.maximum(drawn_level(config, config.levels, pair, rng, "fake t"), points.at)
    z = rng.normal("fake noise", tuple(landed.shape[1:]))
    output = denoiser.call(points.noised(path, t, z), t, pair.batch.condition, FAKE).to(landed.dtype)
    share, x0 = denoising_target(path, points, t, z)
    wanted = target_of(denoiser.prediction, x0, z, expand(path.alpha(t), z), expand(path.sigma(t), z))
    per_sample = l2(expand(share, output) * output - wanted)
    return Loss(per_sample.mean(), per_sample.detach(), share_of(path, t))
