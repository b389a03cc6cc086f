"""The next point x_{t_n} of a pair."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from fewstep.common.choices import Point
from fewstep.diffusion.grid import between
from fewstep.diffusion.schedule import expand
from fewstep.diffusion.solver import SOLVERS, step_from_stored, walk
from fewstep.methods.pair import Scene


def by_solver(scene: Scene) -> Tensor:
    """The frozen teacher's solver from x_{t_n+k}."""
    config, times = scene.config, scene.times
    way = between(scene.denoiser.path, times.t_nk, times.t_n, config.substeps)
    return walk(SOLVERS[config.solver], scene.teacher.denoise, scene.denoiser.path, scene.x_nk, way)


def on_path(scene: Scene) -> Tensor:
    """The path itself: the same noise on the data (CT), or the stored point (KD)."""
    assert scene.path_at is not None
    return scene.path_at(scene.times.t_n, scene.times.index_n)


def by_itself(scene: Scene) -> Tensor:
    """Shortcut models (arXiv 2410.12557): the target's own jump, so that a jump equals two shorter ones in a row.

    Where t_n is the next grid point the teacher steps instead: there is nothing shorter to stand on.
    """
    own = scene.judge(scene.x_nk, scene.times.t_nk, scene.times.t_n)
    neighbour = scene.times.index_nk - scene.times.index_n == 1
    return torch.where(expand(neighbour, own).bool(), by_solver(scene), own)


def by_stored(scene: Scene) -> Tensor:
    """One DDIM step by the teacher's stored outputs at x_{t_n+k}, under any omega: no network call."""
    stored, times = scene.sample.stored, scene.times
    assert stored is not None
    said, unsaid = stored.outputs(times.index_nk)
    omega = scene.omega if scene.config.guidance.convention != "none" else torch.zeros_like(scene.omega)
    denoiser = scene.denoiser
    return step_from_stored(denoiser.path, denoiser.prediction, scene.x_nk, said, unsaid, omega, times.t_nk, times.t_n)


Points = Mapping[Point, Callable[[Scene], Tensor]]
POINTS: Points = {"solver": by_solver, "path": on_path, "self": by_itself, "stored": by_stored}
"""How x_{t_n} is found; called without gradient."""
