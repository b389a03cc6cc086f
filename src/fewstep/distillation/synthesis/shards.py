"""Drawing and storing the shards of a set."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fewstep.backbones.base import Backbone
from fewstep.common.device import DTYPES, copy_async
from fewstep.common.errors import UserError
from fewstep.common.files import atomic_write
from fewstep.common.rng import KeyedRng
from fewstep.common.tensors import save_tensors
from fewstep.diffusion.denoiser import Condition
from fewstep.diffusion.samplers import picture_noise
from fewstep.distillation.synthesis.record import Plan, shard_name, write_record
from fewstep.distillation.trajectory import TeacherOde

TYPES = {"I64": torch.int64, "F64": torch.float64, "F32": torch.float32, "F16": torch.float16}
"""safetensors' name of a type -> torch's."""
Drawn = dict[str, Tensor]
"""Tensors of some samples, by their names in a shard."""


@dataclass(frozen=True)
class ShardMaker:
    """The samples of a plan, drawn by its teacher.

    Attributes:
        rows: row of the text states of each line of the prompt file, int64 [lines].
        table: text states of the distinct prompts and, last, the unconditional one, [K + 1, ...] each.
    """

    plan: Plan
    ode: TeacherOde
    backbone: Backbone
    rows: Tensor
    table: Mapping[str, Tensor]

    def inputs(self, items: range) -> Drawn:
        """Draw prompt, seed and guidance of samples, keyed by sample number: they do not depend on the shard."""
        settings = self.plan.settings
        rng = KeyedRng(settings.seed, 0, tuple(items))
        rows = self.rows[torch.tensor([i // settings.each for i in items])]
        empty = rng.chance("empty prompt", settings.empty_prompts)
        return {
            "prompt": torch.where(empty, self.plan.distinct, rows),
            # consecutive: a CPU generator of torch uses the last 32 bits of a seed alone
            "seed": torch.tensor([settings.seed * 1_000_003 + i for i in items]),
            "omega": rng.uniform("guidance", *settings.guidance.omegas),
        }

    def states(self, rows: Tensor) -> Condition:
        """Return the text states in rows of the table, float32 on the device."""
        return {name: copy_async(states[rows], self.backbone.device).float() for name, states in self.table.items()}

    def draw(self, inputs: Drawn) -> Drawn:
        """Draw some samples in one batch; return what a shard stores of them, on the CPU."""
        settings, device = self.plan.settings, self.backbone.device
        noise, _ = picture_noise(inputs["seed"].tolist(), self.plan.shape)
        null = self.states(torch.full_like(inputs["prompt"], self.plan.distinct))
        given = self.states(inputs["prompt"]), null, inputs["omega"], noise.to(device)
        precision, kind = self.plan.precision, DTYPES[settings.dtype]
        with torch.autocast(device.type, DTYPES[precision], enabled=precision != "fp32"):
            if settings.kind == "trajectories":
                return self.ode.with_outputs(*given, kind)
            return {"latents": self.ode.end_points(*given).to("cpu", kind)}

    def shard(self, items: range, advance: Callable[[int], object]) -> Drawn:
        """Draw all tensors of a shard; `advance` is called with the number of samples after each batch.

        Batches are counted from the shard's first sample, so that they are the same in any process.

        Raises:
            UserError: a number is not finite.
        """
        inputs = self.inputs(items)
        layout = self.plan.layout(len(items))
        drawn = {name: torch.empty(shape, dtype=TYPES[kind]) for name, (kind, shape) in layout.items()}
        for name, values in inputs.items():
            drawn[name].copy_(values)
        for start in range(0, len(items), self.plan.settings.batch):
            rows = slice(start, min(start + self.plan.settings.batch, len(items)))
            for name, values in self.draw({name: values[rows] for name, values in inputs.items()}).items():
                _check_finite(name, values, items[rows], self.plan)
                drawn[name][rows] = values
            advance(rows.stop - rows.start)
        return drawn


def _check_finite(name: str, values: Tensor, items: range, plan: Plan) -> None:
    finite = values.flatten(1).isfinite().all(1)
    if not bool(finite.all()):
        item = items[int((~finite).nonzero()[0])]
        raise UserError(
            f"{name} of sample {item} is not finite under dtype = {plan.settings.dtype!r} and precision = "
            f"{plan.precision!r}; use 'fp32' for both, or less guidance",
            field="dtype",
        )


def make_shard(maker: ShardMaker, folder: Path, number: int, advance: Callable[[int], object]) -> None:
    """Draw, store and record a shard.

    Raises:
        UserError: a number is not finite, or the disk is full.
    """
    items = maker.plan.items(number)
    drawn = maker.shard(items, advance)
    path = folder / shard_name(number)
    with atomic_write(path) as part:
        save_tensors(part, drawn)
    write_record(folder, path, samples=len(items))


def share(numbers: Sequence[int], rank: int, count: int) -> list[int | None]:
    """Return a process's share of the shards, every `count`-th; None where only others draw in the last round."""
    rounds = -(-len(numbers) // count)
    own: list[int | None] = list(numbers[rank::count])
    return own + [None] * (rounds - len(own))
