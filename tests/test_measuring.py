"""`fewstep evaluate` on a small pipeline: what is compared with what, and what is refused before anything is drawn."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fewstep import api, measuring
from fewstep.drawing import Artist, load_artist
from fewstep.errors import UserError
from fewstep.evaluation.detail import edge_density
from fewstep.files import read_json, write_json
from fewstep.settings import TEACHER_SAMPLING
from pooled import Pooled

PROMPTS = [f"a {colour} {shape}" for colour in ("red", "green", "blue") for shape in ("disc", "ring", "bar", "square")]
FEW: dict[str, Any] = {"steps": 2, "omega": 1.0}


@pytest.fixture
def prompt_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(measuring, "Lite0Backbone", Pooled)
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(PROMPTS) + "\n", encoding="utf-8")
    return file


def test_a_pipeline_beside_a_folder_and_itself(
    prompt_file: Path, tiny_pipeline: Path, picture_folder: Path, tmp_path: Path
) -> None:
    figures = api.evaluate(
        prompt_file=prompt_file, out=tmp_path / "out", lora=None, teacher=str(tiny_pipeline), real=picture_folder,
        reference=tiny_pipeline, reference_omega=1.0, seed=3, device="cpu",
        settings=FEW | {"steps": TEACHER_SAMPLING.steps},
    )  # fmt: skip
    sampling = TEACHER_SAMPLING.model_copy(update={"omega": 1.0})
    pictures = load_artist(tiny_pipeline).draw(PROMPTS, range(3, 15), sampling)
    assert figures["detail: edges"].value == pytest.approx(edge_density(pictures).mean())
    assert figures["detail: edges"].n == len(PROMPTS)
    assert figures["to teacher: pixels"].value == 0, "the same pipeline, settings and noise"
    assert figures["KID-Lite0 (to teacher)"].value != 0, "sets are compared with pictures from other noise"
    assert figures["diversity-Lite0"].n == len(PROMPTS)
    assert not [name for name in figures if name.startswith("FD")], "too few pictures"
    written = read_json(tmp_path / "out" / "figures.json")
    assert written["tiny 50 steps"]["detail: edges"]["value"] == figures["detail: edges"].value
    scale = [written[name]["detail: edges"]["value"] for name in ("blurred, radius 1", "real", "noised, sigma 10")]
    assert scale == sorted(scale)


def test_too_little_or_another_size_is_refused_before_anything_is_drawn(
    prompt_file: Path, tiny_pipeline: Path, picture_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(*_: Any, **__: Any) -> np.ndarray:
        raise AssertionError("drawn")

    monkeypatch.setattr(Artist, "draw", forbidden)

    def refused(words: str, **changes: Any) -> None:
        given = {"prompt_file": prompt_file, "real": picture_folder, "teacher": str(tiny_pipeline)} | changes
        with pytest.raises(UserError, match=words):
            api.evaluate(out=tmp_path / "out", lora=None, device="cpu", settings=FEW, **given)

    few = tmp_path / "few"
    few.mkdir()
    for file in sorted(picture_folder.glob("*.png"))[:5]:
        shutil.copy(file, few)
    refused(r"holds 5 pictures; KID needs at least 10", real=few)
    short = tmp_path / "short.txt"
    short.write_text("a red disc\n", encoding="utf-8")
    refused(r"holds 1 prompts; KID needs at least 10", prompt_file=short)
    large = tmp_path / "large"
    shutil.copytree(tiny_pipeline, large)
    config = read_json(large / "unet" / "config.json")
    write_json(large / "unet" / "config.json", {**config, "sample_size": 16})
    refused(r"draws 128 pixels a side, the student 64", reference=large)
