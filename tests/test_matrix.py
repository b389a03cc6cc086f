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
        f"path={path}", "base=exact", f"student.kind={kind}", "student.rank=4", "width=16", "count=200", "shown=100",
        "steps=[1,4]", "gammas=[0.2]", "loop.steps=8", "loop.batch=16", "loop.save_every=1",
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


@pytest.mark.parametrize("recipe", names())
def test_a_recipe_learns_the_exact_jump(recipe: str, tmp_path: Path) -> None:
    """In the plane, the error of the jumps that it trains falls.

    A consistency loss itself need not: the denoiser that a student starts as agrees with its neighbours, and is wrong.
    """
    words = [
        "base=exact", "width=32", "count=1000", "shown=500", "steps=[1]", "gammas=[0]", "loop.steps=150",
        "loop.batch=64", "loop.save_every=150", "optim.lr=3e-3", "method.adversarial.weight=0",
        "method.target_decay=0.9",
    ]  # fmt: skip
    config = resolve_play(recipe, words)
    before, after = measure(lay_out(config)), measure(train_play(config, tmp_path, quiet=True))
    assert after.between < 0.95 * before.between


OPTIONS: dict[str, list[str]] = {
    "features": ["method.distance=features"],
    "huber of samples": ["method.distance=huber_norm"],
    "weight eps": ["method.weight=eps"],
    "weight x0": ["method.weight=x0"],
    "heun": ["method.solver=heun", "method.substeps=2"],
    "dpm_2": ["method.solver=dpm_2"],
    "dpmpp_2s": ["method.solver=dpmpp_2s"],
    "all integers": ["method.grid=1000", "method.k=20", "sampling.grid=50"],
    "own points": ["method.grid=[99,299,499,999]", "sampling.grid=[99,299,499,999]"],
    "no guidance": ["method.guidance.convention=none", "data.empty_prompts=0.3"],
    "imagen": ["method.guidance.convention=imagen"],
    "told w": ["method.told=[w]", "sampling.told=[w]", "sampling.w=5"],
    "told both": ["method.told=[s,w]", "sampling.told=[s,w]", "sampling.w=5"],
    "moving average": ["method.target=ema"],
    "critic": ["method.adversarial.weight=0.1", "method.adversarial.real=target", "method.adversarial.r1=0.1"],
    "non-saturating critic": [
        *("method.adversarial.weight=0.1", "method.adversarial.real=data", "method.adversarial.noise=0.3"),
        *("method.adversarial.kind=nonsaturating", "method.balance=gradient"),
    ],
    "clean end": ["method.end=clean", "sampling.end=clean"],
    "second order": ["method.jump=second_order", "sampling.jump=second_order", "method.form=eps", "sampling.form=eps"],
}


@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_goes_from_end_to_end(
    option: str, tiny_overrides: list[str], tiny_cache: Path, tiny_pipeline: Path, tmp_path: Path
) -> None:
    """Options hold in any recipe: here in TCD, on a real pipeline."""
    config = resolve("tcd", None, [*tiny_overrides, *SMALL, *OPTIONS[option]])
    student = distillation.distill(config, tmp_path, cache=tiny_cache, quiet=True)
    moved = load_tensors(student)
    assert all(bool(value.any()) for name, value in moved.items() if "lora_B" in name)
    assert all(bool(value.isfinite().all()) for value in moved.values())
    drawn = load_artist(tiny_pipeline, student).draw(["a red disc"], [3])
    assert drawn.std() > 0


@pytest.mark.parametrize(
    "changes",
    [
        {"sampler": "ddim"},
        {"sampler": "euler"},
        {"sampler": "heun"},
        {"sampler": "dpm_2", "end": "index0"},
        {"sampler": "dpmpp_2s", "end": "index0"},
        {"sampler": "sde_dpmpp_2m"},
        {"jump": "second_order", "gamma": 0.2},
        {"gamma_law": "noise", "gamma": 0.5},
    ],
    ids=lambda changes: " ".join(map(str, changes.values())),
)
def test_a_tcf_student_under_every_sampler(changes: dict[str, Any], teachers: dict[str, Path]) -> None:
    """As TCD's section 4.3 says it can be: the same network under ordinary solvers, and under the other laws of SSS."""
    artist = load_artist(teachers["epsilon"])
    own = artist.sampling.model_copy(update={"sampler": "sss", "steps": 8, "omega": 0.0, "spacing": "grid", **changes})
    drawn = artist.draw(["a red disc"], [3], own)
    assert (drawn == artist.draw(["a red disc"], [3], own)).all(), "repeatable, noise included"
    assert drawn.std() > 0
