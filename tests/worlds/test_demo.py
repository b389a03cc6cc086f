"""The demo from end to end on a tiny teacher in a small world: stages, resume, the page's text."""

from __future__ import annotations

import json
import os
import shlex
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fewstep.common.errors import UserError
from fewstep.diffusion.config import Sampling
from fewstep.distillation.config import resolve
from fewstep.evaluation.evaluate import TeacherPictures, evaluate_pictures
from fewstep.evaluation.features import Features
from fewstep.methods.cost import step_cost
from fewstep.methods.recipes import rows
from fewstep_worlds.common import location
from fewstep_worlds.emoji8 import api as emoji8_api
from fewstep_worlds.emoji8 import dataset as emoji8
from fewstep_worlds.emoji8 import metrics as measures
from fewstep_worlds.emoji8.config import ScorerConfig
from fewstep_worlds.emoji8.scorers.agreement import save_scorer
from fewstep_worlds.emoji8.scorers.network import Scorer
from fewstep_worlds.emoji8.scorers.text import BertStates
from fewstep_worlds.register import bundled
from fewstep_worlds.report.results import load_results
from fewstep_worlds.studies import api, benchmark, comparison, demo, family
from fewstep_worlds.studies.benchmark import best_by_rank
from fewstep_worlds.studies.settings import BenchmarkConfig, FamilyConfig
from fewstep_worlds.studies.sheets import spread_rows
from fewstep_worlds.studies.students import train_student
from support.pooled import Pooled

PICTURES = 160
"""Training pictures of the small world."""
TEACHER_STEPS = 6
"""Of its teacher, which is drawn often."""


@pytest.fixture
def small_world(tiny_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The bundled world with a tiny random teacher and scorer, and few pictures."""
    place = tmp_path / "world"
    place.mkdir()
    (place / "emoji8").symlink_to(location.root() / "emoji8")
    (place / "teacher").symlink_to(tiny_pipeline)
    (place / "distill.yaml").write_text(
        "method: {guidance: {low: 1.0, high: 3.0}}\nstudent: {rank: 2, targets: [to_q, conv1]}\ndata: {captions: 1}\n"
    )
    monkeypatch.setenv(location.ENVIRONMENT, str(place))
    config = ScorerConfig(channels=(8, 8, 8), blocks=(1, 1, 1), groups=4, hidden=8, width=8)
    text = BertStates(tiny_pipeline)
    torch.manual_seed(0)
    save_scorer(place / "scorer", config, Scorer(config, text.width).state_dict(), text, {})
    whole = emoji8.load("train")
    wanted = set(emoji8.read_prompts("benchmark")[:100])
    rows = [row for row, record in enumerate(whole.records) if record.name in wanted][::6][:PICTURES]
    few = emoji8.Emoji8(whole.pictures[rows], tuple(whole.records[row] for row in rows))
    load = emoji8.load
    monkeypatch.setattr(emoji8, "load", lambda split="train": few if split == "train" else load(split))
    monkeypatch.setattr(comparison, "Lite0Features", Pooled)
    return place


@pytest.mark.slow
def test_the_demo_makes_students_a_table_and_a_page_and_goes_on_where_it_was(
    small_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "demo"
    small = ["steps=2", "batch=2", "prompts=100", "shown=3"]
    assert demo.STEPS == (2, 4, 8, 20)
    assert demo.TEACHER_STEPS == 50
    monkeypatch.setattr(demo, "STEPS", (2, 4))
    monkeypatch.setattr(demo, "TEACHER_STEPS", TEACHER_STEPS)
    report = api.demo(out=out, overrides=small)
    results = load_results(out / "results.json")
    rows = {(row.method, row.steps): row for row in results.rows}
    methods = ("DDIM", "DPM-Solver++(2S)", "LCM", "TCD")
    both = {(method, steps) for method in methods for steps in (2, 4)}
    assert set(rows) == {("teacher", TEACHER_STEPS), *both, ("DDIM", 1), ("DPM-Solver++(2S)", 1)}
    assert all(len(scores) == 100 for row in rows.values() for scores in row.scores.values())
    costs = {method: rows[method, 2].nfe for method in methods}
    assert costs == {"DDIM": 4, "DPM-Solver++(2S)": 8, "LCM": 2, "TCD": 2}
    assert rows["DPM-Solver++(2S)", 1].nfe == 4
    assert rows["TCD", 4].figures != rows["LCM", 4].figures
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
    whole = emoji8.read_prompts("benchmark")
    lists = {"validation": whole[:40], "gamma": whole[30:70], "benchmark": whole[60:100]}
    monkeypatch.setattr(bundled(), "read_prompts", lambda name: lists[name])
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
        assert record["n"] == 40
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
    assert "is better than" in (out / "claims.md").read_text()
    assert (out / "gamma.webp").stat().st_size > 1000
    page = report.read_bytes()

    monkeypatch.setattr("fewstep_worlds.studies.comparison.PictureStore.pictures", forbidden_after_grid(out))
    assert api.benchmark(out=out, overrides=small).read_bytes() == page
    assert load_results(out / "results.json").rows == results.rows


@pytest.mark.slow
def test_the_card_holds_a_teachers_settings(small_world: Path, tiny_pipeline: Path, tmp_path: Path) -> None:
    figures = emoji8_api.teacher_card(out=tmp_path, teacher=str(tiny_pipeline), n=24, steps=2, omega=1.0)
    for kind in ("words of no caption, untrained", "words of no caption that the encoder was trained on"):
        by_word = figures[f"{kind}: right concept"]
        by_name = figures[f"{kind}: the same concepts by their captions' names"]
        share = figures[f"{kind}, as a share of the captioned rate"].value
        assert share == pytest.approx(by_word.value / by_name.value if by_name.value else 0)
        assert (by_word.n, by_name.n) == (100, 100)
    assert figures["held-out (concept, family) pairs: right concept"].n == len(emoji8.load_records("heldout-pair"))
    white = next(figures[key] for key in figures if key.endswith(", real pictures"))
    assert white.value > 0.95, "real emoji are on white"
    assert figures["autoencoder, PSNR on held-out concepts (dB)"].value < 15, "a random autoencoder restores nothing"
    assert len((tmp_path / "card.md").read_text().splitlines()) == 2 + len(figures)
    with Image.open(tmp_path / "samples.webp") as sheet:
        assert sheet.width > 10 * 64


def test_the_demo_names_missing_parts_before_it_trains(small_world: Path, tmp_path: Path) -> None:
    for file in (small_world / "scorer").iterdir():
        os.unlink(file)
    with pytest.raises(UserError, match="scorer"):
        api.demo(out=tmp_path / "demo", overrides=["steps=2", "batch=2", "prompts=100"])
    assert not (tmp_path / "demo" / "lcm").exists()


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
    """On Emoji-8: real pictures of the prompts' concepts, the standard metrics, white backgrounds, and agreement."""
    prompts = emoji8.read_prompts("benchmark")[:40]
    study = comparison.Comparison(prompts, tmp_path / "study")
    pictures = emoji8.load("heldout-pair").pictures[:40]
    row = study.measured(comparison.teacher_entry(2.0, 4, 0), pictures, TeacherPictures())
    gallery = measures.Gallery.load()
    features = Features(Pooled(), tmp_path / "other")
    metrics = [*measures.metrics(gallery, features, 40), measures.agreement()]
    expected = evaluate_pictures(pictures, prompts, metrics, gallery.reference(prompts))
    assert row.figures == expected
    assert "agreement" in expected
    assert study.suite.real_diversity == measures.real_diversity(gallery, features, prompts).value


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
    whole = emoji8.read_prompts("benchmark")
    monkeypatch.setattr(bundled(), "read_prompts", lambda name: whole[:40])
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
    assert share.evaluations == spent
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
