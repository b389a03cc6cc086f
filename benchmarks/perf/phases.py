"""Our own step by phase, in a pass of its own: to time a phase is to wait for the device at its end.

What hooks the loop has are wrapped: the loss, the student's call, the backward pass, the progress bar.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fewstep.common.config import Config
from fewstep.diffusion.denoiser import BASE, Call
from fewstep.training.run_folder import RunLog
from perf.ours import LossOf, Ours, go
from perf.task import WARM
from perf.timing import Timed, settled

WAIT = "waiting for the batch"
CALLS = {True: "student, forward", False: "target"}
TEACHER = "teacher"
REST = "the rest of the loss"
BACKWARD = "backward"
LEARN = "clipping, optimiser, log"
PHASES = (WAIT, *CALLS.values(), TEACHER, REST, BACKWARD, LEARN)
"""In the order of a step, but that the loss is what lies between its calls."""


class Phases:
    """Seconds of each phase, step by step."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.steps: list[dict[str, float]] = []
        self._begin()

    def _begin(self) -> None:
        self._last, self._step = settled(self.device), dict.fromkeys(PHASES, 0.0)

    def mark(self, phase: str) -> None:
        """All since the last mark was this phase."""
        now = settled(self.device)
        self._step[phase] += now - self._last
        self._last = now

    def end(self) -> None:
        """A step is over."""
        self.mark(LEARN)
        self.steps.append(self._step)
        self._begin()

    def loss(self, loss: LossOf) -> LossOf:
        """The loss, marked."""

        def marked(batch: Any, rng: Any) -> Any:
            self.mark(WAIT)
            found = loss(batch, rng)
            self.mark(REST)
            return found

        return marked

    def call(self, call: Call) -> Call:
        """A call of the network, marked as its role's; the student's own is the one that has a gradient."""

        def marked(x: Any, t: Any, condition: Any, role: str) -> Any:
            self.mark(REST)
            output = call(x, t, condition, role)
            self.mark(TEACHER if role == BASE else CALLS[torch.is_grad_enabled()])
            return output

        return marked

    def backward(self, backward: Callable[..., None]) -> Callable[..., None]:
        """The backward pass, marked."""

        def marked(*args: Any, **more: Any) -> None:
            self.mark(REST)
            backward(*args, **more)
            self.mark(BACKWARD)

        return marked

    def log(self, folder: Path, config: Config, **more: Any) -> RunLog:
        """A log whose bar marks the end of each step."""
        phases = self

        class Marking(RunLog):
            @contextmanager
            def progress(self, done: int, total: int) -> Iterator[Any]:
                with super().progress(done, total) as bar:
                    update = bar.update

                    def marked() -> None:
                        update()
                        phases.end()

                    bar.update = marked
                    yield bar

        return Marking(folder, config, **more)


def time_phases(ours: Ours) -> dict[str, Timed]:
    """Seconds of the phases of our step that took any; the loop is run once more."""
    phases = Phases(ours.run.backbone.device)
    run = replace(ours.run, student=replace(ours.run.student, call=phases.call(ours.run.student.call)))
    bare = ours.accelerator.backward
    ours.accelerator.backward = phases.backward(bare)
    try:
        go(replace(ours, run=run), phases.loss, log=phases.log)
    finally:
        ours.accelerator.backward = bare
    counted = phases.steps[WARM + 1 :]
    found = {name: Timed(tuple(step[name] for step in counted)) for name in PHASES}
    return {name: timed for name, timed in found.items() if any(timed.seconds)}
