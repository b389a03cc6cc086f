"""The next point x_{t_n} of a pair."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from fewstep.common.choices import Point
from fewstep.diffusion.grid import between
from fewstep.diffusion.schedule import add_noise, expand
from fewstep.diffusion.solver import SOLVERS, integrate, step_from_stored
from fewstep.methods.pair import Pair


def by_solver(pair: Pair) -> Tensor:
    """Integrate from x_{t_n+k} by the frozen teacher's solver (LCM, arXiv 2310.04378, algorithm 1).

    A student that is followed jumps instead (progressive distillation, arXiv 2202.00512): its first-order jump is a
    DDIM step.
    """
    config, times, path = pair.config, pair.times, pair.denoiser.path
    steps = between(path, times.t_nk, times.t_n, config.substeps)
    return integrate(SOLVERS[config.solver], pair.followed.denoise, path, pair.x_nk, steps)


def on_path(pair: Pair) -> Tensor:
    """Take a point of the path: the same noise on the data (CT, arXiv 2303.01469, eq 10), or the stored one (KD)."""
    if pair.batch.stored is not None:
        assert pair.batch.stored.x_n is not None
        return pair.batch.stored.x_n
    assert pair.clean is not None
    assert pair.noise is not None
    return add_noise(pair.denoiser.path, pair.clean, pair.noise, pair.times.t_n)


def by_itself(pair: Pair) -> Tensor:
    """Take the target's own jump, so that a jump equals two shorter ones in a row (shortcut models, arXiv 2410.12557).

    If t_n is the next grid point, the teacher's step replaces it, because there is no shorter jump.
    """
    landed = pair.target(pair.x_nk, pair.times.t_nk, pair.times.t_n)
    neighbour = pair.times.index_nk - pair.times.index_n == 1
    return torch.where(expand(neighbour, landed).bool(), by_solver(pair), landed)


def by_stored(pair: Pair) -> Tensor:
    """Make one DDIM step by the teacher's stored outputs at x_{t_n+k}, under any omega: no network call."""
    stored, times, denoiser = pair.batch.stored, pair.times, pair.denoiser
    assert stored is not None
    assert stored.outputs_nk is not None
    with_prompt, without_prompt = stored.outputs_nk
    omega = pair.omega if pair.config.guidance.convention != "none" else torch.zeros_like(pair.omega)
    return step_from_stored(
        denoiser.path, denoiser.prediction, pair.x_nk, with_prompt, without_prompt, omega, times.t_nk, times.t_n
    )


Points = Mapping[Point, Callable[[Pair], Tensor]]
POINTS: Points = {"solver": by_solver, "path": on_path, "self": by_itself, "stored": by_stored}
"""Rules of x_{t_n}; called without gradient."""
