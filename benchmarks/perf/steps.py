"""A training step: ours as the loop runs it, its bare parts, and the example script's, in turn."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Semaphore
from typing import Any

import numpy as np
import torch
from PIL import Image

from fewstep import synthesize
from fewstep.device import DTYPES, pick_precision
from fewstep.distillation import update_plan
from fewstep.preparation import Run, prepare
from fewstep.samples import fetch_of
from fewstep.settings import resolve
from fewstep.training.launch import make_accelerator
from fewstep.training.loop import Batch, train
from fewstep.training.run import RunLog
from perf.script import TARGETS, LcmScript
from perf.timing import Timed, in_turn, settled

WARM = 2
"""Rounds that are not counted."""
BATCHES = 8
"""Batches in a set: a step finds its samples where a pass has left them, not where the last step did."""


@dataclass(frozen=True)
class Task:
    """What is timed.

    Attributes:
        folder: the pipeline.
        kind: `stored` (the teacher's points and outputs are read) or `online` (it is asked in the step).
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


def make_pictures(task: Task) -> tuple[Path, np.ndarray]:
    """A folder of random pictures with captions, a set's worth, and the first batch of them."""
    from fewstep.folder import read_folder

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
    """What the run is asked for: TCD with LoRA, from pictures or from walks drawn beforehand."""
    common = [
        f"teacher={task.folder}", f"student.rank={task.rank}", f"student.targets=[{','.join(TARGETS)}]",
        "optim.ema=null", f"loop.batch={task.batch}", f"loop.steps={task.rounds + WARM + 1}", "loop.watch_every=null",
        "optim.lr=1e-6",
        f"loop.precision={task.precision}", f"device={task.device}", "loop.save_every=1000000", *task.more,
    ]  # fmt: skip
    if task.kind == "online":
        return [*common, f"data.source={make_pictures(task)[0]}"]
    count = BATCHES * task.batch
    prompts = task.cache / "prompts.txt"
    prompts.parent.mkdir(parents=True, exist_ok=True)
    prompts.write_text("".join(f"picture {i}\n" for i in range(count)), encoding="utf-8")
    drawn = task.cache / f"walks-{task.folder.name}-{count}"
    guidance = ["guidance.convention=lcm", "guidance.low=2", "guidance.high=14"]
    settings = ["grid=4", "end=index0", "dtype=fp32", f"device={task.device}", *guidance]
    synthesize(prompts, out=drawn, teacher=task.folder, kind="trajectories", overrides=settings)
    stored = ["method.start=trajectory", "method.point=stored", "method.grid=4", "sampling.grid=4"]
    return [*common, *stored, f"data.source={drawn}"]


def bare_parts(run: Run, task: Task) -> dict[str, Callable[[], None]]:
    """The network calls of a step, alone, on the run's own networks."""
    device = run.backbone.device
    x = torch.randn(task.batch, *run.backbone.latent_shape, device=device)
    t = torch.full((task.batch,), 499.0, dtype=torch.float64)
    state = run.data.states(torch.zeros(task.batch, dtype=torch.int64), device)
    both = {name: torch.cat([value, value]) for name, value in state.items()}
    weights = list(run.student.parameters("student").values())
    kind = pick_precision(task.precision, device)  # type: ignore[arg-type]
    mixed = torch.autocast(device.type, torch.float16 if kind == "fp16" else torch.bfloat16, enabled=kind != "fp32")

    def student() -> None:
        with mixed:
            said = run.student.call(x, t, state, "student")
        torch.autograd.grad(said.float().square().mean(), weights)

    @torch.no_grad()
    def target() -> None:
        with mixed:
            run.student.call(x, t, state, "student")

    @torch.no_grad()
    def teacher() -> None:
        with mixed:
            run.student.call(torch.cat([x, x]), torch.cat([t, t]), both, "teacher")

    @torch.no_grad()
    def once() -> None:
        with mixed:
            run.student.call(x, t, state, "teacher")

    parts = {"student": student, "target": target, "F": once}
    return parts if task.kind == "stored" else {**parts, "teacher": teacher}


def script_of(task: Task) -> LcmScript:
    """The example's state for a task."""
    device = torch.device(task.device)
    _, pictures = make_pictures(task)
    shown = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
    prompts = [f"picture {i}" for i in range(task.batch)]
    kind = DTYPES[pick_precision(task.precision, device)]  # type: ignore[arg-type]
    return LcmScript(task.folder, task.rank, shown, prompts, precision=kind, device=device)


class Clock:
    """Stands in the loop's loss: stops the loop's clock, runs the others in turn, and lets the loop go on.

    What the loop does between two losses is a whole step of it: backward, optimiser, logging, the next batch. Reading
    ahead is part of that: a batch is read while the loop's clock runs, or not at all, one for each step.
    """

    def __init__(self, others: Mapping[str, Callable[[], None]], device: torch.device) -> None:
        self.others, self.device = others, device
        self.own: list[float] = []
        self.theirs: list[dict[str, float]] = []
        self.started: float | None = None
        self._reads = Semaphore(1)  # the first batch, before the first step

    def within(self, fetch: Callable[..., Batch]) -> Callable[..., Batch]:
        """The reading of a batch, once the clock runs; the step that needs the batch waits for its end."""

        def clocked(*asked: Any) -> Batch:
            self._reads.acquire()
            return fetch(*asked)

        return clocked

    def around(self, loss: Callable[..., Any]) -> Callable[..., Any]:
        """The loss with the clock before it."""

        def clocked(batch: Batch, draws: Any) -> Any:
            now = settled(self.device)
            if self.started is not None:
                self.own.append(now - self.started)
            names = list(self.others)
            ordered = names if len(self.own) % 2 else names[::-1]
            try:
                self.theirs.append(in_turn({name: self.others[name] for name in ordered}, self.device))
                self.started = settled(self.device)
            finally:  # a reader left waiting would keep the process from ending
                self._reads.release()
            return loss(batch, draws)

        return clocked

    def result(self) -> dict[str, Timed]:
        """Everybody's seconds by round, `ours` among them."""
        kept = slice(WARM, len(self.own))
        found = {name: Timed(tuple(round_[name] for round_ in self.theirs[kept])) for name in self.others}
        return {"ours": Timed(tuple(self.own[kept])), **found}


def time_steps(task: Task, out: Path) -> dict[str, Timed]:
    """Our step, its bare parts and the script's step with and without encoders, in turn in one run."""
    device = torch.device(task.device)
    accelerator = make_accelerator(task.precision, device)  # type: ignore[arg-type]
    config = resolve("tcd", None, words(task))
    run = prepare(config, task.cache / "encoded", device)
    others = bare_parts(run, task)
    script = script_of(task)  # one for both: its networks are two already
    others |= {"script": script.step, "script without encoders": script.step_on_kept}
    clock = Clock(others, device)
    plan = update_plan(run)
    plan[0] = replace(plan[0], loss=clock.around(plan[0].loss))

    with RunLog(out, config, title="steps", inputs=run.inputs, main=True, quiet=True) as log:
        train(plan, clock.within(fetch_of(run)), len(run.data), config.loop, log, accelerator)
    return clock.result()
