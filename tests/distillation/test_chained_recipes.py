"""Recipes that follow each other in stages, each from the student of the one before; and a held-out scorer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fewstep.common.errors import UserError
from fewstep.common.files import read_json
from fewstep.common.tensors import digest, load_tensors
from fewstep.distillation import distill as distillation
from fewstep.distillation import frozen_networks, validation
from fewstep.distillation.config import DistillConfig, resolve
from fewstep.distillation.validation import mean_score
from fewstep.inference.generator import load_image_generator
from fewstep_worlds.plane.settings import resolve_plane
from fewstep_worlds.plane.train import train_plane
from support.interrupt import stopped_in_call


def test_each_stage_has_the_method_of_its_recipe() -> None:
    """Method, sampling and optimiser of each recipe; all else of the first; the student is sampled as the last's."""
    whole = resolve("tcd,DMD2,smd", None, ["loop.steps=600", "stages.dmd2.share=4", "data.size=64"])
    stages = whole.each_stage()
    alone = [resolve(name) for name in ("tcd", "dmd2", "smd")]
    assert [stage.method for stage in stages] == [one.method for one in alone]
    assert [stage.sampling.model_copy(update={"size": None}) for stage in stages] == [one.sampling for one in alone]
    assert [stage.sampling.size for stage in stages] == [(64, 64)] * 3
    assert [stage.optim.lr for stage in stages] == [one.optim.lr for one in alone]
    assert [stage.loop.steps for stage in stages] == [100, 400, 100]
    assert whole.sampling == stages[-1].sampling
    assert whole.data.source == alone[0].data.source != alone[1].data.source
    assert [folder.name for _, folder, _ in whole.runs(Path("out"))] == ["1-tcd", "2-dmd2", "3-smd"]


def test_a_stage_of_a_file_names_its_recipe(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(
        "stages:\n- {name: first, recipe: tcd, share: 1, method: {k: 2}}\n"
        "- {name: then, recipe: tdm, share: 1, optim: {lr: 0.5}}\n",
        encoding="utf-8",
    )
    first, then = resolve("tdm", file).each_stage()
    assert first.method == resolve("tcd", None, ["method.k=2"]).method
    assert then.method == resolve("tdm").method
    assert then.optim.lr == 0.5


def test_the_teachers_own_guidance_reaches_every_stage() -> None:
    tcd, dmd2 = (stage.method.guidance for stage in resolve("tcd,dmd2", omega=3.0).each_stage())
    assert (tcd.low, tcd.high) == (1.5, 4.5)
    assert (dmd2.low, dmd2.high) == (4.0, 4.0)


@pytest.mark.parametrize(
    ("recipes", "words", "field"),
    [
        ("tcd-s,dmd2", [], "stages"),
        ("tlcm,dmd2", [], "stages"),
        ("tcd,tcd", [], "stages"),
        ("tcd,nope", [], "recipe"),
        ("tcd,dmd2", ["method.grid=8"], "method.grid"),
        ("tcd,dmd2", ["sampling.steps=2"], "sampling.steps"),
        ("dmd2", ["method.reward.weight=1", "validation.scorer=world"], "validation.scorer"),
    ],
)
def test_chains_that_cannot_be(recipes: str, words: list[str], field: str) -> None:
    with pytest.raises(UserError) as error:
        resolve(recipes, None, words)
    assert error.value.field == field


def small(tiny_overrides: list[str], recipes: str, *words: str) -> DistillConfig:
    own = ["student.rank=2", "student.targets=[to_q]", "loop.steps=4", "loop.save_every=1", "student.alpha=2"]
    return resolve(recipes, None, [*tiny_overrides, *own, *words])


@pytest.mark.slow
def test_a_chain_resumes_and_draws(
    tiny_overrides: list[str], tiny_cache: Path, tiny_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in its second stage it ends where the uninterrupted run ends, not far from the first stage's student."""
    config = small(tiny_overrides, "tcd,dmd2", "stages.dmd2.method.matching.every=1")

    def run(name: str) -> Path:
        return distillation.distill(config, tmp_path / name, cache=tiny_cache, quiet=True)

    whole = run("whole")
    stopped_in_call(monkeypatch, 4, lambda: run("cut"))
    assert digest(load_tensors(run("cut"))) == digest(load_tensors(whole))
    first = load_tensors(tmp_path / "whole" / "stages" / "1-tcd" / "student" / whole.name)
    away = [float((load_tensors(whole)[name] - value).abs().max()) for name, value in first.items()]
    assert 0 < max(away) < 1e-3, "two steps at a learning rate of 2e-5"
    generator = load_image_generator(tiny_pipeline, whole)
    assert generator.sampling == resolve("dmd2").sampling
    assert generator.draw(["a red disc"], [3]).std() > 0


def test_recipes_follow_each_other_in_the_plane(tmp_path: Path) -> None:
    words = ["width=16", "count=200", "loop.steps=4", "loop.batch=16", "base=exact", "gammas=[1]", "steps=[4]"]
    stages = "stages=[{name: a, recipe: tcd, share: 1}, {name: b, recipe: dmd2, share: 1}]"
    run = train_plane(resolve_plane("dmd2", [*words, stages]), tmp_path, quiet=True)
    assert [stage.method.start for stage in run.config.each_stage()] == ["data", "simulation"]
    assert {stage.method.guidance.convention for stage in run.config.each_stage()} == {"none"}
    assert (tmp_path / "stages" / "2-b").is_dir()


class Brightness:
    """A scorer that reads no prompt's meaning: mean brightness plus the number of letters."""

    def prepare(self, prompts: list[str]) -> dict[str, Tensor]:
        return {"letters": torch.tensor([float(len(prompt)) for prompt in prompts])}

    def score(self, pictures: Tensor, prepared: dict[str, Tensor]) -> Tensor:
        return pictures.flatten(1).mean(1) + prepared["letters"]


def test_a_mean_score_pairs_pictures_with_their_prompts() -> None:
    pictures = np.stack([np.full((4, 4, 3), level, np.uint8) for level in (0, 255) * 20])
    found = mean_score(Brightness(), pictures, ["a", "abc"] * 20)  # type: ignore[arg-type]
    assert found == pytest.approx(2.0)
    assert mean_score(Brightness(), pictures[:1], ["ab"]) == pytest.approx(1.0)  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_held_out_scorer_is_reported(
    tiny_overrides: list[str], tiny_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside the figures of every validation; the trained reward is another one."""
    loaded = []

    def load(named: str, device: torch.device) -> Brightness:
        loaded.append(named)
        return Brightness()

    monkeypatch.setattr(validation, "load_named_scorer", load)
    monkeypatch.setattr(frozen_networks, "load_named_scorer", load)
    words = ["loop.validate_every=4", "validation.count=16", "validation.scorer=world"]
    config = small(tiny_overrides, "dmd2", "optim.lr=2e-5", *words)
    distillation.distill(config, tmp_path, cache=tiny_cache, quiet=True)
    kept = read_json(tmp_path / "best" / "figures.json")
    assert loaded == ["world"]
    assert {"kid", "to_teacher", "held_out"} <= kept.keys()
    assert kept["held_out"] > 1, "letters of the prompts less 1 at least"
