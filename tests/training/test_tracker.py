"""Figures and grids of a run in a tracker."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fewstep.common.errors import UserError
from fewstep.training.config import LoopConfig
from fewstep.training.run_folder import RunLog
from fewstep.training.tracker import Tracker, check_tracker
from support.small_runs import Settings

GRID = Image.new("RGB", (30, 20), (200, 10, 60))


def entries(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder / "tensorboard"))
    found.Reload()
    return found


def test_tensorboard_gets_figures_and_grids_and_purges_steps_after_a_checkpoint(tmp_path: Path) -> None:
    for steps in ((1, 2, 3), (2, 3)):  # the second run goes on from step 1
        tracker = Tracker("tensorboard", tmp_path, {})
        for step in steps:
            tracker.figures(step, {"w/loss": step / len(steps)})
        tracker.picture(3, "validation/grid", GRID)
        tracker.close()
    found = entries(tmp_path)
    assert [(e.step, round(e.value, 3)) for e in found.Scalars("w/loss")] == [(1, 0.333), (2, 1.0), (3, 1.5)]
    image = found.Images("validation/grid")[-1]
    assert (image.step, image.width, image.height) == (3, 30, 20)


class FakeRun:
    def __init__(self, options: dict[str, Any]) -> None:
        self.options = options
        self.entries: list[tuple[int, dict[str, Any]]] = []
        self.finished = False

    def log(self, values: dict[str, Any], step: int, **_: Any) -> None:
        self.entries.append((step, values))

    def finish(self) -> None:
        self.finished = True


def fake(kind: str, monkeypatch: pytest.MonkeyPatch) -> list[FakeRun]:
    runs: list[FakeRun] = []
    module = ModuleType(kind)

    def init(**options: Any) -> FakeRun:
        runs.append(FakeRun(options))
        return runs[-1]

    class Settings(dict[str, Any]):
        def update(self, values: dict[str, Any], allow_val_change: bool) -> None:  # type: ignore[override]
            runs[-1].options["config"] = values

    vars(module).update(init=init, config=Settings(), Image=lambda pixels: np.asarray(pixels).shape)
    monkeypatch.setitem(sys.modules, kind, module)
    return runs


@pytest.mark.parametrize("kind", ["wandb", "trackio"])
def test_a_resumed_run_goes_on_in_the_same_run_of_a_service(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = fake(kind, monkeypatch)
    for step in (1, 2):
        tracker = Tracker(kind, tmp_path, {"loop": {"steps": 2}})
        tracker.figures(step, {"w/loss": 0.5})
        tracker.picture(step, "validation/grid", GRID)
        tracker.close()
    first, second = runs
    assert first.options == second.options
    assert first.options["name"] == tmp_path.name
    assert first.options["config"] == {"loop": {"steps": 2}}
    assert first.entries[0] == (1, {"w/loss": 0.5})
    grid = first.entries[1][1]["validation/grid"]
    assert grid == ([(20, 30, 3)] if kind == "wandb" else (20, 30, 3))
    assert first.finished


def test_no_tracker_writes_nothing(tmp_path: Path) -> None:
    tracker = Tracker("none", tmp_path, {})
    tracker.figures(1, {"w/loss": 0.5})
    tracker.picture(1, "validation/grid", GRID)
    tracker.close()
    assert not list(tmp_path.iterdir())


def test_a_missing_package_is_refused_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"\[trackio\]") as refused:
        check_tracker("trackio")
    assert refused.value.field == "loop.tracker"
    check_tracker("tensorboard")


def test_a_callback_gets_what_the_log_holds(tmp_path: Path) -> None:
    got: list[tuple[int, dict[str, float]]] = []
    with RunLog(
        tmp_path,
        Settings(loop=LoopConfig()),
        title="x",
        quiet=True,
        callback=lambda step, found: got.append((step, dict(found))),
    ) as log:
        log.figures(1, {"w/loss": 0.5})
        log.figures(2, {"validation/kid": 0.25})
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert got == [(1, {"w/loss": 0.5}), (2, {"validation/kid": 0.25})]
    assert [(line["step"], line.get("w/loss"), line.get("validation/kid")) for line in lines] == [
        (1, 0.5, None),
        (2, None, 0.25),
    ]
