"""Trajectories of the teacher: the solver loop that draws them, and their stored points as training data.

Those of a run are drawn once, for captions of its data, and kept in its cache. They take the place of noised data in
recipes with `method.start = trajectory`.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from fewstep.backbones.base import Backbone
from fewstep.common import distributed as processes
from fewstep.common.compilation import eagerly
from fewstep.common.distributed import any_process, gather_to_main, main_process_first
from fewstep.common.errors import UserError
from fewstep.common.files import short_digest
from fewstep.common.mapped_tensors import MappedRows, MappedTensor, open_tensors
from fewstep.common.messages import Bar
from fewstep.common.random_streams import generator
from fewstep.common.tensor_cache import keep, kept
from fewstep.data.latents import LatentSet
from fewstep.diffusion.conditioned import ConditionedDenoiser
from fewstep.diffusion.denoiser import BASE, Condition, Denoiser, computed_in
from fewstep.diffusion.grid import end_time, training_grid
from fewstep.diffusion.jump import Step
from fewstep.diffusion.samplers import picture_noise, start_size
from fewstep.diffusion.solver import SOLVERS
from fewstep.distillation.config import DistillConfig
from fewstep.distillation.precision import precision_outside
from fewstep.inference.generator import MOST_LATENT_POINTS
from fewstep.methods.config import ConsistencyConfig


@dataclass(frozen=True)
class TeacherOde:
    """The teacher's probability-flow ODE from noise to the end point, one solver step between neighbouring times.

    Attributes:
        times: of the points, rising, [N + 1]: the end point, then the grid.
        step: (t, s) -> the solver's step between these times.
        guided: whether the steps are guided.
    """

    denoiser: Denoiser
    times: Sequence[float]
    step: Callable[[float, float], Step]
    guided: bool

    def teacher(self, denoiser: Denoiser, condition: Condition, null: Condition, omega: Tensor) -> ConditionedDenoiser:
        """Return the teacher under the conditions and the guidance, float64 [B], of a batch."""
        plain = ConditionedDenoiser(denoiser, condition, BASE)
        return replace(plain, null=null, omega=omega) if self.guided else plain

    def solve(self, teacher: ConditionedDenoiser, x: Tensor) -> Iterator[Tensor]:
        """Step from x at the noisiest time; yield x at each time below it, the end point last."""
        path = self.denoiser.path
        for t, s in zip(self.times[:0:-1], self.times[-2::-1], strict=True):
            now, then = (torch.full((len(x),), u, dtype=torch.float64) for u in (t, s))
            x = self.step(t, s)(teacher.denoise, path, x, now, then)
            yield x

    @torch.no_grad()
    def end_points(self, condition: Condition, null: Condition, omega: Tensor, noise: Tensor) -> Tensor:
        """Return the end points of trajectories from standard normal `noise`, [B, ...]."""
        teacher = self.teacher(self.denoiser, condition, null, omega)
        (x,) = deque(self.solve(teacher, noise * start_size(self.denoiser.path)), maxlen=1)
        return x

    @torch.no_grad()
    def points(self, condition: Condition, null: Condition, omega: Tensor, noise: Tensor) -> Tensor:
        """Return whole trajectories from standard normal `noise`, fp32 [B, N + 1, ...], at rising times."""
        x = noise * start_size(self.denoiser.path)
        teacher = self.teacher(self.denoiser, condition, null, omega)
        return torch.stack([x, *self.solve(teacher, x)][::-1], 1).float()

    @torch.no_grad()
    def with_outputs(
        self, condition: Condition, null: Condition, omega: Tensor, noise: Tensor, kind: torch.dtype
    ) -> dict[str, Tensor]:
        """Return whole trajectories from standard normal `noise` with the network's outputs at every grid point.

        The outputs with and without the prompt are kept apart: guidance commutes with their conversion to x0 and eps
        (`Denoiser.guided`), so that they give the guided estimate of any omega. Where the steps are not guided, the
        output without the prompt is one call more. Of a solver with two calls a step the first one is kept, which is
        at the point.

        Args:
            kind: type of the result, which is on the CPU.

        Returns:
            `latents` [B, ...]; `points` [B, N + 1, ...], at rising times; `with_prompt` and `without_prompt`
            [B, N, ...], the outputs at the points of the grid, at rising times.
        """
        plain = self.denoiser
        outputs: list[Tensor] = []

        def call(x: Tensor, t: Tensor, condition: Condition, role: str) -> Tensor:
            outputs.append(plain.call(x, t, condition, role))
            return outputs[-1]

        def keep(tensor: Tensor) -> Tensor:
            return tensor.to("cpu", kind)

        x = noise * start_size(plain.path)
        points, with_prompt, without_prompt = [keep(x)], [], []
        solved = self.solve(self.teacher(replace(plain, call=call), condition, null, omega), x)
        for t in self.times[:0:-1]:
            before, x = x, next(solved)
            if self.guided:
                conditional, unconditional = outputs[0].chunk(2)
            else:
                now = torch.full((len(x),), t, dtype=torch.float64)
                conditional, unconditional = outputs[0], plain.call(before, now, null, BASE)
            outputs.clear()
            points.append(keep(x))
            with_prompt.append(keep(conditional))
            without_prompt.append(keep(unconditional))
        falling = {"points": points, "with_prompt": with_prompt, "without_prompt": without_prompt}
        return {"latents": points[-1], **{name: torch.stack(parts[::-1], 1) for name, parts in falling.items()}}


@dataclass(frozen=True)
class Trajectories:
    """The stored trajectories of a training set.

    Attributes:
        points: [N, n + 1, ...]: the end point, then the points at the grid's rising times.
        omega: guidance of each, float64 [N].
        outputs: the network's outputs at the grid's times with and without the prompt, [N, n, ...] each; None if they
            are not stored.
    """

    points: MappedRows
    omega: Tensor
    outputs: tuple[MappedRows, MappedRows] | None = None

    def point(self, items: Tensor, index: Tensor) -> Tensor:
        """Return x of samples at times of the grid, int64 [B] each -> [B, ...] as stored; index -1 is the end point."""
        return self.points.at(items, index + 1)


SHARD = 128
"""Trajectories in a file."""


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
    used = method.model_dump(mode="json", include={"grid", "end", "solver", "guidance"})
    decides = [backbone.folder.denoising, data.key, json.dumps(used, sort_keys=True), seed, config.data.empty_prompts]
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
    with Bar(total=len(parts) * wide, desc="teacher trajectories", unit="trajectory", disable=silent) as bar:
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
