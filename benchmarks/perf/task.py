"""What is timed, and what it is timed on: a pipeline, pictures or trajectories, a batch, a precision."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from fewstep import synthesize
from fewstep.common.device import DTYPES, pick_precision
from perf.script import TARGETS, LcmScript

WARM = 2
"""Rounds that are not counted."""
BATCHES = 8
"""Batches in a set: a step finds its samples where a pass has left them, not where the last step did."""


@dataclass(frozen=True)
class Task:
    """What is timed.

    Attributes:
        folder: the pipeline.
        kind: `stored` (the teacher's points and outputs are read) or `online` (it is called in the step).
        more: further overrides of our run (loop.compile=true, student.base=bf16, ...).
    """

    folder: Path
    kind: str
    rank: int
    batch: int
    precision: str
    device: str
    cache: Path
    rounds: int
    more: tuple[str, ...] = ()

    @property
    def compiled(self) -> bool:
        """Whether networks are compiled."""
        return "loop.compile=true" in self.more


def make_pictures(task: Task) -> tuple[Path, np.ndarray]:
    """A folder of random pictures with captions, a set's worth, and the first batch of them."""
    from fewstep.backbones.pipeline_folder import read_folder

    side = read_folder(task.folder).picture_size
    count = BATCHES * task.batch
    place = task.cache / f"pictures-{side}-{count}"
    pictures = np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8)
    if not place.is_dir():
        place.mkdir(parents=True)
        for i, picture in enumerate(pictures):
            Image.fromarray(picture).save(place / f"{i:03d}.png")
            (place / f"{i:03d}.txt").write_text(f"picture {i}\n", encoding="utf-8")
    return place, pictures[: task.batch]


def words(task: Task) -> list[str]:
    """Overrides of the run: TCD with LoRA, from pictures or from stored trajectories."""
    common = [
        f"teacher={task.folder}", f"student.rank={task.rank}", f"student.targets=[{','.join(TARGETS)}]",
        "optim.ema=null", f"loop.batch={task.batch}", f"loop.steps={task.rounds + WARM + 1}",
        "loop.validate_every=null",
        "optim.lr=1e-6",
        f"loop.precision={task.precision}", f"device={task.device}", "loop.save_every=1000000", *task.more,
    ]  # fmt: skip
    if task.kind == "online":
        return [*common, f"data.source={make_pictures(task)[0]}"]
    count = BATCHES * task.batch
    prompts = task.cache / "prompts.txt"
    prompts.parent.mkdir(parents=True, exist_ok=True)
    prompts.write_text("".join(f"picture {i}\n" for i in range(count)), encoding="utf-8")
    drawn = task.cache / f"trajectories-{task.folder.name}-{count}"
    guidance = ["guidance.convention=lcm", "guidance.low=2", "guidance.high=14"]
    settings = ["grid=4", "end=index0", "dtype=fp32", f"device={task.device}", *guidance]
    synthesize(prompts, out=drawn, teacher=task.folder, kind="trajectories", overrides=settings)
    stored = ["method.start=trajectory", "method.point=stored", "method.grid=4", "sampling.grid=4"]
    return [*common, *stored, f"data.source={drawn}"]


def script_of(task: Task) -> LcmScript:
    """The example's state for a task."""
    device = torch.device(task.device)
    _, pictures = make_pictures(task)
    shown = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
    prompts = [f"picture {i}" for i in range(task.batch)]
    kind = DTYPES[pick_precision(task.precision, device)]  # type: ignore[arg-type]
    return LcmScript(task.folder, task.rank, shown, prompts, precision=kind, device=device)
