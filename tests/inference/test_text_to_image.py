"""A model that is loaded once and drawn from many times."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import fewstep
from fewstep.common.errors import UserError
from fewstep.inference.picture_files import read_settings
from support.random_lora import random_lora


@pytest.fixture(scope="module")
def lora(tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_lora(tiny_pipeline, tmp_path_factory.mktemp("lora")).parent


def sampled(out: Path, prompt: str, **options: object) -> np.ndarray:
    return np.asarray(Image.open(fewstep.sample(prompt, out=out, scale=1, device="cpu", **options)))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_pictures_equal_those_of_the_command(tiny_pipeline: Path, lora: Path, tmp_path: Path, precision: str) -> None:
    """Of the student, of the teacher, and of the student again after both are in memory."""
    model = fewstep.load(tiny_pipeline, lora, device="cpu", precision=precision)
    teacher = model.with_lora(None)
    again = teacher.with_lora(lora)
    few = {"teacher": tiny_pipeline, "precision": precision, "seed": 5}
    student = sampled(tmp_path / "student.png", "a red disc", lora=lora, steps=2, gamma=0.6, **few)
    own = sampled(tmp_path / "own.png", "a red disc", lora=None, steps=2, omega=3.0, **few)
    assert (student != own).any()
    for each in (model, again):
        np.testing.assert_array_equal(np.asarray(each.draw("a red disc", 5, steps=2, gamma=0.6)[0]), student)
    np.testing.assert_array_equal(np.asarray(teacher.draw("a red disc", 5, steps=2, omega=3.0)[0]), own)
    np.testing.assert_array_equal(np.asarray(model.draw("a red disc", 5, steps=2, gamma=0.6)[0]), student)


def test_guidance_and_negative_prompts_are_those_of_the_command(tiny_pipeline: Path, tmp_path: Path) -> None:
    model = fewstep.load(tiny_pipeline, None, device="cpu")
    own = sampled(
        tmp_path / "a.png", "a red disc", teacher=tiny_pipeline, steps=2, guidance_scale=4.0, negative_prompt="blue"
    )
    guided = {"steps": 2, "guidance_scale": 4.0}
    np.testing.assert_array_equal(np.asarray(model.draw("a red disc", negative_prompt="blue", **guided)[0]), own)
    assert (np.asarray(model.draw("a red disc", **guided)[0]) != own).any()
    with pytest.raises(UserError) as refused:
        model.draw("a red disc", omega=3.0, guidance_scale=4.0)
    assert refused.value.field == "guidance_scale"


def test_a_second_student_shares_the_encoders(tiny_pipeline: Path, lora: Path) -> None:
    model = fewstep.load(tiny_pipeline, lora, device="cpu")
    backbone, other = model.generator.backbone, model.with_lora(None).generator.backbone
    assert other.vae is backbone.vae
    assert other.readers is backbone.readers
    assert other.network is not backbone.network


def test_sizes_and_settings(tiny_pipeline: Path, lora: Path) -> None:
    model = fewstep.load(tiny_pipeline, lora, device="cpu")
    assert model.size == (64, 64)
    assert model.sampling_with(steps=3, settings={"spacing": "trailing"}).spacing == "trailing"
    (wide,) = model.draw("a red disc", size=(96, 64), steps=1)
    assert wide.size == (96, 64)
    assert wide.mode == "RGB"


def test_png_text_equals_that_of_the_command(tiny_pipeline: Path, lora: Path, tmp_path: Path) -> None:
    model = fewstep.load(tiny_pipeline, lora, device="cpu")
    file = tmp_path / "picture.png"
    changes = {"steps": 2, "gamma": 0.6, "settings": {"size": "96x64"}}
    fewstep.sample("three frogs", out=file, scale=1, device="cpu", teacher=tiny_pipeline, lora=lora, seed=5, **changes)
    text = model.png_text("three frogs", 5, steps=2, gamma=0.6, size=(96, 64))
    assert read_settings(file) == json.loads(text["fewstep"])
    with Image.open(file) as picture:
        assert picture.text["parameters"] == text["parameters"]
    Image.new("RGB", (8, 8)).save(tmp_path / "other.png")
    with pytest.raises(UserError):
        read_settings(tmp_path / "other.png")


def test_seeds_belong_to_pictures(tiny_pipeline: Path) -> None:
    model = fewstep.load(tiny_pipeline, device="cpu")
    first = [each.tobytes() for each in model.draw(["a red disc", "a blue bar"], 7, steps=1)]
    listed = [each.tobytes() for each in model.draw(["a red disc", "a blue bar"], [7, 8], steps=1)]
    alone = [each.tobytes() for each in model.draw("a blue bar", [8, 9], steps=1)]
    assert first == listed
    assert len(set(first)) == 2
    # a batch changes rounding, not the picture
    pixels = [np.frombuffer(each, np.uint8).astype(int) for each in (first[1], alone[0])]
    assert np.abs(pixels[0] - pixels[1]).max() <= 1


def test_calls_are_reported_and_an_exception_ends_the_drawing(tiny_pipeline: Path) -> None:
    class NewerPromptError(Exception):
        pass

    model = fewstep.load(tiny_pipeline, device="cpu", batch=2)
    seen: list[tuple[int, int]] = []
    before = model.draw(["a red disc"] * 3, steps=2, omega=2.0, on_call=lambda *call: seen.append(call))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]

    def stop(done: int, total: int) -> None:
        seen.append((done, total))
        raise NewerPromptError

    seen.clear()
    with pytest.raises(NewerPromptError):
        model.draw("a red disc", steps=4, on_call=stop)
    assert seen == [(1, 4)]
    after = model.draw(["a red disc"] * 3, steps=2, omega=2.0)
    assert [each.tobytes() for each in after] == [each.tobytes() for each in before]


def test_it_is_quiet(tiny_pipeline: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = fewstep.load(tiny_pipeline, device="cpu", batch=1)
    capfd.readouterr()
    model.draw("a red disc", [1, 2, 3], steps=1)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("field", "prompts", "options"),
    [
        ("prompts", [], {}),
        ("prompts", ["a", " "], {}),
        ("seeds", ["a", "b"], {"seeds": [1]}),
        ("seeds", "a", {"seeds": []}),
        ("seeds", "a", {"seeds": -1}),
        ("steps", "a", {"steps": 0}),
        ("steps", "a", {"steps": "4"}),
        ("gamma", "a", {"gamma": 0.5}),
        ("size", "a", {"size": (63, 64)}),
        ("sampler", "a", {"sampler": "none"}),
        ("gama", "a", {"settings": {"gama": 0.3}}),
    ],
)
def test_refusals_name_the_setting(tiny_pipeline: Path, field: str, prompts: str, options: dict[str, object]) -> None:
    model = fewstep.load(tiny_pipeline, device="cpu")
    with pytest.raises(UserError) as error:
        model.draw(prompts, **options)
    assert error.value.field == field
    with pytest.raises(UserError) as error:
        fewstep.load(tiny_pipeline, device="cpu", batch=0)
    assert error.value.field == "batch"
