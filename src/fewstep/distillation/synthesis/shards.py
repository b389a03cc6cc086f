"""The shards of a set: drawn, stored, and found again."""

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
from fewstep.distillation.synthesis.walk import Drawn, Walk, end_points, trajectories

TYPES = {"I64": torch.int64, "F64": torch.float64, "F32": torch.float32, "F16": torch.float16}
"""safetensors' name of a type -> torch's."""


@dataclass(frozen=True)
class ShardMaker:
    """KeyedRng the samples of a plan.

    Attributes:
        rows: row of the text states of each line of the prompt file, int64 [lines].
        table: text states of the distinct prompts and, last, the unconditional one, [K + 1, ...] each.
    """

    plan: Plan
    walk: Walk
    backbone: Backbone
    rows: Tensor
    table: Mapping[str, Tensor]

    def inputs(self, items: range) -> Drawn:
        """Prompt, seed and guidance of samples: keyed by sample number, so that they do not depend on the shard."""
        settings = self.plan.settings
        rng = KeyedRng(settings.seed, 0, tuple(items))
        rows = self.rows[torch.tensor([i // settings.each for i in items])]
        unsaid = rng.chance("empty prompt", settings.empty_prompts)
        return {
            "prompt": torch.where(unsaid, self.plan.distinct, rows),
            # one after another: a CPU generator of torch tells seeds apart by their last 32 bits alone
            "seed": torch.tensor([settings.seed * 1_000_003 + i for i in items]),
            "omega": rng.uniform("guidance", *settings.guidance.omegas),
        }

    def states(self, rows: Tensor) -> Condition:
        """The text states in rows of the table, float32 on the device."""
        return {name: copy_async(states[rows], self.backbone.device).float() for name, states in self.table.items()}

    def draw(self, inputs: Drawn) -> Drawn:
        """Walk with some samples at once: what is kept of them."""
        settings, device = self.plan.settings, self.backbone.device
        noise, _ = picture_noise(inputs["seed"].tolist(), self.plan.shape)
        null = self.states(torch.full_like(inputs["prompt"], self.plan.distinct))
        kept = trajectories if settings.kind == "trajectories" else end_points
        precision = self.plan.precision
        with torch.autocast(device.type, DTYPES[precision], enabled=precision != "fp32"):
            return kept(
                self.walk,
                self.states(inputs["prompt"]),
                null,
                inputs["omega"],
                noise.to(device),
                DTYPES[settings.dtype],
            )

    def shard(self, items: range, advance: Callable[[int], object]) -> Drawn:
        """All tensors of the shard with these samples; `advance` is told of samples as they are drawn.

        The network sees them in batches that are counted from the shard's first sample, whoever draws it.

        Raises:
            UserError: a number that is not finite.
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
            f"{plan.precision!r}; the nearest legal ones are 'fp32' for both, or less guidance"
        )


def make_shard(painter: ShardMaker, folder: Path, number: int, advance: Callable[[int], object]) -> None:
    """Draw a shard, store it, and note it.

    Raises:
        UserError: a number that is not finite, or a disk that is full.
    """
    items = painter.plan.items(number)
    drawn = painter.shard(items, advance)
    path = folder / shard_name(number)
    with atomic_write(path) as part:
        save_tensors(part, drawn)
    write_record(folder, path, samples=len(items))


def share(numbers: Sequence[int], rank: int, count: int) -> list[int | None]:
    """What a process takes of the shards: every `count`-th; None where others still draw in the last round."""
    rounds = -(-len(numbers) // count)
    own: list[int | None] = list(numbers[rank::count])
    return own + [None] * (rounds - len(own))
