"""Styles: a LoRA of the teacher by the denoising loss, drawn with beside a student's."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import fewstep
from fewstep.backbones.base import load_backbone
from fewstep.backbones.pipeline_folder import read_folder
from fewstep.common.files import read_json
from fewstep.common.rng import KeyedRng
from fewstep.diffusion.denoiser import Denoiser
from fewstep.diffusion.schedule import scaled_linear
from fewstep.distillation import distill as distillation
from fewstep.distillation import validation
from fewstep.distillation.batches import fetch_of
from fewstep.distillation.config import resolve
from fewstep.inference.generator import load_image_generator
from fewstep.methods.cost import step_calls, step_cost
from fewstep.methods.terms import fine_tuning_loss
from fewstep.students.lora import lora_added, stored_matrices
from fewstep.students.lora_checks import check_lora
from fewstep.training.roles import copy_role
from support.pooled import Pooled
from support.random_lora import random_lora


def test_the_loss_is_the_error_of_x0_by_edms_weight() -> None:
    path, method = scaled_linear(), resolve("style").method
    seen: list[tuple[Tensor, Tensor, str]] = []

    def call(x: Tensor, t: Tensor, condition: Any, role: str) -> Tensor:
        seen.append((x, t, role))
        assert set(condition) == {"text"}
        return 0.5 * x

    x_0 = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    rng = KeyedRng(0, 3, tuple(range(6)))
    loss = fine_tuning_loss(method, Denoiser(call, path, "eps"), x_0, {"text": torch.ones(6)}, rng)
    ((x, t, role),) = seen
    alpha, sigma = path.alpha(t)[:, None], path.sigma(t)[:, None]
    found = (x - sigma * 0.5 * x) / alpha
    weight = 4 + (alpha / sigma).square()
    wanted = (weight * (found - x_0).square()).mean(1)
    assert role == "student"
    torch.testing.assert_close(loss.per_sample.double(), wanted.double(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(loss.t, (t + 1) / 1000)
    assert step_calls(method) == {"student": 1}
    assert step_cost(method) == 3


@pytest.fixture
def words(tiny_overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(validation, "Lite0Features", Pooled)
    return [*tiny_overrides, "loop.validate_every=6", "validation.count=16", "validation.teacher_steps=2"]


@pytest.mark.slow
def test_a_style_is_drawn_in_the_students_steps(
    words: list[str], tiny_pipeline: Path, picture_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Validation draws what `fewstep sample` draws with both, and leaves the teacher's bits as they were."""
    student = random_lora(tiny_pipeline, tmp_path / "runs" / "few" / "student")
    shown: list[np.ndarray] = []
    plain = validation.Validation._evaluate

    def evaluate(self: Any, step: int, weights: Any, pictures: np.ndarray) -> Any:
        shown.append(pictures)
        unet = self.student.backbone.network
        held = {name.replace(".base_layer", ""): value for name, value in unet.state_dict().items()}
        base = load_backbone(tiny_pipeline).network.state_dict()
        assert all(torch.equal(held[name], value) for name, value in base.items())
        return plain(self, step, weights, pictures)

    monkeypatch.setattr(validation.Validation, "_evaluate", evaluate)
    named = {"lora": student, "teacher": tiny_pipeline}
    words = [*words, "optim.lr=0.2", "optim.warmup=0"]
    style = fewstep.train_style(picture_folder, out=tmp_path / "style", overrides=words, **named)
    counted = read_json(tmp_path / "style" / "evaluations.json")["a_sample_and_step"]
    assert counted == {"student": 1}
    prompts = ["a red disc", "a blue bar"]
    folder = read_folder(tiny_pipeline)
    both = load_image_generator(folder, student, style=check_lora(style, folder))
    alone = load_image_generator(folder, student)
    assert both.sampling == alone.sampling, "the student's"
    run = distillation.prepare(resolve("style", None, words), tmp_path / "cache", torch.device("cpu"))
    ours = validation.Validation(run, tmp_path / "style", tmp_path / "cache")
    drawn = both.draw(ours.prompts, ours.seeds).astype(int)
    assert np.abs(drawn - shown[-1]).max() <= 4, "rounding"
    assert np.abs(drawn - alone.draw(ours.prompts, ours.seeds)).max() > 4
    with Image.open(fewstep.sample(prompts[0], style=style, out=tmp_path / "a.png", scale=1, **named)) as picture:
        wanted = both.draw(prompts[:1], [0])[0].astype(int)
        assert np.abs(np.asarray(picture).astype(int) - wanted).max() <= 1


@pytest.mark.slow
def test_a_style_lowers_the_teachers_own_error(
    words: list[str], tiny_pipeline: Path, picture_folder: Path, tmp_path: Path
) -> None:
    more = [*words, "loop.validate_every=null", "loop.steps=60", "optim.lr=0.01", "loop.batch=8", "loop.save_every=60"]
    style = fewstep.train_style(
        picture_folder, lora=None, teacher=tiny_pipeline, out=tmp_path / "style", overrides=more
    )
    run = distillation.prepare(resolve("style", None, more), tmp_path / "cache", torch.device("cpu"))
    (update,) = run.update_plan()

    def error() -> float:
        with torch.no_grad():
            keyed = [KeyedRng(99, step, tuple(range(16))) for step in range(3)]
            return float(sum(update.loss(fetch_of(run)(np.arange(16), drawn), drawn).value for drawn in keyed))

    before = error()
    weights = {}
    for name, (a, b) in stored_matrices(check_lora(style, read_folder(tiny_pipeline))).items():
        weights[f"{name}.lora_A.weight"], weights[f"{name}.lora_B.weight"] = a.float(), b.float()
    copy_role(weights, run.student.parameters("student"))
    assert error() < 0.9 * before


def test_a_style_alone_is_a_lora_of_the_teacher(
    words: list[str], tiny_pipeline: Path, picture_folder: Path, tmp_path: Path
) -> None:
    more = [*words, "loop.validate_every=null"]
    style = fewstep.train_style(picture_folder, lora="none", teacher=tiny_pipeline, out=tmp_path / "s", overrides=more)
    generator = load_image_generator(tiny_pipeline, style)
    own = load_image_generator(tiny_pipeline)
    assert generator.sampling == own.sampling.model_copy(update={"omega": 7.0}), "as the teacher, at its own guidance"


@pytest.mark.parametrize("scale", [0.5, 1.0])
def test_a_style_has_a_scale(scale: float, tiny_pipeline: Path, tmp_path: Path) -> None:
    """W + B A of the student + scale B A of the style, whichever layers each has."""
    folder = read_folder(tiny_pipeline)
    student = check_lora(random_lora(tiny_pipeline, tmp_path / "student"), folder)
    generator = load_image_generator(folder, student, style=student, style_scale=scale)
    base = dict(load_backbone(tiny_pipeline).network.named_parameters())
    found = dict(generator.backbone.network.named_parameters())
    for name, (a, b) in stored_matrices(student).items():
        delta = (b.float().flatten(1) @ a.float().flatten(1)).reshape(base[f"{name}.weight"].shape)
        torch.testing.assert_close(found[f"{name}.weight"], base[f"{name}.weight"] + (1 + scale) * delta)


def test_an_added_lora_leaves_no_trace(tiny_pipeline: Path, tmp_path: Path) -> None:
    header = check_lora(random_lora(tiny_pipeline, tmp_path / "student"), read_folder(tiny_pipeline))
    network = load_backbone(tiny_pipeline).network.to(torch.bfloat16)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with suppress(KeyboardInterrupt), lora_added(network, header):
        assert any(not torch.equal(before[name], value) for name, value in network.state_dict().items())
        raise KeyboardInterrupt
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
