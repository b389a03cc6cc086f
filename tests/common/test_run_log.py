"""A run folder as another process reads it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fewstep.common.errors import UserError
from fewstep.common.run_log import MOST_POINTS, read_run


def run_folder(place: Path, lines: list[dict[str, object]], tail: str = "") -> Path:
    place.mkdir()
    (place / "config.yaml").write_text("loop: {steps: 100}\nteacher: models/sd\n", encoding="utf-8")
    (place / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + tail, encoding="utf-8")
    return place


def test_curves_rate_grid_and_best(tmp_path: Path) -> None:
    lines = [
        {"step": step, "time": 10.0 + 2 * step, "student/loss": 1 / step, "student/grad_norm": 1.0}
        for step in (1, 3, 5)
    ]
    watched = {"step": 5, "time": 99.0, "validation/kid": 0.25, "validation/to_teacher": 0.5}
    place = run_folder(tmp_path / "run", [*lines, watched], tail='{"step": 6, "stud')
    run = read_run(place)
    assert (run.step, run.steps, run.rate) == (5, 100, 2.0)
    assert run.losses == [(1, "student/loss", 1.0), (3, "student/loss", 1 / 3), (5, "student/loss", 0.2)]
    assert run.quality == [(5, "kid", 0.25), (5, "to_teacher", 0.5)]
    assert run.grid is None
    assert run.best == {}
    for step in (20, 100):
        (place / "grids").mkdir(exist_ok=True)
        (place / "grids" / f"step-{step:08d}.webp").touch()
    (place / "best").mkdir()
    (place / "best" / "figures.json").write_text('{"step": 5, "kid": 0.25}', encoding="utf-8")
    run = read_run(place)
    assert run.grid == place / "grids" / "step-00000100.webp"
    assert run.best == {"step": 5, "kid": 0.25}
    assert [each in run.state for each in ("5 of 100", "2.00 s", "kid 0.25")] == [True] * 3


def test_a_run_that_has_just_begun(tmp_path: Path) -> None:
    run = read_run(run_folder(tmp_path / "run", []))
    assert (run.step, run.rate, run.losses) == (0, 0.0, [])
    with pytest.raises(UserError) as error:
        read_run(tmp_path)
    assert error.value.field == "run"


def test_long_logs_are_thinned_out_and_keep_their_end(tmp_path: Path) -> None:
    lines: list[dict[str, object]] = [
        {"step": step, "loss/loss": float(step)} for step in range(1, 5 * MOST_POINTS + 4)
    ]
    losses = read_run(run_folder(tmp_path / "run", lines)).losses
    assert len(losses) <= MOST_POINTS + 1
    assert losses[-1][0] == len(lines)
