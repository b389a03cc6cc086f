"""Distribution matching: move the student's samples along the gap of the teacher's score and a fake score.

The gradient of KL(student || teacher) over all noise levels is the gap of two scores at the noised sample: the guided
teacher's, and that of a fake score, another adapter on the same base that is fitted to the student's samples (DMD,
arXiv 2311.18828, eq 7; DMD2, 2405.14867; TLCM, 2406.05768, section 3.3).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fewstep.common.choices import Normaliser
from fewstep.common.rng import KeyedRng
from fewstep.diffusion.conditioned import ConditionedDenoiser
from fewstep.diffusion.denoiser import FAKE
from fewstep.diffusion.schedule import Path, add_noise, expand, share_of, target_of
from fewstep.methods.config import MatchingConfig
from fewstep.methods.consistency import compared_at, student_landing
from fewstep.methods.pair import Pair
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


@torch.no_grad()
def score_gap(config: MatchingConfig, pair: Pair, x0: Tensor, rng: KeyedRng) -> Tensor:
    """Return (fake x0 - real x0) at a drawn noise level, normalised, [B, ...]: the gradient at x_0."""
    path = pair.denoiser.path
    t = drawn_noise(config, path, rng, "matching t")
    x_t = add_noise(path, x0, rng.normal("matching noise", tuple(x0.shape[1:])), t)
    teacher = pair.teacher
    if config.omega is not None and teacher.omega is not None:
        teacher = replace(teacher, omega=torch.full_like(teacher.omega, config.omega))
    real = teacher.denoise(x_t, t).x0
    fake = ConditionedDenoiser(pair.denoiser, pair.batch.condition, FAKE).denoise(x_t, t).x0
    return expand(gap_factor(config.normaliser, path, t, x0, real), x0) * (fake - real)


def matching_loss(config: MatchingConfig, pair: Pair, landed: Tensor, at: Tensor, rng: KeyedRng) -> Tensor:
    """Return 1/2 |x_0 - sg(x_0 - gap)|^2, mean over all axes but the first, [B]; its gradient at x_0 is the gap."""
    x0 = as_data(pair.denoiser.path, landed, at)
    aim = x0.detach() - score_gap(config, pair, x0.detach(), rng)
    return 0.5 * (x0 - aim).square().flatten(1).mean(1)


@torch.no_grad()
def fake_points(config: MatchingConfig, pair: Pair) -> tuple[Tensor, Tensor]:
    """Return the points that the fake score is fitted to, [B, ...], and their times, float64 [B].

    `landing`: one jump of the student from x_{t_n+k}, the distribution in the gradient of KL (DMD2, arXiv 2405.14867).
    `sample`: the student's own sample of `student_steps` jumps, which x_{t_n+k} was noised from (TLCM, section 3.3).
    """
    if config.fit == "sample":
        assert pair.clean is not None
        assert pair.clean_at is not None
        return pair.clean, torch.full_like(pair.times.s, pair.clean_at)
    landed = student_landing(pair)
    torch.clear_autocast_cache()  # type: ignore[no-untyped-call]  # as in `start_points.by_student`
    return landed, compared_at(pair)


def fake_loss(config: MatchingConfig, pair: Pair, landed: Tensor, at: Tensor, rng: KeyedRng) -> Loss:
    """Return the fake score's denoising loss on the student's points: squared error of the network's own output.

    With an eps network it is noise prediction, as in the paper; the other predictions keep their own target.
    """
    denoiser, path = pair.denoiser, pair.denoiser.path
    x0 = as_data(path, landed, at)
    t = drawn_noise(config, path, rng, "fake t")
    eps = rng.normal("fake noise", tuple(x0.shape[1:]))
    output = denoiser.call(add_noise(path, x0, eps, t), t, pair.batch.condition, FAKE)
    wanted = target_of(denoiser.prediction, x0, eps, expand(path.alpha(t), x0), expand(path.sigma(t), x0))
    per_sample = (output.to(x0.dtype) - wanted).square().flatten(1).mean(1)
    return Loss(per_sample.mean(), per_sample.detach(), share_of(path, t))
