"""Distribution matching: the student's samples are moved to where the teacher finds them likelier than they are.

The gradient of KL(student || teacher) over all noise levels is the gap of two scores at the noised sample: the guided
teacher's, and that of a fake score, which is another adapter on the same base and is fitted to what the student draws
(DMD, arXiv 2311.18828, eq 7; DMD2, 2405.14867; TLCM, 2406.05768, section 3.3).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from fewstep.common.choices import Normaliser
from fewstep.common.rng import KeyedRng
from fewstep.diffusion.conditioned import ConditionedDenoiser
from fewstep.diffusion.denoiser import FAKE
from fewstep.diffusion.schedule import Path, add_noise, expand, share_of, target_of
from fewstep.methods.config import MatchingConfig
from fewstep.methods.consistency import compared_at, student_lands
from fewstep.methods.pair import Scene
from fewstep.training.loss import Loss

LEAST = 1e-6
"""What the normaliser is not below: rounding is all that is left there."""


def drawn_noise(config: MatchingConfig, path: Path, rng: KeyedRng, purpose: str) -> Tensor:
    """Times at which scores are taken, float64 [B]: uniform in the share low..high of the path."""
    return path.clean + (path.noisiest - path.clean) * rng.uniform(purpose, config.low, config.high)


def as_data(path: Path, landed: Tensor, at: Tensor) -> Tensor:
    """Landed points as data x_0: those that end at index 0 keep a little noise, which then counts as theirs."""
    return landed / expand(path.alpha(at), landed)


def _by_dmd(path: Path, t: Tensor, x0: Tensor, real: Tensor) -> Tensor:
    """1 / mean |x0 - real x0|, over each sample (DMD, eq 8): every sample pulls alike."""
    return 1 / (x0 - real).abs().flatten(1).mean(1).clamp(min=LEAST)


def _by_score(path: Path, t: Tensor, x0: Tensor, real: Tensor) -> Tensor:
    """(alpha/sigma)^2: the gap of x0 is then that of the scores, times alpha, as the gradient of KL itself."""
    return (path.alpha(t) / path.sigma(t)).square().to(x0.device, x0.dtype, non_blocking=True)


def _plainly(path: Path, t: Tensor, x0: Tensor, real: Tensor) -> Tensor:
    return torch.ones(len(x0), device=x0.device, dtype=x0.dtype)


NORMALISERS: Mapping[Normaliser, Callable[[Path, Tensor, Tensor, Tensor], Tensor]] = {
    "dmd": _by_dmd,
    "score": _by_score,
    "none": _plainly,
}
"""(path, t, x0 [B, ...], the teacher's x0 [B, ...]) -> factor of the gap, [B]."""


@torch.no_grad()
def score_gap(config: MatchingConfig, scene: Scene, x0: Tensor, rng: KeyedRng) -> Tensor:
    """What x_0 [B, ...] should be moved against: (fake x0 - real x0) at a drawn noise level, normalised."""
    path = scene.denoiser.path
    t = drawn_noise(config, path, rng, "matching t")
    x_t = add_noise(path, x0, rng.normal("matching noise", tuple(x0.shape[1:])), t)
    teacher = scene.teacher
    if config.omega is not None and teacher.omega is not None:
        teacher = replace(teacher, omega=torch.full_like(teacher.omega, config.omega))
    real = teacher.denoise(x_t, t).x0
    fake = ConditionedDenoiser(scene.denoiser, scene.sample.condition, FAKE).denoise(x_t, t).x0
    return expand(NORMALISERS[config.normaliser](path, t, x0, real), x0) * (fake - real)


def matching_loss(config: MatchingConfig, scene: Scene, landed: Tensor, at: Tensor, rng: KeyedRng) -> Tensor:
    """1/2 |x_0 - sg(x_0 - gap)|^2, mean over all axes but the first, [B]: its gradient at x_0 is the gap."""
    x0 = as_data(scene.denoiser.path, landed, at)
    aim = x0.detach() - score_gap(config, scene, x0.detach(), rng)
    return 0.5 * (x0 - aim).square().flatten(1).mean(1)


@torch.no_grad()
def fake_points(config: MatchingConfig, scene: Scene) -> tuple[Tensor, Tensor]:
    """Return the points that the fake score is fitted to, [B, ...], and the times they lie at, float64 [B].

    `landing`: one jump of the student from x_{t_n+k}, whose law the gradient of KL asks for (DMD2, arXiv 2405.14867).
    `sample`: the student's own sample of `student_steps` jumps, which x_{t_n+k} was noised from (TLCM, section 3.3).
    """
    if config.fit == "sample":
        assert scene.clean is not None
        assert scene.clean_at is not None
        return scene.clean, torch.full_like(scene.times.s, scene.clean_at)
    landed = student_lands(scene)
    torch.clear_autocast_cache()  # type: ignore[no-untyped-call]  # as in `starts.by_student`
    return landed, compared_at(scene)


def fake_loss(config: MatchingConfig, scene: Scene, landed: Tensor, at: Tensor, rng: KeyedRng) -> Loss:
    """The fake score's fit to points of the student's (`fake_points`): squared error of the network's own output.

    In eps it is noise prediction, as in the paper; the other predictions keep their own usual target.
    """
    denoiser, path = scene.denoiser, scene.denoiser.path
    x0 = as_data(path, landed, at)
    t = drawn_noise(config, path, rng, "fake t")
    eps = rng.normal("fake noise", tuple(x0.shape[1:]))
    output = denoiser.call(add_noise(path, x0, eps, t), t, scene.sample.condition, FAKE)
    wanted = target_of(denoiser.prediction, x0, eps, expand(path.alpha(t), x0), expand(path.sigma(t), x0))
    per_sample = (output.to(x0.dtype) - wanted).square().flatten(1).mean(1)
    return Loss(per_sample.mean(), per_sample.detach(), share_of(path, t))
