"""Every recipe on a real pipeline, as LoRA and in full: trained, stopped, resumed, saved, reloaded, drawn with."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fewstep import distillation, plan
from fewstep.drawing import load_artist
from fewstep.files import read_json, write_json
from fewstep.plane.play import Play, lay_out, measure, train_play
from fewstep.plane.settings import resolve_play
from fewstep.recipes import names
from fewstep.settings import resolve
from fewstep.tensors import digest, load_tensors

SMALL = [
    "student.rank=2", "student.targets=[to_q,conv1]", "loop.steps=4", "loop.save_every=1", "optim.lr=0.01",
    "data.trajectories=6",
]  # fmt: skip


class StopError(Exception):
    """The process was killed here."""


@pytest.fixture(scope="session")
def teachers(tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tiny pipeline as a network of each kind, by its scheduler's word."""
    folder = tmp_path_factory.mktemp("teachers")
    found = {}
    for word in ("epsilon", "sample", "v_prediction"):
        shutil.copytree(tiny_pipeline, folder / word)
        file = folder / word / "scheduler" / "scheduler_config.json"
        write_json(file, {**read_json(file), "prediction_type": word})
        found[word] = folder / word
    return found


def stopped_in_call(monkeypatch: pytest.MonkeyPatch, last: int, run: Callable[[], object]) -> None:
    """Run, and stop in the given call of the student's loss."""
    calls = 0
    plain = plan.consistency_loss

    def stopping(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == last:
            raise StopError
        return plain(*args)

    with monkeypatch.context() as patched:
        patched.setattr(plan, "consistency_loss", stopping)
        with pytest.raises(StopError):
            run()


@pytest.mark.parametrize("word", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("recipe", names())
def test_a_recipe_from_end_to_end(
    recipe: str,
    kind: str,
    word: str,
    tiny_overrides: list[str],
    tiny_cache: Path,
    teachers: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Resumed from the middle it ends where the uninterrupted run ends, bit for bit; and it draws."""
    teacher = teachers[word]
    config = resolve(recipe, None, [*tiny_overrides, *SMALL, f"student.kind={kind}", f"teacher={teacher}"])

    def run(name: str) -> Path:
        return distillation.distill(config, tmp_path / name, cache=tiny_cache, quiet=True)

    def weights(student: Path) -> list[str]:
        files = sorted((student if student.is_dir() else student.parent).rglob("*.safetensors"))
        return [digest(load_tensors(file)) for file in files]

    whole = weights(run("whole"))
    stopped_in_call(monkeypatch, 4, lambda: run("cut"))
    assert list((tmp_path / "cut").rglob("step-*")), "something was kept"
    student = run("cut")
    assert weights(student) == whole
    assert len(whole) == {"lora": 1, "full": 3}[kind] + bool(config.method.told)

    artist = load_artist(student) if kind == "full" else load_artist(teacher, student)
    assert artist.sampling == config.sampling
    drawn = artist.draw(["a red disc"], [3]).astype(float)
    untaught = artist.sampling.model_copy(update={"told": ()})
    assert np.abs(drawn - load_artist(teacher).draw(["a red disc"], [3], untaught)).max() > 0


@pytest.mark.parametrize("path", ["flow", "ve"])
@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("recipe", names())
def test_a_recipe_on_the_other_paths(
    recipe: str, kind: str, path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the plane: a flow network, and EDM's; stopped and resumed as above, with finite samples at every count."""
    words = [
        f"path={path}", f"student.kind={kind}", "student.rank=4", "width=16", "count=200", "shown=100", "steps=[1,4]",
        "gammas=[0.2]", "loop.steps=8", "loop.batch=16", "loop.save_every=1",
    ]  # fmt: skip
    config = resolve_play(recipe, words)

    def run(name: str) -> Play:
        return train_play(config, tmp_path / name, quiet=True)

    whole = run("whole")
    stopped_in_call(monkeypatch, 6, lambda: run("cut"))
    cut = run("cut")
    assert digest(cut.student.parameters("student")) == digest(whole.student.parameters("student"))
    assert digest(cut.student.parameters("student")) != digest(lay_out(config).student.parameters("student"))
    measured = measure(cut)
    assert all(np.isfinite(value) for value in (*measured.energy.values(), measured.to_end, measured.between))
