"""Train a diffusion model in the plane and students of it by any recipe; measure them against the exact teacher."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
from fewstep.diffusion.schedule import FlowMatching, VarianceExploding, add_noise, expand, scaled_linear
from fewstep.diffusion.schedule import Path as NoisePath
from fewstep.methods.pair import MicroBatch, StoredPoints
from fewstep.methods.terms import FrozenNetworks, edm_weight
from fewstep.methods.times import draw_times
from fewstep.methods.update_plan import make_update_plan, roles_of, start_from
from fewstep.training.loss import Loss
from fewstep.training.roles import copy_role
from fewstep.training.student import Student, make_student
from fewstep.training.update import Batch, Update
from fewstep_worlds.common.training import fit
from fewstep_worlds.plane.mixture import Mixture, one_gaussian, ring, times_of
from fewstep_worlds.plane.network import PlaneCritic, PlaneHost, PlaneNetwork, exact_output
from fewstep_worlds.plane.settings import PathName, PlaneConfig

TIMES = 1000
"""Points of the learned base's training grid: all indices of Stable Diffusion's path."""


def noise_path(name: PathName) -> NoisePath:
    """Return the noise path of a name."""
    paths: dict[PathName, NoisePath] = {"vp": scaled_linear(), "flow": FlowMatching(), "ve": VarianceExploding()}
    return paths[name]


@dataclass(frozen=True)
class PlaneRun:
    """A student in the plane and its exact teacher."""

    config: PlaneConfig
    teacher: Mixture
    student: Student
    denoiser: Denoiser

    def jump_fn(self, count: int) -> JumpFn:
        """Return the student's own jump of `count` points."""
        sampling = self.config.sampling
        step = student_step(sampling.step_jump, sampling.r, sampling.form)
        w = torch.zeros(count, dtype=torch.float64)
        return ConditionedDenoiser(self.denoiser, {}, "student", sampling.extra_conditioning, w=w).jump(step)


def fresh_network(config: PlaneConfig, teacher: Mixture) -> PlaneNetwork:
    """Return the untrained network that students start from."""
    anchor = teacher if config.base == "exact" else one_gaussian(teacher)
    return PlaneNetwork(anchor, config.prediction_type, config.width, config.loop.seed)


def set_up(config: PlaneConfig, base: Mapping[str, Tensor] | None = None) -> PlaneRun:
    """Return the exact teacher and an untrained student.

    Args:
        base: weights of the learned base; None to start from `fresh_network`.
    """
    teacher = ring(noise_path(config.path))
    network = fresh_network(config, teacher)
    if base is not None:
        network.load_state_dict(base)
    student = make_student(
        PlaneHost(network), config.student, roles_of(config.method), config.loop.seed, config.method.extra_conditioning
    )

    def call(x: Tensor, t: Tensor, condition: Condition, role: str) -> Tensor:
        return (
            exact_output(teacher, config.prediction_type, x, t) if role == BASE else student.call(x, t, condition, role)
        )

    return PlaneRun(config, teacher, student, Denoiser(call, teacher.path, config.prediction_type))


def learned_base(config: PlaneConfig, out: Path, quiet: bool = False) -> Mapping[str, Tensor] | None:
    """Train a network to denoise the data, resuming what `out` holds, and return its averaged weights.

    The target is the exact teacher's output at each noised point. It is the mean of the usual denoising target, so the
    minimum is the same and the gradient less noisy. The loss is the squared error of the network's output; an error of
    x0 has EDM's weight, because x0 is easy at little noise.

    Returns:
        None where students start as the exact teacher.
    """
    if config.base == "exact":
        return None
    base, data = config.base_config, ring(noise_path(config.path))
    network, path = fresh_network(config, data), data.path
    points = data.sample(base.count, path.clean, torch.Generator().manual_seed(base.loop.seed)).float()
    grid = training_grid(path, TIMES)

    def loss(batch: Batch, rng: KeyedRng) -> Loss:
        x_0, eps = batch["points"], rng.normal("noise", (2,))
        t = grid[rng.integers("t", 0, len(grid))]
        x_t = add_noise(path, x_0, eps, t)
        error = (network(x_t, t) - exact_output(data, base.prediction, x_t, t)).square().mean(1)
        if base.prediction == "x0":
            error = expand(edm_weight(path, t, sigma_data=1.0), error) * error
        return Loss(error.mean(), error.detach(), None, {})

    def fetch(items: np.ndarray, _: KeyedRng) -> Batch:
        return {"points": points[torch.from_numpy(items)]}

    update = Update("base", dict(network.named_parameters()), loss, base.optim)
    title, accelerator = "a diffusion model to start from", make_accelerator("fp32", torch.device("cpu"))
    return fit(title, [update], fetch, len(points), out, base, base.loop, accelerator, quiet=quiet)["base"]


def training_points(run: PlaneRun) -> Tensor:
    """Return data, fp32 [N, 2], or exact trajectories, fp32 [N, points + 1, 2], the end point first."""
    config, teacher = run.config, run.teacher
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


def train_plane(config: PlaneConfig, out: Path, quiet: bool = False, base: Path | None = None) -> PlaneRun:
    """Train a recipe's student, stage by stage, resuming what `out` holds; return it with the averaged weights.

    Args:
        base: run folder of the learned base, by default `out`/base.
    """
    weights = learned_base(config, base or out / "base", quiet)
    inputs = {} if weights is None else {"base": digest(weights)}
    start: Mapping[str, Tensor] | None = None
    for _, folder, stage in config.runs(out):
        run = set_up(stage, weights)
        if start is not None:
            start_from(stage.method, run.student, start)
        points = training_points(run)
        plan, fetch, accelerator = plane_plan(run), fetch_of(run, points), make_accelerator("fp32", torch.device("cpu"))
        title = f"playground {stage.recipe}"
        trained = fit(title, plan, fetch, len(points), folder, stage, stage.loop, accelerator, inputs, quiet=quiet)
        start = trained["student"]
        copy_role(start, run.student.parameters("student"))
    return replace(run, config=config)


def plane_plan(run: PlaneRun) -> list[Update]:
    """Return the update plan of the recipe, on batches of `fetch_of`."""
    config = run.config
    critic = PlaneCritic(config.width, config.loop.seed) if config.method.adversarial.weight else None
    frozen = FrozenNetworks(critic=critic)
    return make_update_plan(config.method, config.optim, run.student, run.denoiser, frozen)


def fetch_of(run: PlaneRun, points: Tensor) -> Callable[[np.ndarray, KeyedRng], Batch]:
    """Return the function that takes a micro-batch of the training points."""
    method, path = run.config.method, run.denoiser.path

    def fetch(items: np.ndarray, rng: KeyedRng) -> Batch:
        x = points[torch.from_numpy(items)]
        if method.start != "trajectory":
            return {"sample": MicroBatch(x, {}, {})}
        stored = StoredPoints.of(x, draw_times(method, path, rng))
        return {"sample": MicroBatch(x[:, 0], {}, {}, torch.zeros(len(x), dtype=torch.float64), stored)}

    return fetch


def check_run(config: PlaneConfig) -> None:
    """Check before training what depends on the path and the network.

    Raises:
        UserError: a grid that the path has no times for, or LoRA targets that the network lacks.
    """
    for stage in config.each_stage():
        run = set_up(stage)
        training_grid(run.teacher.path, stage.method.grid)
        for steps in config.steps:
            inference_times(run.teacher.path, steps, grid=stage.sampling.grid, spacing=stage.sampling.spacing)


def landing_end(run: PlaneRun) -> float:
    """Return the landing of the student's last jump."""
    return end_time(run.teacher.path, run.config.sampling.landing)


@dataclass(frozen=True)
class PlaneFigures:
    """Figures of a student in the plane.

    Attributes:
        energy: (steps, gamma) -> squared energy distance of samples to the exact marginal of the end point; gamma is
            None where the sampler has none.
        recall: (steps, gamma) -> share of the modes that are nearest to at least half of their weight of the samples.
        floor: the same distance of as many exact samples.
        to_end: rms error of one jump from noise to the end point.
        between: rms error of jumps between drawn times, to the recipe's landings.
    """

    energy: dict[tuple[int, float | None], float]
    recall: dict[tuple[int, float | None], float]
    floor: float
    to_end: float
    between: float

    @property
    def gammas(self) -> list[float | None]:
        """The measured values of gamma."""
        return list(dict.fromkeys(gamma for _, gamma in self.energy))

    def record(self) -> dict[str, Any]:
        """Return the figures for JSON."""
        rows = [
            {"steps": n, "gamma": gamma, "energy": value, "recall": self.recall[n, gamma]}
            for (n, gamma), value in self.energy.items()
        ]
        return {"energy": rows, "floor": self.floor, "to_end": self.to_end, "between": self.between}

    def best(self, steps: int) -> tuple[float | None, float]:
        """Return the gamma with the least distance at a step count, and that distance."""
        found = {gamma: value for (count, gamma), value in self.energy.items() if count == steps}
        gamma = min(found, key=lambda gamma: found[gamma])
        return gamma, found[gamma]


@torch.no_grad()
def draw_points(run: PlaneRun, steps: int, gamma: float | None = None, seed: int = 10_000) -> Tensor:
    """Return samples of the student, float64 [shown, 2]."""
    changes = {"steps": steps} | ({} if gamma is None else {"gamma": gamma})
    config = run.config
    sampling = config.sampling.model_copy(update=changes)
    seeds = range(seed, seed + config.shown)
    return draw_latents(run.denoiser, {}, {}, sampling, seeds, (2,), "student").double()


@torch.no_grad()
def measure(run: PlaneRun) -> PlaneFigures:
    """Return the figures of a student. Sampling is their only source of error."""
    config, teacher, path = run.config, run.teacher, run.teacher.path
    end = landing_end(run)
    gammas: tuple[float | None, ...] = config.gammas if config.sampling.sampler == "sss" else (None,)
    samples = {
        (steps, gamma): draw_points(run, steps * config.sampling.calls_a_step, gamma)
        for steps in config.steps
        for gamma in gammas
    }
    energy, recall = ({key: f(x, end) for key, x in samples.items()} for f in (teacher.energy, teacher.recall))
    generator = torch.Generator().manual_seed(config.loop.seed + 1)
    floor = teacher.energy(teacher.sample(config.shown, end, generator), end)
    x = teacher.sample(config.shown, path.noisiest, generator)
    t, s = times_of(path.noisiest, x), times_of(end, x)
    jump = run.jump_fn(count=len(x))

    def error(x_t: Tensor, t: Tensor, s: Tensor) -> float:
        away = jump(x_t.float(), t, s).double() - teacher.flow(x_t, t, s)
        return float(away.square().sum(1).mean().sqrt())

    times = draw_times(config.method, path, KeyedRng(config.loop.seed + 2, 0, tuple(range(len(x)))))
    along = teacher.flow(x, t, times.t_nk)
    return PlaneFigures(energy, recall, floor, error(x, t, s), error(along, times.t_nk, times.s))
