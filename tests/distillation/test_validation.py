"""Validation and the estimate: figures of a run before and during training."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fewstep.backbones.teachers import read_teacher
from fewstep.common.errors import UserError
from fewstep.common.files import read_json
from fewstep.common.rng import KeyedRng
from fewstep.distillation import distill as distillation
from fewstep.distillation import validation as validation
from fewstep.distillation.checks import open_source
from fewstep.distillation.config import DistillConfig, resolve
from fewstep.distillation.estimate import validation_cost
from fewstep.distillation.estimate_run import estimate_run
from fewstep.distillation.run_data import validation_prompts
from fewstep.training.loss import Loss
from fewstep.training.update import Batch
from fewstep_worlds.stickers.world import LISTS, read_prompts
from support.pooled import Pooled


@pytest.fixture
def watched(tiny_overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(validation, "Lite0Features", Pooled)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red disc\na blue ring\n")
    return [
        *tiny_overrides,
        "student.targets=[to_q]",
        "loop.steps=4",
        "loop.validate_every=2",
        f"validation.prompts={prompts}",
        "validation.count=16",
        "validation.teacher_steps=2",
        "sampling.steps=2",
    ]


def figures(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_validation_draws_evaluates_and_keeps_the_best(
    watched: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = iter([0.5, 0.3])
    monkeypatch.setattr(validation.KernelDistance, "distance", lambda self, a, b: next(scores))
    config = resolve("tcd", None, watched)
    own_cache = tmp_path / "cache"
    distillation.distill(config, tmp_path / "run", cache=own_cache, quiet=True)
    lines = [line for line in figures(tmp_path / "run") if "validation/kid" in line]
    assert [(line["step"], line["validation/kid"]) for line in lines] == [(2, 0.5), (4, 0.3)]
    assert all(line["validation/to_teacher"] > 0 for line in lines)
    grids = sorted((tmp_path / "run" / "grids").iterdir())
    assert [path.name for path in grids] == [f"step-{step:08d}.webp" for step in (0, 2, 4)]
    assert Image.open(grids[0]).width > 10 * 128
    best = tmp_path / "run" / "best"
    kept = read_json(best / "figures.json")
    assert (kept["step"], kept["kid"]) == (4, 0.3)
    assert (best / "pytorch_lora_weights.safetensors").is_file()
    assert len(list(own_cache.glob("watch-*.safetensors"))) == 1

    # made longer: worse students do not replace the best one, the teacher is not drawn again
    scores = iter([0.4])
    before = (best / "pytorch_lora_weights.safetensors").read_bytes()
    longer = resolve("tcd", None, [*watched, "loop.steps=6"])
    monkeypatch.setattr(validation, "image_generator_of", None)
    distillation.distill(longer, tmp_path / "run", cache=own_cache, quiet=True)
    assert read_json(best / "figures.json")["kid"] == 0.3
    assert (best / "pytorch_lora_weights.safetensors").read_bytes() == before


def test_watching_does_not_change_the_run(watched: list[str], tiny_cache: Path, tmp_path: Path) -> None:
    """Validation uses the averaged weights and restores the student's own, with and without averages."""
    students = []
    for name, changes in (("with", []), ("without", ["loop.validate_every=null"])):
        config = resolve("tcd", None, [*watched, "optim.ema=0.5", *changes])
        students.append(distillation.distill(config, tmp_path / name, cache=tiny_cache, quiet=True).read_bytes())
    assert students[0] == students[1]
    judged = [line["validation/kid"] for line in figures(tmp_path / "with") if "validation/kid" in line]
    assert len(judged) == 2
    assert all(np.isfinite(judged))


def test_validation_takes_its_prompts_from_the_list_then_from_captions(
    tmp_path: Path, tiny_overrides: list[str]
) -> None:
    file = tmp_path / "p.txt"
    file.write_text("a\nb\nc\n")
    count = "validation.count=16"

    def prompts_of(config: DistillConfig, captions: list[str]) -> list[str]:
        return validation_prompts(config, open_source(config.data, read_teacher(config.teacher)), captions)

    listed = resolve("tcd", None, [*tiny_overrides, count, f"validation.prompts={file}"])
    assert prompts_of(listed, ["d", "a", "d", " "]) == [*"abcd"] * 4
    own = resolve("tcd", None, [*tiny_overrides, count])
    assert prompts_of(own, ["d", "e"]) == [*"de"] * 8
    listed_count = LISTS["validation"].count
    bundled = resolve("tcd", None, [f"validation.count={listed_count + 10}"])
    prompts = prompts_of(bundled, [f"caption {i}" for i in range(20)])
    assert prompts[:listed_count] == list(read_prompts("validation"))
    assert prompts[listed_count:] == [f"caption {i}" for i in range(10)]


def test_every_stage_watches_the_same_prompts(tiny_overrides: list[str], tiny_cache: Path) -> None:
    """Stages have their own seeds; the validation pictures are chosen by the validation's."""
    chosen = []
    for seed, watching in ((1, 5), (2, 5), (1, 6)):
        words = [*tiny_overrides, f"loop.seed={seed}", f"validation.seed={watching}"]
        run = distillation.prepare(resolve("tcd", None, words), tiny_cache, torch.device("cpu"))
        chosen.append([row[0] for row in run.validation_data(8).captions])
    assert chosen[0] == chosen[1]
    assert chosen[0] != chosen[2]


def test_validation_on_too_few_pictures_is_refused_before_training(
    watched: list[str], tmp_path: Path, tiny_cache: Path
) -> None:
    Image.new("RGB", (64, 64), "red").save(tmp_path / "one.png")
    (tmp_path / "one.txt").write_text("a red square")
    config = resolve("tcd", None, [*watched, f"data.source={tmp_path}"])
    with pytest.raises(UserError) as refused:
        distillation.distill(config, tmp_path / "run", cache=tiny_cache, quiet=True)
    assert refused.value.field == "loop.validate_every"
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_the_estimate_adds_up(tiny_overrides: list[str]) -> None:
    words = [*tiny_overrides, "loop.steps=100", "loop.accumulate=2"]
    (lora,) = estimate_run(resolve("tcd", None, words))
    assert 0 < lora.seconds_per_step < 60
    assert lora.seconds == pytest.approx(100 * lora.seconds_per_step)
    latents, states = 16 * 4 * 8 * 8 * 4, 4 * (4 + 1) * 8 * 32 * 2  # of the 4 captions and the null one that it encodes
    assert lora.data_bytes == latents + states
    assert lora.calls == {"student": 2, "teacher": 2}, "the target is the student"
    assert lora.encoding_seconds > 0
    assert len(lora.lines()) == 5  # data, time, memory, disk, calls
    full = ["student.kind=full", "method.target=ema", "optim.ema=0.9", "method.solver=dpmpp_2s"]
    (whole,) = estimate_run(resolve("tcd", None, [*words, *full]))
    base = lora.weights_bytes - lora.trained_bytes // 3  # its adapters are weights too
    assert whole.weights_bytes == 3 * base  # teacher, student and target
    assert whole.trained_bytes == 4 * base  # gradient, two moments, average
    assert whole.calls["teacher"] == 4
    (twice,) = estimate_run(resolve("tcd", None, [*words, "loop.batch=8"]))
    assert twice.saved_bytes == pytest.approx(2 * lora.saved_bytes, rel=0.1), "activations grow with the batch"


@pytest.mark.slow
def test_the_estimate_of_stored_trajectories(tiny_overrides: list[str]) -> None:
    """A batch of them is drawn and timed; points are counted for all, captions once whatever their number."""
    few, many = (
        estimate_run(resolve("kd", None, [*tiny_overrides, f"data.trajectories={count}"]))[0] for count in (8, 800)
    )
    states = 4 * (4 + 1) * 8 * 32 * 2
    assert few.data_bytes == 8 * 51 * 4 * 8 * 8 * 2 + states, "fp16"
    assert many.data_bytes == 800 * 51 * 4 * 8 * 8 * 2 + states
    assert many.encoding_seconds > 20 * few.encoding_seconds
    assert few.calls == {"student": 1}


def test_checks_are_counted_and_timed_like_the_steps() -> None:
    """1,000 steps, a check every 400: 3 of them; the teacher's 50 guided steps once."""
    words = ["loop.steps=1000", "loop.validate_every=400", "loop.batch=32", "validation.count=100", "sampling.steps=4"]
    checks = validation_cost(resolve("tcd", None, words), 1.0)
    assert checks is not None
    assert (checks.first, checks.each, checks.count) == (10_000, 400, 3)
    # a step: teacher 2, target 1, student 1 and its backward pass 2
    assert checks.seconds == pytest.approx((10_000 + 3 * 400) / (32 * 6))
    assert "10000 network evaluations once for the teacher's pictures, 400 at each of 3 checks" in checks.line()
    one = validation_cost(resolve("tcd", None, words), 1.0, embedded=True)
    assert one is not None
    assert one.first == 5_000, "a network that takes guidance as an input has one branch"
    assert validation_cost(resolve("tcd", None, ["loop.validate_every=null"]), 1.0) is None


def test_the_encoders_are_not_kept_for_validation(watched: list[str], tiny_cache: Path, tmp_path: Path) -> None:
    run = distillation.prepare(resolve("tcd", None, watched), tiny_cache, torch.device("cpu"))
    judge = distillation.Validation(run, tmp_path, tmp_path)
    assert not {"readers", "vae"} & vars(run.backbone).keys()
    found = judge(2, {"student": dict(run.student.roles.parameters("student"))})
    assert found["validation/to_teacher"] > 0
    assert not {"readers", "vae"} & vars(run.backbone).keys()


def test_an_estimate_leaves_the_student_alone(tiny_overrides: list[str], tiny_cache: Path) -> None:
    from fewstep.distillation.estimate import estimate

    config = resolve("tcd", None, tiny_overrides)
    run = distillation.prepare(config, tiny_cache, torch.device("cpu"))
    plan = run.update_plan()
    before = {name: p.detach().clone() for name, p in plan[0].parameters.items()}
    estimate(run, plan)
    for name, parameter in plan[0].parameters.items():
        assert torch.equal(parameter, before[name])
        assert parameter.grad is None


@pytest.mark.slow
def test_weights_of_a_frozen_loss_network_are_no_activations(tiny_overrides: list[str], tiny_cache: Path) -> None:
    """A frozen network of 16 MB between the student and its loss: what is kept for the backward pass hardly grows."""
    from fewstep.distillation.estimate import estimate

    config = resolve("tcd", None, tiny_overrides)
    run = distillation.prepare(config, tiny_cache, torch.device("cpu"))
    (update,) = run.update_plan()
    frozen = torch.nn.Linear(2000, 2000).requires_grad_(False)

    def looked(batch: Batch, rng: KeyedRng) -> Loss:
        value = update.loss(batch, rng).value
        return Loss(frozen(value.expand(2000)).sum())

    kept = [estimate(run, [plan]).saved_bytes for plan in (update, replace(update, loss=looked))]
    assert 0 <= kept[1] - kept[0] < 1e5


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["tcd", "kd"])
def test_a_teacher_in_bf16_is_validated_and_rolled_out_in_it(watched: list[str], tmp_path: Path, recipe: str) -> None:
    """Its weights meet no other type; pictures and trajectories of the fp32 teacher are not taken for its own."""
    kept = []
    for words in (["loop.precision=bf16", "student.base=bf16"], ["loop.precision=bf16"]):
        own = tmp_path / "cache"
        config = resolve(recipe, None, [*watched, "data.trajectories=6", *words])
        distillation.distill(config, tmp_path / words[-1], cache=own, quiet=True)
        judged = [line["validation/kid"] for line in figures(tmp_path / words[-1]) if "validation/kid" in line]
        assert len(judged) == 2
        assert all(np.isfinite(judged))
        kept.append({path.name for kind in ("watch-*", "trajectories-*") for path in own.glob(kind)})
    assert len(kept[1]) == 2 * len(kept[0]) == (4 if recipe == "kd" else 2)


def test_large_pictures_are_few() -> None:
    """Above 256 pixels, of the teacher or the data, unless a number is given."""
    counts = [
        resolve("tcd", None, words, side=side).validation.count
        for words, side in (
            ([], None),
            ([], 256),
            ([], 512),
            (["data.size=512"], 64),
            (["data.size=128"], 512),
            (["validation.count=100"], 512),
        )
    ]
    assert counts == [256, 256, 32, 32, 256, 100]
