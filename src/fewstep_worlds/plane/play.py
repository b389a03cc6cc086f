"""One recipe in the plane: trained by the project's own loop, measured against the exact answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewstep.common.accelerator import make_accelerator
from fewstep.common.rng import KeyedRng
from fewstep.common.tensors import digest
from fewstep.diffusion.conditioned import ConditionedDenoiser
from fewstep.diffusion.denoiser import BASE, Condition, Denoiser
from fewstep.diffusion.draw_latents import draw_latents
from fewstep.diffusion.grid import end_time, inference_times, training_grid
from fewstep.diffusion.jump import student_step
from fewstep.diffusion.samplers import JumpFn
from fewstep.diffusion.schedule import FlowMatching, VarianceExploding, scaled_linear
from fewstep.diffusion.schedule import Path as NoisePath
from fewstep.distillation.stages import parts_of
from fewstep.methods.pair import HeldTrajectories, Sample
from fewstep.methods.times import draw_times
from fewstep.methods.update_plan import FrozenNetworks, family_plan, roles_of, start_from
from fewstep.training.loop import Batch, Trained, Update, train
from fewstep.training.roles import copy_role
from fewstep.training.run_folder import RunLog
from fewstep.training.student import Student, make_student
from fewstep_worlds.plane.base import learn_base
from fewstep_worlds.plane.mixture import Mixture, one_gaussian, ring, times_of
from fewstep_worlds.plane.planar import Planar, PlanarCritic, Plane, said_by
from fewstep_worlds.plane.settings import PathName, PlayConfig


def noise_path(name: PathName) -> NoisePath:
    """The noise path of that name."""
    paths: dict[PathName, NoisePath] = {"vp": scaled_linear(), "flow": FlowMatching(), "ve": VarianceExploding()}
    return paths[name]


@dataclass(frozen=True)
class Play:
    """A student in the plane beside its exact teacher."""

    config: PlayConfig
    teacher: Mixture
    student: Student
    denoiser: Denoiser

    def jumper(self, count: int) -> JumpFn:
        """The student's own jump, for `count` points."""
        sampling = self.config.sampling
        step = student_step(sampling.step_jump, sampling.r, sampling.form)
        w = torch.zeros(count, dtype=torch.float64)
        return ConditionedDenoiser(self.denoiser, {}, "student", sampling.extra_conditioning, w=w).jumper(step)


def fresh_network(config: PlayConfig, teacher: Mixture) -> Planar:
    """The network that students are made of, before it learnt anything."""
    anchor = teacher if config.base == "exact" else one_gaussian(teacher)
    return Planar(anchor, config.says, config.width, config.loop.seed)


def lay_out(config: PlayConfig, base: Mapping[str, Tensor] | None = None) -> Play:
    """The exact teacher, and a student that starts as its equal, or as the learned base of those weights."""
    teacher = ring(noise_path(config.path))
    network = fresh_network(config, teacher)
    if base is not None:
        network.load_state_dict(base)
    student = make_student(
        Plane(network), config.student, roles_of(config.method), config.loop.seed, config.method.extra_conditioning
    )

    def call(x: Tensor, t: Tensor, condition: Condition, role: str) -> Tensor:
        """The teacher is the exact one, whatever the student starts from."""
        return said_by(teacher, config.says, x, t) if role == BASE else student.call(x, t, condition, role)

    return Play(config, teacher, student, Denoiser(call, teacher.path, config.says))


def learned_base(config: PlayConfig, out: Path, quiet: bool = False) -> Mapping[str, Tensor] | None:
    """The weights that students start from; None where they start as the exact teacher."""
    if config.base == "exact":
        return None
    teacher = ring(noise_path(config.path))
    return learn_base(config.base_config, fresh_network(config, teacher), teacher, out, quiet)


def training_points(play: Play) -> Tensor:
    """Data, fp32 [N, 2]; or exact trajectories, [N, points + 1, 2], the end point first."""
    config, teacher = play.config, play.teacher
    generator = torch.Generator().manual_seed(config.loop.seed)
    if config.method.start != "trajectory":
        return teacher.sample(config.count, teacher.path.clean, generator).float()
    path = teacher.path
    times = [end_time(path, config.method.end), *training_grid(path, config.method.grid).tolist()]
    x = teacher.sample(config.count, times[-1], generator)
    points = [x]
    for t, s in zip(times[:0:-1], times[-2::-1]):
        x = teacher.flow(x, times_of(t, x), times_of(s, x), steps=4)
        points.append(x)
    return torch.stack(points[::-1], 1).float()


def train_play(config: PlayConfig, out: Path, quiet: bool = False, base: Path | None = None) -> Play:
    """Train a recipe's student, stage by stage, resuming what `out` holds; it has the averaged weights then.

    Args:
        base: where the learned base is kept, `out`/base if left out.
    """
    weights = learned_base(config, base or out / "base", quiet)
    inputs = {} if weights is None else {"base": digest(weights)}
    start: Mapping[str, Tensor] | None = None
    for _, folder, stage in parts_of(config, config.stages, config.loop.steps, out):
        play = lay_out(stage, weights)
        if start is not None:
            start_from(stage.method, play.student, start)
        start = _train_stage(play, folder, inputs, quiet).weights["student"]
        copy_role(start, play.student.parameters("student"))
    return replace(play, config=config)


def play_plan(play: Play, points: Tensor) -> list[Update]:
    """What the loop is handed: the family's plan on batches of item numbers of the training points."""
    config = play.config

    def sample(batch: Batch, rng: KeyedRng) -> Sample:
        x = points[torch.from_numpy(batch["items"])]
        if config.method.start != "trajectory":
            return Sample(x, {}, {})
        return Sample(x[:, 0], {}, {}, torch.zeros(len(x), dtype=torch.float64), HeldTrajectories(x))

    critic = PlanarCritic(config.width, config.loop.seed) if config.method.adversarial.weight else None
    return family_plan(config.method, config.optim, play.student, play.denoiser, sample, FrozenNetworks(critic=critic))


def _train_stage(play: Play, out: Path, inputs: Mapping[str, str], quiet: bool) -> Trained:
    config, points = play.config, training_points(play)
    accelerator = make_accelerator("fp32", torch.device("cpu"))
    with RunLog(out, config, title=f"playground {config.recipe}", inputs=inputs, quiet=quiet) as log:
        return train(play_plan(play, points), fetch, len(points), config.loop, log, accelerator)


def fetch(items: np.ndarray, _: KeyedRng) -> Batch:
    """A batch is its item numbers: points are looked up where the loss is taken."""
    return {"items": items}


def check_play(config: PlayConfig) -> None:
    """Refuse, before anything is trained, what only the path and the network can tell.

    Raises:
        UserError: a grid that the path has no times for, a prediction that says nothing on it, no such layers.
    """
    for stage in config.each_stage():
        play = lay_out(stage)
        training_grid(play.teacher.path, stage.method.grid)
        for steps in config.steps:
            inference_times(play.teacher.path, steps, grid=stage.sampling.grid, spacing=stage.sampling.spacing)


def landing_end(play: Play) -> float:
    """The time that the student's last jump lands at."""
    return end_time(play.teacher.path, play.config.sampling.landing)


@dataclass(frozen=True)
class Measured:
    """Figures of a student in the plane.

    Attributes:
        energy: (steps, gamma) -> squared energy distance of its samples to the exact marginal of the end point; gamma
            is None where the sampler has none.
        floor: the same of as many exact samples.
        to_end: rms distance of one jump from noise to the end point from the exact one.
        between: rms distance of jumps between drawn times, to s as the recipe lands.
    """

    energy: dict[tuple[int, float | None], float]
    floor: float
    to_end: float
    between: float

    @property
    def gammas(self) -> list[float | None]:
        """The stochasticities that were measured."""
        return list(dict.fromkeys(gamma for _, gamma in self.energy))

    def record(self) -> dict[str, Any]:
        """The figures as plain data."""
        rows = [{"steps": n, "gamma": gamma, "energy": value} for (n, gamma), value in self.energy.items()]
        return {"energy": rows, "floor": self.floor, "to_end": self.to_end, "between": self.between}

    def best(self, steps: int) -> tuple[float | None, float]:
        """The gamma with the least distance at a step count, and that distance."""
        found = {gamma: value for (count, gamma), value in self.energy.items() if count == steps}
        gamma = min(found, key=lambda gamma: found[gamma])
        return gamma, found[gamma]


@torch.no_grad()
def draw_points(play: Play, steps: int, gamma: float | None = None, seed: int = 10_000) -> Tensor:
    """Samples of the student, float64 [shown, 2]."""
    changes = {"steps": steps} | ({} if gamma is None else {"gamma": gamma})
    config = play.config
    sampling = config.sampling.model_copy(update=changes)
    seeds = range(seed, seed + config.shown)
    return draw_latents(play.denoiser, {}, {}, sampling, seeds, (2,), "student").double()


@torch.no_grad()
def measure(play: Play) -> Measured:
    """Exact figures of a student: nothing here is estimated but by drawing."""
    config, teacher, path = play.config, play.teacher, play.teacher.path
    end = landing_end(play)
    gammas: tuple[float | None, ...] = config.gammas if config.sampling.sampler == "sss" else (None,)
    energy = {
        (steps, gamma): teacher.energy(draw_points(play, steps * config.sampling.calls_a_step, gamma), end)
        for steps in config.steps
        for gamma in gammas
    }
    generator = torch.Generator().manual_seed(config.loop.seed + 1)
    floor = teacher.energy(teacher.sample(config.shown, end, generator), end)
    x = teacher.sample(config.shown, path.noisiest, generator)
    t, s = times_of(path.noisiest, x), times_of(end, x)
    jump = play.jumper(count=len(x))

    def error(x_t: Tensor, t: Tensor, s: Tensor) -> float:
        away = jump(x_t.float(), t, s).double() - teacher.flow(x_t, t, s)
        return float(away.square().sum(1).mean().sqrt())

    times = draw_times(config.method, path, KeyedRng(config.loop.seed + 2, 0, tuple(range(len(x)))))
    along = teacher.flow(x, t, times.t_nk)
    return Measured(energy, floor, error(x, t, s), error(along, times.t_nk, times.s))
