"""Demo, benchmark, family and Chinese prompts, from end to end on a tiny teacher in a small world of sticker scenes."""

from __future__ import annotations

import json
import shlex
import shutil
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fewstep.common.errors import UserError
from fewstep.diffusion.config import Sampling
from fewstep.distillation.config import resolve
from fewstep.evaluation.evaluate import TeacherPictures, evaluate_pictures
from fewstep.evaluation.features import Features
from fewstep.evaluation.metric import Array, Pictures
from fewstep.inference.generator import load_image_generator
from fewstep.methods.cost import step_cost
from fewstep.methods.recipes import rows
from fewstep_worlds.common import location
from fewstep_worlds.common.tables import best_by_rank
from fewstep_worlds.report.claims import claims
from fewstep_worlds.report.results import load_results
from fewstep_worlds.stickers import metrics, world
from fewstep_worlds.stickers.dataset import draw_scenes
from fewstep_worlds.studies import api, benchmark, comparison, demo, family, sheets
from fewstep_worlds.studies.settings import BenchmarkConfig, FamilyConfig
from fewstep_worlds.studies.sheets import spread_rows
from fewstep_worlds.studies.students import train_student
from support.pooled import Pooled
from support.random_lora import random_lora
from support.sticker_world import PROMPTS

TEACHER_STEPS = 6
"""Of its teacher, which is drawn often."""
CATEGORIES = ("single", "counting", "two", "position", "background", "style")


@pytest.mark.slow
def test_the_demo_makes_students_a_table_and_a_page_and_goes_on_where_it_was(
    small_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "demo"
    small = ["steps=2", "batch=2", "shown=6"]
    assert demo.STEPS == (2, 4, 8)
    assert demo.TEACHER_STEPS == 50
    monkeypatch.setattr(demo, "STEPS", (2, 4))
    monkeypatch.setattr(demo, "TEACHER_STEPS", TEACHER_STEPS)
    shown: list[int] = []
    monkeypatch.setattr(sheets, "spread_rows", lambda *given: shown.extend(spread_rows(*given)) or shown)
    report = api.demo(out=out, overrides=small)
    results = load_results(out / "results.json")
    rows = {(row.method, row.steps): row for row in results.rows}
    methods = ("DDIM", "DPM-Solver++(2S)", "LCM", "TCD")
    both = {(method, steps) for method in methods for steps in (2, 4)}
    assert set(rows) == {("teacher", TEACHER_STEPS), *both, ("DDIM", 1), ("DPM-Solver++(2S)", 1)}
    assert all(len(scores) == PROMPTS for row in rows.values() for scores in row.scores.values())
    costs = {method: rows[method, 2].nfe for method in methods}
    assert costs == {"DDIM": 4, "DPM-Solver++(2S)": 8, "LCM": 2, "TCD": 2}
    assert rows["DPM-Solver++(2S)", 1].nfe == 4
    assert rows["TCD", 4].figures != rows["LCM", 4].figures
    assert results.of("prompt") == ["scene accuracy"]
    assert results.of("category") == [f"scene accuracy, {category}" for category in CATEGORIES]
    for category, row in zip(CATEGORIES, shown, strict=True):
        assert metrics.in_category(category, metrics.claim_of(results.prompts[row]))
    page = report.read_text(encoding="utf-8")
    assert str(out / "tcd" / "student") in page
    assert "http://" not in page.replace("http://www.w3.org", "")

    student = out / "tcd" / "student" / "pytorch_lora_weights.safetensors"
    before = student.read_bytes()
    monkeypatch.setattr("fewstep_worlds.studies.comparison.PictureStore.pictures", forbidden_after_grid(out))
    again = api.demo(out=out, overrides=small)
    assert again == report
    assert student.read_bytes() == before
    assert load_results(out / "results.json").rows == results.rows


def forbidden_after_grid(out: Path) -> Any:
    """Pictures of a finished demo come from its folder: nothing is drawn anew."""
    from fewstep_worlds.studies.comparison import PictureStore

    plain = PictureStore.pictures

    def kept(self: PictureStore, entry: Any) -> np.ndarray:
        assert (self.folder / f"{self.key(entry)}.safetensors").is_file()
        return plain(self, entry)

    return kept


@pytest.mark.slow
def test_the_benchmark_chooses_measures_and_goes_on_where_it_was(
    small_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every stage, small: rates, guidance and gammas are chosen, two seeds measured, tables and page written."""
    monkeypatch.setattr(benchmark, "STEPS", (2, 4))
    monkeypatch.setattr(benchmark, "TEACHER_STEPS", TEACHER_STEPS)
    monkeypatch.setattr(benchmark, "GAMMAS", (0.0, 0.2, 1.0))
    monkeypatch.setattr(comparison.PictureStore.noises, "__defaults__", (4, 3))
    out = tmp_path / "benchmark"
    small = ["steps=2", "batch=2", "rates=[1e-3, 3e-2]", "seeds=[0, 1]", "omegas=[1, 2]", "shown=3"]
    report = api.benchmark(out=out, overrides=small)
    results = load_results(out / "results.json")
    chosen = {file.stem: json.loads(file.read_text()) for file in out.glob("*-*.json")}
    assert set(chosen) == {"rate-lcm", "rate-tcd", "rate-tcd-2", "rate-tcd-s", "omega-teacher", "gamma-2", "gamma-4"}
    for record in chosen.values():
        assert record["chosen"] == best_by_rank(record["kid"])
        assert record["n"] == PROMPTS
    students = {path.name for path in (out / "students").iterdir()}
    assert {f"{recipe}-{rate:g}-0" for recipe in benchmark.RECIPES for rate in (1e-3, 3e-2)} < students
    rates = {recipe: float(chosen[f"rate-{recipe}"]["chosen"]) for recipe in benchmark.RECIPES}
    assert {name for name in students if name.endswith("-1")} == {f"{r}-{rate:g}-1" for r, rate in rates.items()}

    rows = {(row.method, row.steps, row.gamma, row.omega, row.seed): row for row in results.rows}
    tuned = {steps: float(chosen[f"gamma-{steps}"]["chosen"]) for steps in (2, 4)}
    for seed in (0, 1):
        assert ("teacher", TEACHER_STEPS, None, 2.0, seed) in rows
        for steps in (2, 4):
            assert ("TCD", steps, 0.2, None, seed) in rows
            assert ("TCD, tuned gamma", steps, tuned[steps], None, seed) in rows
        assert ("TCF(S+)", 4, 0.2, None, seed) in rows
        assert {steps for method, steps, *_, own in rows if (method, own) == ("TCF(2)", seed)} == {2, 4}
    assert {gamma for method, _, gamma, _, _ in rows if method == "TCD, gamma sweep"} == {0.0, 0.2, 1.0}
    assert rows["TCD", 4, 0.2, None, 0].figures == {
        **rows["TCD, gamma sweep", 4, 0.2, None, 0].figures,
        "diversity-Lite0": rows["TCD", 4, 0.2, None, 0].figures["diversity-Lite0"],
    }, "the same student, gamma and noise"
    assert rows["TCD", 4, 0.2, None, 0].scores != rows["TCD", 4, 0.2, None, 1].scores
    teacher = rows["teacher", TEACHER_STEPS, None, 2.0, 0]
    assert "to teacher: pixels" not in teacher.figures
    assert "KID-Lite0 (to teacher)" in teacher.figures, "what a perfect student would get"
    assert "| TCD |" in (out / "table.md").read_text().replace("**", "")
    assert len((out / "claims.md").read_text().splitlines()) == 2 + len(claims(results))
    assert (out / "gamma.webp").stat().st_size > 1000
    page = report.read_bytes()

    monkeypatch.setattr("fewstep_worlds.studies.comparison.PictureStore.pictures", forbidden_after_grid(out))
    assert api.benchmark(out=out, overrides=small).read_bytes() == page
    assert load_results(out / "results.json").rows == results.rows


def test_the_demo_names_missing_parts_before_it_trains(small_world: Path, tmp_path: Path) -> None:
    shutil.rmtree(small_world / "reader")
    with pytest.raises(UserError, match="reader"):
        api.demo(out=tmp_path / "demo", overrides=["steps=2", "batch=2"])
    assert not (tmp_path / "demo" / "lcm").exists()


@pytest.mark.slow
def test_a_longer_student_does_not_resume_a_finished_one(small_world: Path, tmp_path: Path) -> None:
    """Under a cosine schedule the finished steps had other learning rates."""
    with (small_world / "distill.yaml").open("a") as stream:
        stream.write("optim: {decay: cosine}\n")
    place = (tmp_path / "lcm", tmp_path / "cache")
    settings: dict[str, Any] = {"batch": 2, "lr": 1e-3, "seed": 0, "save_every": 2}
    train_student("lcm", *place, steps=2, **settings)
    with pytest.raises(UserError, match=r"loop\.steps = 2"):
        train_student("lcm", *place, steps=3, **settings)


@pytest.mark.parametrize(
    ("sampler", "omega", "steps", "nfe_a_step"),
    [
        ("ddim", 2.0, [1, 2, 4, 8, 10, 20], 2),
        ("dpmpp_2s", 2.0, [1, 2, 4, 5, 8, 20], 4),
        ("ddim", 0.0, [2, 4, 8, 20], 1),
        ("sss", 0.0, [2, 4, 8, 20], 1),
    ],
)
def test_entries_have_each_count_of_evaluations_and_of_steps(
    sampler: Any, omega: float, steps: list[int], nfe_a_step: int
) -> None:
    entries = comparison.entries_at((2, 4, 8, 20), comparison.Entry("m", Sampling(sampler=sampler, omega=omega)))
    assert [entry.steps for entry in entries] == steps
    assert [entry.count("nfe") for entry in entries] == [nfe_a_step * n for n in steps]
    calls = nfe_a_step // 2 if omega else nfe_a_step
    assert [entry.sampling.steps for entry in entries] == [calls * n for n in steps]


def test_figures_are_those_of_the_worlds_suite(small_world: Path, tmp_path: Path) -> None:
    prompts = world.read_prompts("benchmark")
    study = comparison.Comparison(prompts, tmp_path / "study")
    pictures = draw_scenes(7, range(PROMPTS))
    row = study.measured(comparison.teacher_entry(2.0, 4, 0), pictures, TeacherPictures())
    suite = world.suite(prompts, 0, Features(Pooled(), tmp_path / "other"))
    assert row.figures == evaluate_pictures(pictures, prompts, suite.metrics, suite.reference)
    assert {"scene accuracy", "scene accuracy, counting", "KID-Lite0"} < row.figures.keys()
    assert study.suite.real_diversity == suite.real_diversity


def test_shown_prompts_come_from_each_category_in_turn() -> None:
    def metric(name: str, group: str, own: list[int]) -> Any:
        identity = SimpleNamespace(name=name, group=group)
        return SimpleNamespace(
            identity=identity, features=lambda pictures, prompts: np.where(np.isin(np.arange(8), own), 1.0, np.nan)
        )

    categories = [metric("single", "category", [0, 1, 2]), metric("two", "category", [2, 6])]
    store = SimpleNamespace(prompts=[f"prompt {i}" for i in range(8)])
    study: Any = SimpleNamespace(store=store, metrics=[metric("accuracy", "prompt", []), *categories])
    assert spread_rows(study, np.zeros(8), 4) == [0, 2, 1, 6]
    study.metrics = study.metrics[:1]
    assert spread_rows(study, np.zeros(8), 3) == [0, 1, 2]


def test_a_choice_is_not_ruled_by_the_column_with_the_largest_figures() -> None:
    kids = {"a": [1.00, 0.030, 0.010, 0.012], "b": [1.05, 0.010, 0.004, 0.003], "c": [0.99, 0.050, 0.040, 0.050]}
    assert best_by_rank(kids) == "b"
    assert best_by_rank({"x": [0.2], "y": [0.1]}) == "y"


@pytest.mark.parametrize(
    ("override", "field"),
    [("seeds=[]", "seeds"), ("seeds=[0,0]", "seeds"), ("seeds=[99]", "seeds.0"), ("rates=[0]", "rates.0")],
)
def test_benchmark_settings_that_would_fail_after_hours_are_refused_at_once(
    override: str, field: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as error:
        api.benchmark(out=tmp_path / "b", overrides=[override])
    assert error.value.field == field
    assert not (tmp_path / "b").exists()
    assert json.loads(BenchmarkConfig().model_dump_json())["seeds"] == [0, 1, 2]


@pytest.mark.slow
def test_the_family_spends_alike_and_measures_every_recipe_and_sampler(
    small_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(family, "STEPS", (1, 2, 4))
    monkeypatch.setattr(family, "SAMPLER_STEPS", (4,))
    monkeypatch.setattr(family, "TEACHER_STEPS", TEACHER_STEPS)
    out = tmp_path / "family"
    words = ["recipes=[tcd, tcd-2, ct, kd]", "evaluations=5000", "batch=40"]
    tables = api.family(out=out, overrides=words)
    rows = load_results(out / "results.json").rows
    found = {(row.method, row.steps) for row in rows}
    both = ("tcd", "kd", "ct", "ct, guided")
    assert found == {
        ("teacher", TEACHER_STEPS), *((name, steps) for name in ("tcd-2", *both) for steps in (1, 2, 4))
    }  # fmt: skip
    costs = {method: {row.nfe_a_step for row in rows if row.method == method} for method, _ in found}
    assert costs == {"teacher": {2}, "tcd": {1}, "tcd-2": {2}, "kd": {1}, "ct": {1}, "ct, guided": {2}}
    by = {(row.method, row.steps): row for row in rows}
    assert by["ct", 4].figures != by["ct, guided", 4].figures
    sampled = {row.method: row for row in load_results(out / "samplers.json").rows}
    assert sampled.keys() == {"teacher", *family.SAMPLERS}
    assert sampled["SSS, gamma .3"].figures == by["tcd", 4].figures, "its own sampler"
    assert sampled["SSS, gamma .3"].figures != sampled["SSS of second order, gamma .3"].figures
    assert sampled["DDIM"].scores != sampled["SDE-DPM-Solver++(2M)"].scores
    text = tables.read_text()
    assert "| kd | 20 | 3 | 4900 |" in text, "25 guided trajectories of 50 points, and 20 steps of 40"
    assert "| tcd | 20 | 6 | 4800 |" in text
    assert f"fewstep family --out {out} -s 'recipes=[tcd, tcd-2, ct, kd]' -s evaluations=5000 -s batch=40" in text
    monkeypatch.setattr("fewstep_worlds.studies.comparison.PictureStore.pictures", forbidden_after_grid(out))
    assert api.family(out=out, overrides=words).read_text() == text


@pytest.mark.parametrize("recipe", rows())
def test_each_recipe_gets_the_same_budget_and_a_command_that_repeats_it(recipe: str) -> None:
    share = family.share_of_budget(FamilyConfig(), recipe)
    spent = share.config.loop.steps * step_cost(share.config.method) * 64
    if share.config.method.start == "trajectory":
        spent += share.config.data.trajectories * 2 * 50
    assert share.evaluations == pytest.approx(spent, abs=1)
    assert 0.98 * FamilyConfig().evaluations < spent <= FamilyConfig().evaluations
    words = shlex.split(share.command(recipe, Path("runs/x")))
    changes = [word for flag, word in pairwise(words) if flag == "-s"]
    assert resolve(recipe, location.root() / "distill.yaml", changes) == share.config


def test_a_budget_that_pays_for_no_step_is_refused(tmp_path: Path) -> None:
    for field, words in (
        ("evaluations", ["recipes=[ctm]", "evaluations=5000", "batch=1000"]),
        ("recipes", ["recipes=[lcmm]"]),
    ):
        with pytest.raises(UserError) as error:
            api.family(out=tmp_path / "no", overrides=words)
        assert error.value.field == field


# ---------------------------------------------------------------------------------------------------- Chinese prompts


@pytest.mark.slow
def test_chinese_prompts_are_drawn_beside_english_ones(
    small_world: Path, tiny_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scores are those of pictures from the same noise, by the adapter and by the teacher's text encoder."""

    def brightness(self: Any, pictures: Pictures, prompts: Any) -> Array:
        return pictures.mean((1, 2, 3))

    monkeypatch.setattr(metrics.SceneAccuracy, "features", brightness)
    lora = random_lora(tiny_pipeline, small_world / "students" / "tcd")
    training = ["training.loop.steps=2", "training.loop.batch=4", "training.width=16", "training.layers=1"]
    words = ["prompts=20", "steps=2", "teacher_steps=2", "shown=3", *training]
    out = tmp_path / "chinese"
    table = api.chinese(out=out, overrides=words)
    lines = json.loads((out / "chinese.json").read_text(encoding="utf-8"))["lines"]
    sets = world.held_out_pairs(20)
    assert [(line["prompts"], line["network"]) for line in lines] == [
        (name, network) for name in sets for network in ("student", "teacher")
    ]
    pairs = sets[lines[0]["prompts"]]
    student = load_image_generator(tiny_pipeline, lora)
    sampling = student.sampling.model_copy(update={"steps": 2})
    drawn = student.draw([pair.target for pair in pairs], range(20), sampling)
    assert lines[0]["english"]["value"] == pytest.approx(drawn.mean(), rel=0.01)  # networks there may be in bf16
    for line in lines:
        english, ratio = line["english"]["value"], line["ratio"]
        assert line["chinese"]["value"] != english
        assert ratio["value"] == pytest.approx(line["chinese"]["value"] / english)
        assert ratio["low"] < ratio["value"] < ratio["high"]
        assert line["english"]["n"] == line["chinese"]["n"] == 20
    before = table.read_bytes()
    monkeypatch.setattr("fewstep_worlds.studies.comparison.PictureStore.pictures", forbidden_after_grid(out))
    assert api.chinese(out=out, overrides=words).read_bytes() == before
