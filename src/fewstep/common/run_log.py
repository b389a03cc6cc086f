"""A run folder while it trains: losses, quality, the newest grid, the best student."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fewstep.common.config import read_yaml
from fewstep.common.errors import UserError
from fewstep.common.files import read_json

ALARMS = "alarms.json"
"""File of the alarms of validations: step, name, value, limit and text of each."""
MOST_POINTS = 400
"""Points of a curve; longer logs are thinned out."""


@dataclass
class Run:
    """What is shown of a run folder.

    Attributes:
        losses, quality: rows of (step, name, value).
        grid: the newest grid of pictures.
        best: figures of the best student.
        alarms: those of the newest validation, one line each.
        rate: seconds a step, over the last log lines.
    """

    folder: Path
    step: int = 0
    steps: int = 0
    rate: float = 0.0
    losses: list[tuple[int, str, float]] = field(default_factory=list)
    quality: list[tuple[int, str, float]] = field(default_factory=list)
    grid: Path | None = None
    best: dict[str, Any] = field(default_factory=dict)
    teacher: str = ""
    alarms: list[str] = field(default_factory=list)

    @property
    def state(self) -> str:
        """The step, the rate, the best student's figures and the alarms in a line."""
        best = "; best: " + ", ".join(f"{name} {value:.4g}" for name, value in self.best.items()) if self.best else ""
        rate = f", {self.rate:.2f} s a step" if self.rate else ""
        alarms = "".join(f"; alarm: {text}" for text in self.alarms)
        return f"step {self.step} of {self.steps}{rate}{best}{alarms}"

    @property
    def students(self) -> list[Path]:
        """Folders of the students that can be drawn with: the best so far, and the finished one."""
        return [place for place in (self.folder / "best", self.folder / "student") if any(place.glob("*.safetensors"))]


def read_run(folder: Path) -> Run:
    """Read a run folder, which another process may be writing to.

    Raises:
        UserError: no run folder.
    """
    if not (folder / "config.yaml").is_file():
        raise UserError(f"run = {str(folder)!r} is no run folder; it holds no config.yaml", field="run")
    config: Any = read_yaml(folder / "config.yaml")
    run = Run(folder, steps=int((config.get("loop") or {}).get("steps") or 0), teacher=str(config.get("teacher") or ""))
    times: list[tuple[int, float]] = []
    for line in log_lines(folder / "log.jsonl"):
        run.step = step = int(line["step"])
        figures = {name: value for name, value in line.items() if isinstance(value, int | float)}
        run.losses += [(step, name, value) for name, value in figures.items() if name.endswith("/loss")]
        named = [(name.partition("/")[2], value) for name, value in figures.items() if name.startswith("validation/")]
        run.quality += [(step, name, value) for name, value in named]
        if not named and "time" in figures:
            times.append((step, float(figures["time"])))
    if len(times) > 1 and times[-1][0] > (begun := times[max(0, len(times) - 10)])[0]:
        run.rate = (times[-1][1] - begun[1]) / (times[-1][0] - begun[0])
    run.losses = run.losses[:: -(1 + len(run.losses) // MOST_POINTS)][::-1]  # the newest stays
    run.grid = max((folder / "grids").glob("step-*.webp"), default=None)
    with suppress(UserError):
        run.best = dict(read_json(folder / "best" / "figures.json"))
    with suppress(UserError):
        newest = max((step for step, _, _ in run.quality), default=0)
        run.alarms = [
            f"{each['name']}: {each['text']}" for each in read_json(folder / ALARMS) if each["step"] == newest
        ]
    return run


def log_lines(file: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of a log; one that is still being written is skipped."""
    with suppress(OSError):
        for line in file.read_text(encoding="utf-8").splitlines():
            with suppress(ValueError):
                found = json.loads(line)
                if isinstance(found, dict) and isinstance(found.get("step"), int):
                    yield found
