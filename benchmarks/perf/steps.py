"""A training step: ours as the loop runs it, its bare parts, and the example script's, in turn."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from threading import Semaphore
from typing import Any

import torch

from fewstep.common.device import pick_precision
from fewstep.distillation.prepare import Run
from fewstep.training.update import Batch
from perf.ours import go, make_ours
from perf.phases import time_phases
from perf.task import WARM, Task, script_of
from perf.timing import Timed, in_turn, settled


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
            output = run.student.call(x, t, state, "student")
        torch.autograd.grad(output.float().square().mean(), weights)

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


class Clock:
    """Wrapper of the loop's loss: stops the loop's clock, runs the others in turn, and lets the loop go on.

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

        def clocked(*args: Any) -> Batch:
            self._reads.acquire()
            return fetch(*args)

        return clocked

    def around(self, loss: Callable[..., Any]) -> Callable[..., Any]:
        """The loss with the clock before it."""

        def clocked(batch: Batch, rng: Any) -> Any:
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
            return loss(batch, rng)

        return clocked

    def result(self) -> dict[str, Timed]:
        """Everybody's seconds by round, `ours` among them."""
        kept = slice(WARM, len(self.own))
        found = {name: Timed(tuple(round_[name] for round_ in self.theirs[kept])) for name in self.others}
        return {"ours": Timed(tuple(self.own[kept])), **found}


def time_steps(task: Task) -> tuple[dict[str, Timed], dict[str, Timed]]:
    """Our step, its bare parts and the script's step with and without encoders, in turn; and our step by phase."""
    ours = make_ours(task)
    script = script_of(task)  # one for both: its networks are two already
    theirs = {"script": script.step, "script without encoders": script.step_on_kept}
    clock = Clock(bare_parts(ours.run, task) | theirs, ours.run.backbone.device)
    go(ours, clock.around, clock.within)
    return clock.result(), time_phases(ours)
