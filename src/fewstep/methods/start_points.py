"""Where a pair starts: x_{t_n+k} on noised data, on a stored trajectory, by the teacher's steps from noise, or on the
student's own samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from fewstep.common.choices import End, Start
from fewstep.common.rng import KeyedRng
from fewstep.diffusion.conditioned import ConditionedDenoiser
from fewstep.diffusion.denoiser import Condition
from fewstep.diffusion.grid import end_time, inference_times
from fewstep.diffusion.samplers import diffuse, sample_consistency, start_size
from fewstep.diffusion.schedule import add_noise
from fewstep.diffusion.solver import SOLVERS
from fewstep.methods.config import ConsistencyConfig
from fewstep.methods.pair import Cast, PathPoint


class Origin(NamedTuple):
    """Where a pair starts.

    Attributes:
        x_nk: the point x_{t_n+k}, [B, ...].
        path_at: any point of the path that it lies on; None where only the point itself is known.
        clean, clean_at: what it was noised from, and the time that this lies at; None where it was not.
    """

    x_nk: Tensor
    path_at: PathPoint | None = None
    clean: Tensor | None = None
    clean_at: float | None = None


def noises(config: ConsistencyConfig) -> list[str]:
    """What a start draws noise for, of a sample's own shape: who reads ahead can draw it there."""
    if config.start == "trajectory":
        return []
    returns = [f"sample's return {i}" for i in range(config.student_steps - 1)]
    return ["noise", *(["sample's start", *returns] if config.start == "student" else [])]


def on_data(cast: Cast, rng: KeyedRng) -> Origin:
    """Data under one noise for all times."""
    path, data, times = cast.denoiser.path, cast.sample.data, cast.times
    eps = rng.normal("noise", tuple(data.shape[1:]))

    def path_at(t: Tensor, index: Tensor) -> Tensor:
        return add_noise(path, data, eps, t)

    return Origin(path_at(times.t_nk, times.index_nk), path_at, data, path.clean)


def on_trajectory(cast: Cast, rng: KeyedRng) -> Origin:
    """A point of a stored trajectory of the teacher."""
    stored, times = cast.sample.stored, cast.times
    assert stored is not None

    def path_at(t: Tensor, index: Tensor) -> Tensor:
        return stored.point(index)

    return Origin(path_at(times.t_nk, times.index_nk), path_at)


def pure_noise(cast: Cast, rng: KeyedRng, purpose: str) -> Tensor:
    """Where drawing starts, [B, ...]."""
    return rng.normal(purpose, tuple(cast.sample.data.shape[1:])) * start_size(cast.denoiser.path)


@torch.no_grad()
def by_rollout(cast: Cast, rng: KeyedRng) -> Origin:
    """TLCM's multistep denoising (arXiv 2406.05768, algorithm 1): L equal guided steps of the teacher from noise.

    L = M - s for a point in segment s of M (`rollout`), so that it takes as many steps as it is clean: a batch's walks
    are of different lengths, and what has arrived is not asked again. Every micro-batch takes as many calls as the
    longest walk of all: processes whose weights are split must call together. A call that none needs is of one row.
    """
    config, path, times = cast.config, cast.denoiser.path, cast.times
    x = pure_noise(cast, rng, "noise")
    lengths = torch.tensor(config.rollout_steps)
    counts = lengths[times.index_nk]
    longest_first = counts.argsort(descending=True, stable=True)
    top = torch.full_like(times.t_nk, path.noisiest)
    share = (times.t_nk - top) / counts
    step = SOLVERS[config.solver]
    for number in range(int(lengths.max())):
        going = int((counts > number).sum())
        asked = longest_first[: max(going, 1)]
        left = counts[asked] - number
        t = torch.where(left > 0, top[asked] + number * share[asked], times.t_nk[asked])
        s = torch.where(left > 1, top[asked] + (number + 1) * share[asked], times.t_nk[asked])
        here = asked.to(x.device, non_blocking=True)
        there = step(_some(cast.teacher, asked).denoise, path, x[here], t, s)
        x = x.index_copy(0, here[:going], there[:going].to(x.dtype))
    return Origin(x)


def _some(voice: ConditionedDenoiser, rows: Tensor) -> ConditionedDenoiser:
    """The voice for some of its batch."""

    def pick(condition: Condition | None) -> Condition | None:
        return None if condition is None else {k: v[rows.to(v.device, non_blocking=True)] for k, v in condition.items()}

    omega = None if voice.omega is None else voice.omega[rows]
    return ConditionedDenoiser(
        voice.denoiser, pick(voice.condition) or {}, voice.role, null=pick(voice.null), omega=omega
    )


@torch.no_grad()
def by_student(cast: Cast, rng: KeyedRng) -> Origin:
    """The student's own samples of q calls, noised (TLCM, algorithm 2): jump to the end point, noise back, and again.

    Each return takes fresh noise, and so does the noise on the finished sample; the paper writes one symbol for all.
    """
    config, path = cast.config, cast.denoiser.path
    times = [float(t) for t in inference_times(path, config.student_steps, grid=config.grid)]
    x = pure_noise(cast, rng, "sample's start")
    shape = tuple(x.shape[1:])
    returns = iter(range(len(times)))

    def noise() -> Tensor:
        return rng.normal(f"sample's return {next(returns)}", shape)

    lands: End = "clean" if config.jump == "skip" else config.end
    drawn = sample_consistency(cast.student, path, x, times, lands, noise)
    torch.clear_autocast_cache()  # older torch keeps the cast weights of a call, and these have no gradient
    end = end_time(path, lands)
    x_nk = diffuse(path, drawn, torch.full_like(cast.times.t_nk, end), cast.times.t_nk, rng.normal("noise", shape))
    return Origin(x_nk, None, drawn, end)


STARTS: Mapping[Start, Callable[[Cast, KeyedRng], Origin]] = {
    "data": on_data,
    "trajectory": on_trajectory,
    "rollout": by_rollout,
    "student": by_student,
}
