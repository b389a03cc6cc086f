"""Every recipe on a real pipeline, as LoRA and in full: trained, saved, reloaded, drawn with; stopped and resumed."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fewstep.common.files import read_json, write_json
from fewstep.common.rng import KeyedRng
from fewstep.common.tensors import digest, load_tensors
from fewstep.distillation import distill as distillation
from fewstep.distillation.config import DistillConfig, resolve
from fewstep.inference.generator import ImageGenerator, load_image_generator
from fewstep.methods.recipes import rows
from fewstep_worlds.plane.settings import resolve_plane
from fewstep_worlds.plane.train import PlaneRun, fetch_of, measure, plane_plan, set_up, train_plane, training_points
from support.interrupt import stopped_in_call

SMALL = [
    "student.rank=2", "student.targets=[to_q,conv1]", "loop.steps=4", "loop.save_every=1", "optim.lr=0.01",
    "data.trajectories=6",
]  # fmt: skip


REGRESSED = [name for name in rows() if not resolve(name).method.matching.weight]
"""Recipes whose loss is a distance; that of distribution matching has the gap of two scores as its gradient alone."""
WITH_A_TARGET = [name for name in REGRESSED if not resolve(name).method.continuous]
"""Recipes whose target can be held; a derivative is the student's own, and its gap is scaled to one length."""


RESUMED = ("tcd", "ctm", "dmd2", "scm")
"""Recipes that the fast tests stop and resume: no other update, a critic's, a fake score's, and a learned weight."""
SLOW = pytest.mark.slow


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


def small_config(recipe: str, kind: str, teacher: Path, overrides: list[str]) -> DistillConfig:
    """Return four steps of a recipe, two of which update the student where its updates are rare."""
    rare = resolve(recipe).method.student_every > 1
    words = [*SMALL, f"student.kind={kind}", f"teacher={teacher}", *(["method.matching.every=2"] if rare else [])]
    return resolve(recipe, None, [*overrides, *words])


def weights(student: Path) -> list[str]:
    """Return the digest of each file of weights."""
    files = sorted((student if student.is_dir() else student.parent).rglob("*.safetensors"))
    return [digest(load_tensors(file)) for file in files]


@pytest.mark.matrix
@pytest.mark.parametrize("word", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("recipe", rows())
def test_a_recipe_trains_and_draws(
    recipe: str,
    kind: str,
    word: str,
    tiny_overrides: list[str],
    tiny_cache: Path,
    teachers: dict[str, Path],
    tmp_path: Path,
) -> None:
    """It draws by its own settings, and no longer what the teacher draws."""
    config, teacher = small_config(recipe, kind, teachers[word], tiny_overrides), teachers[word]
    student = distillation.distill(config, tmp_path / "run", cache=tiny_cache, quiet=True)
    assert len(weights(student)) == {"lora": 1, "full": 3}[kind] + bool(config.method.extra_conditioning)

    image_generator = load_image_generator(student) if kind == "full" else load_image_generator(teacher, student)
    assert image_generator.sampling == config.sampling
    drawn = image_generator.draw(["a red disc"], [3]).astype(float)
    untaught = image_generator.sampling.model_copy(update={"extra_conditioning": ()})
    assert np.abs(drawn - load_image_generator(teacher).draw(["a red disc"], [3], untaught)).max() > 0


@pytest.mark.matrix
@pytest.mark.parametrize("word", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("recipe", [name if name in RESUMED else pytest.param(name, marks=SLOW) for name in rows()])
def test_a_stopped_recipe_ends_where_it_would_have(
    recipe: str,
    kind: str,
    word: str,
    tiny_overrides: list[str],
    tiny_cache: Path,
    teachers: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Resumed from the middle it ends where the uninterrupted run ends, bit for bit."""
    config = small_config(recipe, kind, teachers[word], tiny_overrides)

    def run(name: str) -> Path:
        return distillation.distill(config, tmp_path / name, cache=tiny_cache, quiet=True)

    whole = weights(run("whole"))
    stopped_in_call(monkeypatch, 2 if config.method.student_every > 1 else 4, lambda: run("cut"))
    assert list((tmp_path / "cut").rglob("step-*")), "something was kept"
    assert weights(run("cut")) == whole


@pytest.mark.slow
@pytest.mark.matrix
@pytest.mark.parametrize("path", ["flow", "ve"])
@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("recipe", rows())
def test_a_recipe_on_the_other_paths(
    recipe: str, kind: str, path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the plane: a flow network, and EDM's; stopped and resumed as above, with finite samples at every count."""
    words = [
        f"path={path}", "base=exact", f"student.kind={kind}", "student.rank=4", "width=16", "count=200", "shown=100",
        "steps=[1,4]", "gammas=[0.2]", "loop.steps=8", "loop.batch=16", "loop.save_every=1",
    ]  # fmt: skip
    rare = resolve_plane(recipe).method.student_every > 1  # four of the eight steps then update the student
    config = resolve_plane(recipe, [*words, *(["method.matching.every=2"] if rare else [])])

    def run(name: str) -> PlaneRun:
        return train_plane(config, tmp_path / name, quiet=True)

    whole = run("whole")
    stopped_in_call(monkeypatch, 3 if rare else 6, lambda: run("cut"))
    cut = run("cut")
    assert digest(cut.student.parameters("student")) == digest(whole.student.parameters("student"))
    assert digest(cut.student.parameters("student")) != digest(set_up(config).student.parameters("student"))
    measured = measure(cut)
    assert measure(run("whole")).energy == measured.energy, "read back from its folder"
    assert all(np.isfinite(value) for value in (*measured.energy.values(), measured.to_end, measured.between))


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("vp", ["method.grid=40", "method.grid_start=5", "sampling.grid=40"]),
        ("flow", ["method.grid=48", "method.grid_start=3", "sampling.grid=24"]),
        ("ve", ["method.grid=48", "method.grid_start=12", "sampling.grid=48"]),
    ],
)
def test_a_growing_grid_and_ict_weight_resume(
    path: str, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Consistency training with both of iCT's options: stopped and resumed as above."""
    own = [
        f"path={path}", "base=exact", "width=16", "count=200", "shown=100", "steps=[1,4]", "loop.steps=10",
        "loop.batch=16", "loop.save_every=1", "method.weight=step",
    ]  # fmt: skip
    config = resolve_plane("ct", [*own, *words])
    whole = train_plane(config, tmp_path / "whole", quiet=True)
    stopped_in_call(monkeypatch, 8, lambda: train_plane(config, tmp_path / "cut", quiet=True))
    cut = train_plane(config, tmp_path / "cut", quiet=True)
    assert digest(cut.student.parameters("student")) == digest(whole.student.parameters("student"))
    fixed = train_plane(resolve_plane("ct", [*own, *words, "method.grid_start=null"]), tmp_path / "fixed", quiet=True)
    assert digest(fixed.student.parameters("student")) != digest(whole.student.parameters("student"))


@pytest.mark.slow
@pytest.mark.parametrize("recipe", REGRESSED)
def test_a_recipe_learns_the_exact_jump(recipe: str, tmp_path: Path) -> None:
    """In the plane, the error of the jumps that it trains falls.

    A consistency loss itself need not: the denoiser that a student starts as agrees with its neighbours, and is wrong.
    Critics are left out: what they pull to is the law, not the jump.
    """
    words = [
        "base=exact", "width=32", "count=1000", "shown=500", "steps=[1]", "gammas=[0]", "loop.steps=150",
        "loop.batch=64", "loop.save_every=150", "optim.lr=3e-3", "method.target_decay=0.9",
        "method.adversarial.weight=0",
    ]  # fmt: skip
    config = resolve_plane(recipe, words)
    before, after = measure(set_up(config)), measure(train_plane(config, tmp_path, quiet=True))
    assert after.between < 0.95 * before.between


@pytest.mark.matrix
@pytest.mark.parametrize(("path", "prediction"), [("vp", "eps"), ("vp", "x0"), ("vp", "v"), ("flow", "flow")])
@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("recipe", WITH_A_TARGET)
def test_the_loss_of_one_batch_falls(recipe: str, kind: str, path: str, prediction: str) -> None:
    """For every network output and every trained part, with the recipe's own critic: 60 steps on it, the target held.

    A target that follows may make any loss rise.
    """
    words = [
        f"path={path}", f"prediction={prediction}", f"student.kind={kind}", "base=exact", "width=32", "count=200",
        "method.target=ema", "method.balance=fixed",
    ]  # fmt: skip
    play = set_up(resolve_plane(recipe, words).each_stage()[0])
    update, fetch = plane_plan(play)[0], fetch_of(play, training_points(play))
    optimiser = torch.optim.Adam(update.parameters.values(), lr=1e-3)
    losses = []
    for _ in range(60):
        rng = KeyedRng(0, 0, tuple(range(64)))
        loss = update.loss(fetch(np.arange(64), rng), rng)
        losses.append(float(loss.per_sample.mean()))
        optimiser.zero_grad()
        loss.value.backward()
        optimiser.step()
    assert losses[-1] < losses[0] - 0.1 * abs(losses[0]), "a critic's term may be below 0"


OPTIONS: dict[str, list[str]] = {
    "features": ["method.distance=features"],
    "huber of samples": ["method.distance=huber_norm"],
    "weight eps": ["method.weight=eps"],
    "weight x0": ["method.weight=x0"],
    "weight v of every index": [
        "method.weight=v",
        "method.grid=1000",
        "sampling.grid=1000",
        "method.k=1",
        "loop.steps=40",
    ],
    "heun": ["method.solver=heun", "method.substeps=2"],
    "dpm_2": ["method.solver=dpm_2"],
    "dpmpp_2s": ["method.solver=dpmpp_2s"],
    "all integers": ["method.grid=1000", "method.k=20", "sampling.grid=50"],
    "own points": ["method.grid=[99,299,499,999]", "sampling.grid=[99,299,499,999]"],
    "no guidance": ["method.guidance.convention=none", "data.empty_prompts=0.3"],
    "imagen": ["method.guidance.convention=imagen"],
    "extra w": ["method.extra_conditioning=[w]", "sampling.extra_conditioning=[w]", "sampling.w=5"],
    "extra both": ["method.extra_conditioning=[s,w]", "sampling.extra_conditioning=[s,w]", "sampling.w=5"],
    "moving average": ["method.target=ema"],
    "critic": ["method.adversarial.weight=0.1", "method.adversarial.real=target", "method.adversarial.r1=0.1"],
    "non-saturating critic": [
        *("method.adversarial.weight=0.1", "method.adversarial.real=data", "method.adversarial.noise=0.3"),
        *("method.adversarial.kind=nonsaturating", "method.balance=gradient", "method.adversarial.start=0.5"),
    ],
    "clean end": ["method.end=clean", "sampling.end=clean"],
    "growing grid": ["method.grid_start=25", "method.weight=step"],
    "second order": ["method.jump=second_order", "sampling.jump=second_order", "method.form=eps", "sampling.form=eps"],
}


@pytest.mark.slow
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
    drawn = load_image_generator(tiny_pipeline, student).draw(["a red disc"], [3])
    assert drawn.std() > 0


ALIKE: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "SSS at gamma 0 is DDIM": ({"gamma": 0.0}, {"sampler": "ddim"}),
    "DDIM is Euler in sigma": ({"sampler": "ddim"}, {"sampler": "euler"}),
    "SSS of second order at gamma 0 is DPM-Solver++(2S)": (
        {"gamma": 0.0, "jump": "second_order"},
        {"sampler": "dpmpp_2s"},
    ),
    "and in eps form DPM-Solver-2": (
        {"gamma": 0.0, "jump": "second_order", "form": "eps"},
        {"sampler": "dpm_2"},
    ),
    "SSS at gamma 1 is multistep consistency": ({"gamma": 1.0}, {"sampler": "lcm", "jump": "first_order"}),
    "at gamma 1 both laws are one": ({"gamma": 1.0}, {"gamma": 1.0, "gamma_law": "noise"}),
}


@pytest.fixture(scope="module")
def tcf_student(
    tiny_pipeline: Path, tiny_overrides: list[str], tiny_cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> ImageGenerator:
    config = resolve("tcd", None, [*tiny_overrides, *SMALL, "optim.lr=0.05"])
    student = distillation.distill(config, tmp_path_factory.mktemp("tcf"), cache=tiny_cache, quiet=True)
    return load_image_generator(tiny_pipeline, student)


@pytest.mark.parametrize("claim", ALIKE)
def test_one_tcf_student_under_samplers_that_are_one(claim: str, tcf_student: ImageGenerator) -> None:
    """TCD, section 4.3, through a saved student: what is one on paper draws one picture, and gamma another."""
    own = tcf_student.sampling.model_copy(update={"steps": 8})
    one, other = (
        tcf_student.draw(["a red disc"], [3], own.model_copy(update=changes)).astype(int) for changes in ALIKE[claim]
    )
    assert np.abs(one - other).max() <= 1
    assert np.abs(one - tcf_student.draw(["a red disc"], [3], own).astype(int)).max() > 1


@pytest.mark.parametrize(
    "changes", [{"sampler": "heun"}, {"sampler": "sde_dpmpp_2m"}, {"gamma_law": "noise", "gamma": 0.5}], ids=str
)
def test_samplers_of_their_own(changes: dict[str, Any], tcf_student: ImageGenerator) -> None:
    """They draw from the student, and what nothing else draws; where they have noise, it is the seed's."""
    own = tcf_student.sampling.model_copy(update={"steps": 8})
    changed = own.model_copy(update=changes)
    drawn = tcf_student.draw(["a red disc"] * 2, [3, 3], changed).astype(int)
    assert (drawn[0] == drawn[1]).all()
    for others in ({}, {"sampler": "ddim"}, {"sampler": "dpmpp_2s"}):
        other = tcf_student.draw(["a red disc"], [3], own.model_copy(update=others)).astype(int)
        assert np.abs(drawn[0] - other[0]).max() > 1
