"""`fewstep evaluate` on a small pipeline: what is compared with what, and what is refused before anything is drawn."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fewstep as api
from fewstep.backbones.pipeline_writer import RECORD
from fewstep.common.errors import UserError
from fewstep.common.files import read_json, write_json
from fewstep.diffusion.config import TEACHER_SAMPLING
from fewstep.evaluation import run as measuring
from fewstep.evaluation.detail import edge_density
from fewstep.evaluation.teacher_distance import pixel_rmse
from fewstep.inference.generator import ImageGenerator, load_image_generator
from fewstep_worlds.stickers.world import read_prompts
from support.pooled import Pooled

PROMPTS = [f"a {colour} {shape}" for colour in ("red", "green", "blue") for shape in ("disc", "ring", "bar", "square")]
STEPS = 6
"""Of the teacher's end points."""
FEW: dict[str, Any] = {"steps": 2, "omega": 1.0}


@pytest.fixture
def prompt_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(measuring, "Lite0Features", Pooled)
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(PROMPTS) + "\n", encoding="utf-8")
    return file


@pytest.fixture
def teacher(tiny_pipeline: Path, tmp_path: Path) -> Path:
    """The tiny pipeline with end points of few steps."""
    folder = tmp_path / "tiny"
    shutil.copytree(tiny_pipeline, folder)
    record = read_json(folder / RECORD)
    record["sampling"]["steps"] = STEPS
    write_json(folder / RECORD, record)
    return folder


@pytest.mark.slow
def test_a_pipeline_beside_a_folder_and_itself(
    prompt_file: Path, teacher: Path, picture_folder: Path, tmp_path: Path
) -> None:
    figures = api.evaluate(
        prompt_file=prompt_file, out=tmp_path / "out", lora=None, teacher=str(teacher), real=picture_folder,
        reference=teacher, reference_omega=1.0, seed=3, device="cpu",
        settings=FEW | {"steps": STEPS},
    )  # fmt: skip
    sampling = TEACHER_SAMPLING.model_copy(update={"omega": 1.0, "steps": STEPS})
    pictures = load_image_generator(teacher).draw(PROMPTS, range(3, 15), sampling)
    assert figures["detail: edges"].value == pytest.approx(edge_density(pictures).mean())
    assert figures["detail: edges"].n == len(PROMPTS)
    assert figures["to teacher: pixels"].value == 0, "the same pipeline, settings and noise"
    assert figures["KID-Lite0 (to teacher)"].value != 0, "sets are compared with pictures from other noise"
    assert figures["diversity-Lite0"].n == len(PROMPTS)
    assert not [name for name in figures if name.startswith("FD")], "too few pictures"
    written = read_json(tmp_path / "out" / "figures.json")
    assert written["tiny 6 steps"]["detail: edges"]["value"] == figures["detail: edges"].value
    scale = [written[name]["detail: edges"]["value"] for name in ("blurred, radius 1", "real", "noised, sigma 10")]
    assert scale == sorted(scale)


def test_too_little_or_another_size_is_refused_before_anything_is_drawn(
    prompt_file: Path, tiny_pipeline: Path, picture_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(*_: Any, **__: Any) -> np.ndarray:
        raise AssertionError("drawn")

    monkeypatch.setattr(ImageGenerator, "draw", forbidden)

    def refused(words: str, **changes: Any) -> None:
        given = {"prompt_file": prompt_file, "real": picture_folder, "teacher": str(tiny_pipeline)} | changes
        with pytest.raises(UserError, match=words):
            api.evaluate(out=tmp_path / "out", lora=None, device="cpu", settings=FEW, **given)

    few = tmp_path / "few"
    few.mkdir()
    for file in sorted(picture_folder.glob("*.png"))[:5]:
        shutil.copy(file, few)
    refused(r"holds 5 pictures .*; KID needs at least 10", real=few)
    refused("is not a folder", real=prompt_file)
    short = tmp_path / "short.txt"
    short.write_text("a red disc\n", encoding="utf-8")
    refused(r"holds 1 prompts; KID needs at least 10", prompt_file=short)
    large = tmp_path / "large"
    shutil.copytree(tiny_pipeline, large)
    config = read_json(large / "unet" / "config.json")
    write_json(large / "unet" / "config.json", {**config, "sample_size": 16})
    refused("draws 128 pixels a side", reference=large)


@pytest.fixture(scope="module")
def student(tiny_overrides: list[str], tiny_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from fewstep.distillation import distill as distillation
    from fewstep.distillation.config import resolve

    words = [
        *tiny_overrides,
        "student.targets=[to_q]",
        "loop.steps=2",
        "method.guidance.low=1",
        "method.guidance.high=2",
    ]
    return distillation.distill(
        resolve("tcd", None, words), tmp_path_factory.mktemp("run"), cache=tiny_cache, quiet=True
    )


def test_a_student_beside_a_folder_and_its_own_teacher(
    prompt_file: Path, student: Path, teacher: Path, picture_folder: Path, tmp_path: Path
) -> None:
    """Nothing named but the LoRA: its own settings, its teacher's end points at the guidance it was trained with."""
    figures = api.evaluate(
        prompt_file=prompt_file, out=tmp_path / "out", lora=student, teacher=teacher, real=picture_folder,
        device="cpu", settings={"steps": 2, "gamma": 0.0},
    )  # fmt: skip
    image_generator = load_image_generator(teacher, student)
    seeds = range(len(PROMPTS))
    drawn = image_generator.draw(PROMPTS, seeds, image_generator.sampling.model_copy(update={"steps": 2, "gamma": 0.0}))
    assert figures["detail: edges"].value == pytest.approx(edge_density(drawn).mean())
    end = load_image_generator(teacher).draw(
        PROMPTS, seeds, TEACHER_SAMPLING.model_copy(update={"omega": 1.5, "steps": STEPS})
    )
    assert figures["to teacher: pixels"].value == pytest.approx(pixel_rmse(drawn, end).mean())
    own, floor = figures["KID-Lite0 (to teacher)"], figures["KID-Lite0 (to teacher)"].floor
    assert floor is not None, "the teacher itself, from other noise"
    assert floor < own.value
    assert not [name for name in figures if name.startswith("scene accuracy")], "of a folder, not of the world"
    assert "pytorch_lora_weights 2 steps" in read_json(tmp_path / "out" / "figures.json")


@pytest.mark.slow
def test_a_student_beside_the_bundled_pictures(student: Path, teacher: Path, tmp_path: Path) -> None:
    """Sentences about sticker scenes are measured against real pictures of these, and their accuracy."""
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(read_prompts("gamma")[:16]) + "\n", encoding="utf-8")
    figures = api.evaluate(
        prompt_file=file, out=tmp_path / "out", lora=student, teacher=teacher, device="cpu", settings={"steps": 1}
    )
    accuracy = figures["scene accuracy"]
    assert (accuracy.n, accuracy.value) == (16, 0), "random weights draw nothing"
    assert accuracy.floor is not None
    kid = figures["KID-Lite0"]
    assert kid.floor is not None
    assert kid.value > 10 * abs(kid.floor)
    diverse = figures["diversity-Lite0"]
    assert diverse.floor is not None, "of real pictures of one prompt"
    assert diverse.value < diverse.floor
