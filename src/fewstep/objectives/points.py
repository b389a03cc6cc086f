"""Where the two jumps of a pair start: x_{t_n+k}, and the next point x_{t_n}."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fewstep.denoiser import Condition, Denoiser
from fewstep.draws import Draws
from fewstep.grid import between
from fewstep.jumper import Voice
from fewstep.method_settings import ConsistencyConfig
from fewstep.names import Point
from fewstep.objectives.times import Triple
from fewstep.roles import BASE
from fewstep.sampler import Jumper
from fewstep.schedule import Path, add_noise, expand
from fewstep.solver import SOLVERS, walk


@dataclass(frozen=True)
class Sample:
    """What a micro-batch is made of.

    Attributes:
        data: clean latents x_0, fp32 [B, ...]; or stored trajectories, [B, N + 1, ...]: the end point first, then the
            points at the grid's rising times.
        condition, null: what the network is told, with and without the prompt; [B, ...] each.
        omega: the guidance that stored trajectories were drawn with, [B]; None for data.
    """

    data: Tensor
    condition: Condition
    null: Condition
    omega: Tensor | None = None


PathPoint = Callable[[Tensor, Tensor], Tensor]
"""(t float64 [B], its index in the training grid int64 [B]) -> the point x_t of a sample's path, [B, ...]."""


def path_through(config: ConsistencyConfig, path: Path, sample: Sample, draws: Draws) -> PathPoint:
    """The path that each sample lies on: data under one noise for all times, or a stored trajectory."""
    if config.start == "trajectory":
        rows = torch.arange(len(sample.data))
        return lambda t, index: sample.data[rows, index + 1]
    eps = draws.normal("noise", tuple(sample.data.shape[1:]))
    return lambda t, index: add_noise(path, sample.data, eps, t)


@dataclass(frozen=True)
class Scene:
    """What the two jumps of a batch are made from, and what a law of the next point may look at.

    Attributes:
        omega: guidance of each sample, float64 [B].
        path_at: any point of the path that x_nk lies on.
        x_nk: where both jumps come from.
        student: the student's jump, with gradient.
        judge: the target's jump.
    """

    config: ConsistencyConfig
    denoiser: Denoiser
    sample: Sample
    omega: Tensor
    times: Triple
    path_at: PathPoint
    x_nk: Tensor
    student: Jumper
    judge: Jumper


def by_solver(scene: Scene) -> Tensor:
    """The frozen teacher's solver from x_{t_n+k}, guided by omega unless the recipe has no guidance."""
    config, times = scene.config, scene.times
    teacher = Voice(scene.denoiser, scene.sample.condition, BASE)
    if config.guidance.convention != "none":
        teacher = replace(teacher, null=scene.sample.null, omega=scene.omega)
    way = between(scene.denoiser.path, times.t_nk, times.t_n, config.substeps)
    return walk(SOLVERS[config.solver], teacher.denoise, scene.denoiser.path, scene.x_nk, way)


def on_path(scene: Scene) -> Tensor:
    """The path itself: the same noise on the data (CT), or the stored point (KD)."""
    return scene.path_at(scene.times.t_n, scene.times.index_n)


def by_itself(scene: Scene) -> Tensor:
    """Shortcut models (arXiv 2410.12557): the target's own jump, so that a jump equals two shorter ones in a row.

    Where t_n is the next grid point the teacher steps instead: there is nothing shorter to stand on.
    """
    own = scene.judge(scene.x_nk, scene.times.t_nk, scene.times.t_n)
    neighbour = scene.times.index_nk - scene.times.index_n == 1
    return torch.where(expand(neighbour, own).bool(), by_solver(scene), own)


POINTS: Mapping[Point, Callable[[Scene], Tensor]] = {"solver": by_solver, "path": on_path, "self": by_itself}
"""How x_{t_n} is found; called without gradient."""
