"""`fewstep sample`: guidance, sizes, and files with their settings inside."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import fewstep
from fewstep.backbones.base import load_backbone
from fewstep.inference import generator
from fewstep.inference.picture_files import student_name
from support import tiny_pipelines
from support.random_lora import random_lora


@pytest.fixture(scope="module")
def few(tiny_pipeline: Path) -> dict[str, Any]:
    return {"teacher": tiny_pipeline, "lora": None, "steps": 2, "scale": 1, "device": "cpu"}


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def inside(path: Path) -> dict[str, Any]:
    with Image.open(path) as picture:
        found: dict[str, Any] = json.loads(picture.text["fewstep"])  # type: ignore[attr-defined]
    return found


def test_guidance_scale_is_omega_and_one(few: dict[str, Any], tmp_path: Path) -> None:
    for scale, omega in ((7.5, 6.5), (1.0, 0.0), (0.0, 0.0)):
        by_scale = fewstep.sample("a red disc", out=tmp_path / "a.png", guidance_scale=scale, **few)
        by_omega = fewstep.sample("a red disc", out=tmp_path / "b.png", omega=omega, **few)
        np.testing.assert_array_equal(pixels(by_scale), pixels(by_omega))


def test_a_negative_prompt_is_the_unconditional_branch(few: dict[str, Any], tmp_path: Path) -> None:
    """Away from the prompt itself there is nothing to guide: any omega then draws as none does."""
    plain = fewstep.sample("a red disc", out=tmp_path / "plain.png", omega=0.0, **few)
    itself = fewstep.sample("a red disc", out=tmp_path / "a.png", omega=5.0, negative_prompt="a red disc", **few)
    other = fewstep.sample("a red disc", out=tmp_path / "b.png", omega=5.0, negative_prompt="blue", **few)
    empty = fewstep.sample("a red disc", out=tmp_path / "c.png", omega=5.0, **few)
    assert np.abs(pixels(plain) - pixels(itself)).max() <= 1
    assert np.abs(pixels(other) - pixels(empty)).mean() > 0.5
    assert inside(other)["negative_prompt"] == "blue"


def test_a_negative_prompt_has_the_shape_of_the_null(tmp_path: Path) -> None:
    """Of every family with an unconditional branch."""
    for name in ("sd", "sdxl", "pixart", "sd3", "sana"):
        teacher = tiny_pipelines.FAMILIES[name](tmp_path / name / "teacher")
        backbone = load_backbone(teacher)
        null, own = backbone.null(1), backbone.encode(["blue"])
        assert {key: value.shape for key, value in null.items()} == {key: value.shape for key, value in own.items()}


def test_width_and_height_are_the_size(few: dict[str, Any], tmp_path: Path) -> None:
    by_sides = fewstep.sample("a red disc", out=tmp_path / "a.png", width=96, height=48, **few)
    by_size = fewstep.sample("a red disc", out=tmp_path / "b.png", settings={"size": [96, 48]}, **few)
    assert pixels(by_sides).shape == (48, 96, 3)
    np.testing.assert_array_equal(pixels(by_sides), pixels(by_size))
    one = fewstep.sample("a red disc", out=tmp_path / "c.png", height=48, **few)
    assert pixels(one).shape == (48, 64, 3), "the other side is the trained one"


def test_a_folder_of_numbered_pictures_goes_on(
    few: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is the picture that its own seed draws alone, however many are drawn at once."""
    monkeypatch.setattr("fewstep.commands.sample.AT_ONCE", 2)
    words = {**few, "count": 2, "prompts": ["a red disc", "a blue bar"]}
    place = fewstep.sample(out=tmp_path / "pictures", seed=7, **words)
    fewstep.sample(out=tmp_path / "pictures", seed=1, **words)
    files = sorted(place.iterdir())
    assert [file.name for file in files] == [f"{number:05d}.png" for number in range(1, 9)]
    assert [(inside(file)["prompt"], inside(file)["seed"]) for file in files] == [
        (prompt, seed + number)
        for seed in (7, 1)
        for number, prompt in enumerate(["a red disc", "a red disc", "a blue bar", "a blue bar"])
    ]
    alone = fewstep.sample("a blue bar", out=tmp_path / "alone.png", seed=9, **few)
    assert np.abs(pixels(files[2]) - pixels(alone)).max() <= 1


def test_a_picture_is_drawn_again_from_what_it_holds(tiny_pipeline: Path, tmp_path: Path) -> None:
    lora = random_lora(tiny_pipeline, tmp_path / "runs" / "mine" / "student")
    words = {"teacher": tiny_pipeline, "lora": lora, "scale": 1, "device": "cpu"}
    first = fewstep.sample("a red, green disc", out=tmp_path / "a.png", steps=3, gamma=0.7, seed=5, **words)
    held = inside(first)
    again = fewstep.sample(
        held["prompt"], out=tmp_path / "b.png", seed=held["seed"], settings=held["sampling"], **words
    )
    np.testing.assert_array_equal(pixels(first), pixels(again))
    assert (held["student"], held["teacher"], held["size"]) == ("mine", "tiny", [64, 64])
    with Image.open(first) as picture:
        text, pairs = picture.text["parameters"].split("\n")  # type: ignore[attr-defined]
    assert text == "a red, green disc"
    assert dict(pair.split(": ") for pair in pairs.split(", ")) == {
        "Steps": "3", "Sampler": "TCD", "CFG scale": "1", "Seed": "5", "Size": "64x64", "Gamma": "0.7",
        "Model": "tiny", "Lora": "mine",
    }  # fmt: skip


@pytest.mark.parametrize(("kind", "apart"), [("jpg", 12), ("webp", 0)])
def test_other_formats(few: dict[str, Any], tmp_path: Path, kind: str, apart: int) -> None:
    fewstep.sample("a red disc", out=tmp_path / "png", **few)
    fewstep.sample("a red disc", out=tmp_path / kind, format=kind, **few)
    fewstep.sample("a red disc", out=tmp_path / f"one.{kind}", **few)
    plain = pixels(tmp_path / "png" / "00001.png")
    for file in (tmp_path / kind / f"00001.{kind}", tmp_path / f"one.{kind}"):
        assert np.abs(pixels(file) - plain).mean() <= apart


def test_pictures_that_are_drawn_are_kept(few: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fewstep.commands.sample.AT_ONCE", 1)
    plain = generator.ImageGenerator.draw

    def draw(self: Any, prompts: Any, seeds: Any, *rest: Any) -> Any:
        if list(seeds) == [2]:
            raise KeyboardInterrupt
        return plain(self, prompts, seeds, *rest)

    monkeypatch.setattr(generator.ImageGenerator, "draw", draw)
    with pytest.raises(KeyboardInterrupt):
        fewstep.sample("a red disc", out=tmp_path / "pictures", count=4, **few)
    assert [file.name for file in sorted((tmp_path / "pictures").iterdir())] == ["00001.png", "00002.png"]


@pytest.mark.parametrize(
    ("place", "name"),
    [
        ("runs/tcd", "tcd"),
        ("runs/tcd/student", "tcd"),
        ("runs/tcd/best", "tcd"),
        ("runs/tcd/student/pytorch_lora_weights.safetensors", "tcd"),
        ("loras/mine.safetensors", "mine"),
        ("exports/v1.5", "v1.5"),
    ],
)
def test_names_of_students(place: str, name: str) -> None:
    assert student_name(Path(place)) == name
