"""Our own training loop with something standing in it: a clock, or what looks at what a step holds."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from fewstep.common.accelerator import make_accelerator
from fewstep.distillation.batches import fetch_of
from fewstep.distillation.config import DistillConfig, resolve
from fewstep.distillation.prepare import Run, prepare
from fewstep.training.loop import train
from fewstep.training.run_folder import RunLog
from fewstep.training.update import Batch
from perf.task import Task, words

LossOf = Callable[[Batch, Any], Any]
Fetch = Callable[..., Batch]


@dataclass(frozen=True)
class Ours:
    """A run of ours, loaded and ready."""

    config: DistillConfig
    run: Run
    accelerator: Accelerator


def make_ours(task: Task) -> Ours:
    """Load what the task needs."""
    device = torch.device(task.device)
    accelerator = make_accelerator(task.precision, device)  # type: ignore[arg-type]
    config = resolve("tcd", None, words(task))
    return Ours(config, prepare(config, task.cache / "encoded", device), accelerator)


def go(
    ours: Ours,
    around: Callable[[LossOf], LossOf],
    within: Callable[[Fetch], Fetch] = lambda fetch: fetch,
    log: Callable[..., RunLog] = RunLog,
) -> None:
    """Run the loop to its end, with `around` about its loss and `within` about the reading of its batches."""
    plan = ours.run.update_plan()
    plan[0] = replace(plan[0], loss=around(plan[0].loss))
    with (
        tempfile.TemporaryDirectory() as out,
        log(Path(out), ours.config, title="steps", inputs=ours.run.inputs, main=True, quiet=True) as held,
    ):
        train(plan, within(fetch_of(ours.run)), len(ours.run.data), ours.config.loop, held, ours.accelerator)
