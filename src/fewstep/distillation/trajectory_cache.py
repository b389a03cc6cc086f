"""The trajectories of a run: drawn once by its teacher for captions of its data, and kept in its cache.

They take the place of noised data in recipes with `method.start = trajectory`.
"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from fewstep.backbones.base import Backbone
from fewstep.common import distributed as processes
from fewstep.common.compilation import eagerly
from fewstep.common.distributed import any_process, gather_to_main, main_process_first
from fewstep.common.errors import UserError
from fewstep.common.files import short_digest
from fewstep.common.mapped_tensors import MappedRows, MappedTensor, open_tensors
from fewstep.common.rng import generator
from fewstep.common.tensor_cache import keep, kept
from fewstep.data.latents import LatentSet
from fewstep.diffusion.denoiser import BASE, Denoiser, computed_in
from fewstep.diffusion.grid import end_time, training_grid
from fewstep.diffusion.samplers import picture_noise
from fewstep.diffusion.solver import SOLVERS
from fewstep.distillation.config import DistillConfig
from fewstep.distillation.precision import precision_outside
from fewstep.distillation.trajectory import TeacherOde, Trajectories
from fewstep.inference.generator import MOST_LATENT_POINTS
from fewstep.methods.config import ConsistencyConfig

SHARD = 128
"""Trajectories in a file."""


def method_key(method: ConsistencyConfig) -> str:
    """Return the settings of a recipe that decide its trajectories, as JSON."""
    used = {"grid", "end", "solver", "guidance"}
    return json.dumps(method.model_dump(mode="json", include=used), sort_keys=True)


def teacher_ode(method: ConsistencyConfig, denoiser: Denoiser) -> TeacherOde:
    """Return the teacher's guided ODE down the whole grid of a recipe, by its solver."""
    path = denoiser.path
    times = [end_time(path, method.end), *training_grid(path, method.grid).tolist()]
    return TeacherOde(denoiser, times, lambda t, s: SOLVERS[method.solver], method.guidance.convention != "none")


def drawn_prompts(config: DistillConfig, captions: int) -> tuple[Tensor, Tensor]:
    """Return each trajectory's caption, int64 [N] (`captions` for the empty prompt), and its omega, float64 [N]."""
    count, seed = config.data.trajectories, config.loop.seed
    rng = generator(seed, "trajectories")
    rows = torch.from_numpy(rng.integers(0, captions, count))
    empty = torch.from_numpy(generator(seed, "trajectories without prompt").random(count))
    rows = torch.where(empty < config.data.empty_prompts, captions, rows)
    return rows, torch.from_numpy(rng.uniform(*config.method.guidance.omegas, count))


def cached_trajectories(
    config: DistillConfig, backbone: Backbone, denoiser: Denoiser, data: LatentSet, cache: Path
) -> tuple[LatentSet, Trajectories]:
    """Return trajectories of the teacher for captions of the data; those that the cache lacks are drawn (fp16 shards).

    A killed run resumes with the shard it was in. All processes of a launch must call it: they share the drawing and
    call the network equally often (its weights may be split). Any number of processes makes the same bytes, or with
    split weights the same numbers to rounding. The main one writes.

    Returns:
        the data with a trajectory in the place of each latent, and the trajectories.

    Raises:
        UserError: a trajectory is not finite in fp16.
    """
    method, count, seed = config.method, config.data.trajectories, config.loop.seed
    device = backbone.device
    rows, omega = drawn_prompts(config, data.captions)
    computed, narrow = precision_outside(config, device)
    ode = teacher_ode(method, replace(denoiser, call=computed_in(denoiser.call, BASE, computed)))
    decides = [backbone.folder.denoising, data.key, method_key(method), seed, config.data.empty_prompts]
    known = " ".join(map(str, [*decides, backbone.latent_shape, *([narrow] if narrow else [])]))
    digest = short_digest(known)
    _, height, width = backbone.latent_shape
    wide = min(count, SHARD, max(1, MOST_LATENT_POINTS // (height * width)))

    def draw(first: int) -> Tensor:
        items = torch.arange(first, first + wide).clamp(max=count - 1)
        condition, null = data.states(rows[items], device), data.null(wide, device)
        noise, _ = picture_noise([seed * 1_000_003 + i for i in items.tolist()], backbone.latent_shape)
        with eagerly():
            return ode.points(condition, null, omega[items], noise.to(device)).half().cpu()

    def read(name: str) -> dict[str, MappedTensor] | None:
        return kept(cache, name, open_tensors)

    def keep_finite(shard: range, name: str, parts: list[Tensor]) -> dict[str, MappedTensor] | None:
        if found := read(name):  # the main process's file
            return found
        drawn = torch.cat(parts)
        good = drawn.flatten(1).isfinite().all(1)
        if not good.all():
            raise UserError(
                f"seed = {seed}: the teacher's trajectory {shard[int((~good).nonzero()[0])]} is not finite in fp16; "
                f"use another teacher than {backbone.folder.path}, or less method.guidance"
            )
        keep(cache, name, {"points": drawn})
        return read(name)

    shards = [range(start, min(start + SHARD, count)) for start in range(0, count, SHARD)]
    names = [f"trajectories-{digest}-{shard.start}-{shard.stop}" for shard in shards]
    found = [main_process_first(partial(read, name)) for name in names]
    lacking = [number for number, held in enumerate(found) if any_process(held is None)]
    parts = [(number, first) for number in lacking for first in shards[number][::wide]]
    drawn: dict[int, list[Tensor]] = {number: [] for number in lacking}
    silent = not parts or not processes.is_main()
    with tqdm(total=len(parts) * wide, desc="teacher trajectories", unit="trajectory", disable=silent) as bar:
        for turn in range(0, len(parts), processes.world_size()):
            own = min(
                turn + processes.rank(), len(parts) - 1
            )  # the last part again: all call the network equally often
            every = gather_to_main(draw(parts[own][1]), wide * processes.world_size())
            for place, (number, first) in enumerate(parts[turn : turn + processes.world_size()]):
                shard = shards[number]
                drawn[number].append(every[place * wide :][: min(wide, shard.stop - first)])
                if first == shard[::wide][-1]:
                    found[number] = main_process_first(partial(keep_finite, shard, names[number], drawn.pop(number)))
                bar.update(wide)

    points = MappedRows([held["points"] for held in found if held is not None])
    key = f"trajectories-{digest}-{count}"
    return LatentSet(points, data.table, rows[:, None], key, data.prompts, data.parts), Trajectories(points, omega)
