"""Where a pair starts: x_{t_n+k} on noised data, on a stored trajectory, by the teacher's steps from noise, on the
student's own samples, by its steps from noise, or at noise itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from fewstep.common.choices import End, Start
from fewstep.common.rng import KeyedRng
from fewstep.diffusion.conditioned import ConditionedDenoiser
from fewstep.diffusion.grid import end_time, inference_times, training_grid
from fewstep.diffusion.samplers import JumpFn, consistency_jumps, diffuse, follow, sss_jumps, start_size
from fewstep.diffusion.schedule import Path, add_noise
from fewstep.diffusion.solver import SOLVERS
from fewstep.methods.config import ConsistencyConfig
from fewstep.methods.pair import MicroBatch
from fewstep.methods.times import PairTimes


class StartPoint(NamedTuple):
    """The last fields of a `Pair`, which the start decides."""

    x_nk: Tensor
    clean: Tensor | None = None
    clean_at: float | None = None
    noise: Tensor | None = None


class StartInputs(NamedTuple):
    """The first fields of a `Pair`, and its random numbers.

    Attributes:
        student_of: the student's jump for some rows of the batch, int64 [b] on the CPU.
    """

    config: ConsistencyConfig
    batch: MicroBatch
    times: PairTimes
    student: JumpFn
    student_of: Callable[[Tensor], JumpFn]
    followed: ConditionedDenoiser
    rng: KeyedRng


def noise_purposes(config: ConsistencyConfig) -> list[str]:
    """Return the purposes of the noise that a start draws in the shape of a sample, so that it can be drawn ahead."""
    if config.start == "trajectory":
        return []
    returns = [f"sample's return {i}" for i in range(config.student_steps - 1)]
    simulates = config.start == "simulation" and config.student_gamma > 0
    simulated = [f"simulation's return {i}" for i in range(config.points - 1)] if simulates else []
    return ["noise", *(["sample's start", *returns] if config.start == "student" else []), *simulated]


def on_data(given: StartInputs) -> StartPoint:
    """Noise the data (LCM, arXiv 2310.04378, algorithm 1)."""
    path, x_0 = given.followed.denoiser.path, given.batch.data
    eps = given.rng.normal("noise", tuple(x_0.shape[1:]))
    return StartPoint(add_noise(path, x_0, eps, given.times.t_nk), x_0, path.clean, eps)


def on_trajectory(given: StartInputs) -> StartPoint:
    """Take a point of a stored trajectory of the teacher."""
    assert given.batch.stored is not None
    return StartPoint(given.batch.stored.x_nk)


def pure_noise(path: Path, batch: MicroBatch, rng: KeyedRng, purpose: str) -> Tensor:
    """Draw the point where sampling starts, [B, ...]."""
    return rng.normal(purpose, tuple(batch.data.shape[1:])) * start_size(path)


@torch.no_grad()
def by_rollout(given: StartInputs) -> StartPoint:
    """Denoise by L equal guided steps of the teacher from noise (TLCM, arXiv 2406.05768, algorithm 1).

    L = M - s for a point in segment s of M (`rollout`). Samples that have arrived are not evaluated again. Every
    micro-batch makes as many calls as the longest roll-out of all, since processes with sharded weights must call
    together; a call that no sample needs has one row.
    """
    config, times, followed = given.config, given.times, given.followed
    path = followed.denoiser.path
    x = pure_noise(path, given.batch, given.rng, "noise")
    lengths = torch.tensor(config.rollout_steps)
    counts = lengths[times.index_nk]
    longest_first = counts.argsort(descending=True, stable=True)
    top = torch.full_like(times.t_nk, path.noisiest)
    width = (times.t_nk - top) / counts
    step = SOLVERS[config.solver]
    for number in range(int(lengths.max())):
        active = int((counts > number).sum())
        rows = longest_first[: max(active, 1)]
        left = counts[rows] - number
        t = torch.where(left > 0, top[rows] + number * width[rows], times.t_nk[rows])
        s = torch.where(left > 1, top[rows] + (number + 1) * width[rows], times.t_nk[rows])
        on_device = rows.to(x.device, non_blocking=True)
        x_s = step(followed.rows(rows).denoise, path, x[on_device], t, s)
        x = x.index_copy(0, on_device[:active], x_s[:active].to(x.dtype))
    return StartPoint(x)


@torch.no_grad()
def by_student(given: StartInputs) -> StartPoint:
    """Noise the student's own samples of q jumps (TLCM, arXiv 2406.05768, algorithm 2).

    Each re-noising draws fresh noise, and so does the finished sample; the paper writes one symbol for all.
    """
    config, times, rng, path = given.config, given.times, given.rng, given.followed.denoiser.path
    call_times = [float(t) for t in inference_times(path, config.student_steps, grid=config.grid)]
    x = pure_noise(path, given.batch, rng, "sample's start")
    shape = tuple(x.shape[1:])
    returns = iter(range(len(call_times)))

    def noise() -> Tensor:
        return rng.normal(f"sample's return {next(returns)}", shape)

    end: End = "clean" if config.jump == "skip" else config.end
    sample = follow(consistency_jumps(path, call_times, end, len(x)), given.student, path, x, noise)
    torch.clear_autocast_cache()  # older torch caches the cast weights of these calls, which have no gradient
    clean_at = end_time(path, end)
    x_nk = diffuse(path, sample, torch.full_like(times.t_nk, clean_at), times.t_nk, rng.normal("noise", shape))
    return StartPoint(x_nk, sample, clean_at)


@torch.no_grad()
def by_simulation(given: StartInputs) -> StartPoint:
    """Sample by the student's jumps from noise through the grid's points, down to t_{n+k}, by SSS of `student_gamma`.

    Gamma 1 is the backward simulation of DMD2 (arXiv 2405.14867, section 4.5), gamma 0 the student's ODE (SMD, TDM).
    Samples that have arrived are not evaluated again; calls are as many in every micro-batch (`by_rollout`).
    """
    config, times, rng, path = given.config, given.times, given.rng, given.followed.denoiser.path
    x = pure_noise(path, given.batch, rng, "noise")
    counts = config.points - 1 - times.index_nk
    longest_first = counts.argsort(descending=True, stable=True)
    falling = training_grid(path, config.grid).flip(0).tolist()
    end: End = "clean" if config.jump == "skip" else config.end
    for number, planned in enumerate(sss_jumps(path, falling, config.student_gamma, end, rows=len(x))[:-1]):
        active = int((counts > number).sum())
        rows = longest_first[: max(active, 1)]
        on_device = rows.to(x.device, non_blocking=True)
        s = planned.s[rows]
        x_s = given.student_of(rows)(x[on_device], planned.t[rows], s)
        if planned.noise_to is not None:
            z = rng.normal(f"simulation's return {number}", tuple(x.shape[1:]))[on_device]
            x_s = diffuse(path, x_s, s, planned.noise_to[rows], z)
        x = x.index_copy(0, on_device[:active], x_s[:active].to(x.dtype))
    torch.clear_autocast_cache()  # as in `by_student`
    return StartPoint(x, given.batch.data, path.clean)


def at_noise(given: StartInputs) -> StartPoint:
    """Start where sampling does."""
    path, batch = given.followed.denoiser.path, given.batch
    return StartPoint(pure_noise(path, batch, given.rng, "noise"), batch.data, path.clean)


STARTS: Mapping[Start, Callable[[StartInputs], StartPoint]] = {
    "data": on_data,
    "trajectory": on_trajectory,
    "rollout": by_rollout,
    "student": by_student,
    "simulation": by_simulation,
    "noise": at_noise,
}
