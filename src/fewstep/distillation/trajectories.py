"""Stored trajectories of the teacher: x at every time of the training grid, drawn once.

They stand in the place of noised data where a recipe starts on them (`method.start = trajectory`).
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
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
from fewstep.common.mapped_tensors import MappedRows
from fewstep.common.rng import generator
from fewstep.data.latents import LatentSet, cached_rows, kept_rows
from fewstep.diffusion.conditioned import ConditionedDenoiser
from fewstep.diffusion.denoiser import BASE, Condition, Denoiser, computed_in
from fewstep.diffusion.grid import end_time, training_grid
from fewstep.diffusion.samplers import picture_noise, start_size
from fewstep.diffusion.solver import SOLVERS
from fewstep.distillation.config import DistillConfig
from fewstep.distillation.precision import asked_outside
from fewstep.inference.generator import MOST_LATENT_POINTS
from fewstep.methods.config import ConsistencyConfig

SHARD = 128
"""Trajectories in a file."""


def method_key(method: ConsistencyConfig) -> str:
    """What of a recipe decides its trajectories."""
    used = {"grid", "end", "solver", "guidance"}
    return json.dumps(method.model_dump(mode="json", include=used), sort_keys=True)


@torch.no_grad()
def draw_trajectories(
    method: ConsistencyConfig,
    denoiser: Denoiser,
    condition: Condition,
    null: Condition,
    omega: Tensor,
    start: Tensor,
) -> Tensor:
    """Follow the guided teacher from noise down the whole grid.

    Args:
        start: standard normal, [B, ...].
        omega: guidance of each, float64 [B].

    Returns:
        [B, N + 1, ...] fp32: the end point first, then the points at the grid's rising times.
    """
    path = denoiser.path
    times = [end_time(path, method.end), *training_grid(path, method.grid).tolist()]
    teacher = ConditionedDenoiser(denoiser, condition, BASE)
    if method.guidance.convention != "none":
        teacher = replace(teacher, null=null, omega=omega)
    step = SOLVERS[method.solver]
    x = start * start_size(path)
    points = [x]
    for t, s in zip(times[:0:-1], times[-2::-1], strict=True):
        now, then = (torch.full((len(x),), u, dtype=torch.float64) for u in (t, s))
        x = step(teacher.denoise, path, x, now, then)
        points.append(x)
    return torch.stack(points[::-1], 1).float()


@dataclass(frozen=True)
class Kept:
    """The trajectories of some samples on disk (`methods.pair.StoredTrajectories`), read point by point."""

    rows: MappedRows
    items: Tensor

    def point(self, index: Tensor) -> Tensor:
        """x at those times of the grid, fp16 [B, ...]; -1 is the end point."""
        return self.rows.at(self.items, index + 1)

    def outputs(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """What the network said there: nothing that is kept."""
        raise NotImplementedError


def drawn_prompts(config: DistillConfig, captions: int) -> tuple[Tensor, Tensor]:
    """Draw the caption of each trajectory, int64 [N] (`captions` for none), and its guidance omega, float64 [N]."""
    count, seed = config.data.trajectories, config.loop.seed
    rng = generator(seed, "trajectories")
    rows = torch.from_numpy(rng.integers(0, captions, count))
    unsaid = torch.from_numpy(generator(seed, "trajectories without prompt").random(count))
    rows = torch.where(unsaid < config.data.empty_prompts, captions, rows)
    return rows, torch.from_numpy(rng.uniform(*config.method.guidance.omegas, count))


def stored_trajectories(
    config: DistillConfig, backbone: Backbone, denoiser: Denoiser, said: LatentSet, cache: Path
) -> tuple[LatentSet, Tensor]:
    """Trajectories of the teacher for captions of the training set, drawn in parts and kept in shards (fp16).

    A killed process goes on with the shard it was in. All processes of a launch must ask: they share out the drawing,
    call the network equally often (its weights may be split), and make the same bytes in any number, or with split
    weights the same numbers to rounding. The main one writes.

    Returns:
        the trajectories as a training set, and the guidance omega of each, float64 [N].
    """
    method, count, seed = config.method, config.data.trajectories, config.loop.seed
    device = backbone.device
    rows, omega = drawn_prompts(config, said.captions)
    computed, narrow = asked_outside(config, device)
    asked = replace(denoiser, call=computed_in(denoiser.call, BASE, computed))
    decides = [backbone.folder.denoising, said.key, method_key(method), seed, config.data.empty_prompts]
    known = " ".join(map(str, [*decides, backbone.latent_shape, *([narrow] if narrow else [])]))
    digest = hashlib.sha256(known.encode()).hexdigest()[:16]
    _, height, width = backbone.latent_shape
    wide = min(count, SHARD, max(1, MOST_LATENT_POINTS // (height * width)))

    def walk(first: int) -> Tensor:
        items = torch.arange(first, first + wide).clamp(max=count - 1)
        condition, null = said.states(rows[items], device), said.null(wide, device)
        noise, _ = picture_noise([seed * 1_000_003 + i for i in items.tolist()], backbone.latent_shape)
        with eagerly():
            drawn = draw_trajectories(method, asked, condition, null, omega[items], noise.to(device))
        return drawn.half().cpu()

    def points(shard: range, parts: list[Tensor]) -> dict[str, Tensor]:
        drawn = torch.cat(parts)
        good = drawn.flatten(1).isfinite().all(1)
        if not good.all():
            raise UserError(
                f"seed = {seed}: the teacher's trajectory {shard[int((~good).nonzero()[0])]} is not finite in fp16; "
                f"give a teacher without such numbers (now {backbone.folder.path}), or less method.guidance"
            )
        return {"points": drawn}

    shards = [range(start, min(start + SHARD, count)) for start in range(0, count, SHARD)]
    names = [f"trajectories-{digest}-{shard.start}-{shard.stop}" for shard in shards]
    found = [main_process_first(partial(kept_rows, cache, name)) for name in names]
    lacking = [number for number, held in enumerate(found) if any_process(held is None)]
    parts = [(number, first) for number in lacking for first in shards[number][::wide]]
    drawn: dict[int, list[Tensor]] = {number: [] for number in lacking}
    silent = not parts or not processes.is_main()
    with tqdm(total=len(parts) * wide, desc="teacher trajectories", unit="trajectory", disable=silent) as bar:
        for turn in range(0, len(parts), processes.world_size()):
            own = min(turn + processes.rank(), len(parts) - 1)  # the last one again where they do not go round
            every = gather_to_main(walk(parts[own][1]), wide * processes.world_size())
            for place, (number, first) in enumerate(parts[turn : turn + processes.world_size()]):
                shard = shards[number]
                drawn[number].append(every[place * wide :][: min(wide, shard.stop - first)])
                if first == shard[::wide][-1]:  # the others find what the main process has written
                    whole = partial(points, shard, drawn.pop(number))
                    found[number] = main_process_first(partial(cached_rows, cache, names[number], whole))
                bar.update(wide)

    kept = MappedRows([held["points"] for held in found if held is not None])
    key = f"trajectories-{digest}-{count}"
    return LatentSet(kept, said.table, rows[:, None], key, said.said, said.parts), omega
