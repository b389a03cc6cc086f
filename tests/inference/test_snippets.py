"""Copied commands and code draw the picture that they were copied from."""

from __future__ import annotations

import ast
import shlex
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

import fewstep
from fewstep.backbones.pipeline_folder import read_folder
from fewstep.commands import app as cli
from fewstep.inference.snippets import as_code, as_command
from fewstep.students.resolve import resolve_student
from support.random_lora import random_lora

HOSTILE = """it's "red" $(touch x) `touch y`; \\ {0} 红 #\n'''a disc'''"""


@pytest.fixture(scope="module")
def loras(tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A student of ours, and the same weights as another tool's file, without settings."""
    place = tmp_path_factory.mktemp("loras")
    own = random_lora(tiny_pipeline, place / "own it's")
    save_file(load_file(own), place / "other.safetensors")
    return {"own": own.parent, "other": place / "other.safetensors"}


def drawn(teacher: Path, lora: Path | None, prompt: str, seed: int, settings: dict[str, Any]) -> np.ndarray:
    (picture,) = fewstep.load(teacher, lora, device="cpu").draw(prompt, seed, **settings)
    return np.asarray(picture)


@pytest.mark.parametrize(("lora", "negative"), [("own", ""), ("own", '--it\'s "blue"'), (None, "")])
def test_the_command_draws_the_same(
    tiny_pipeline: Path,
    loras: dict[str, Path],
    lora: str | None,
    negative: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    place = loras[lora] if lora else None
    settings = {"steps": 2, "size": (96, 64), **({"gamma": 0.7} if lora else {"omega": 1.5})}
    text = as_command(HOSTILE, 11, settings, negative, teacher=tiny_pipeline, student=place or "none")
    words = subprocess.run(
        ["bash", "-c", f'fewstep() {{ printf "%s\\0" "$@"; }}\n{text}'], capture_output=True, text=True, check=True
    ).stdout.split("\0")[:-1]
    assert words == shlex.split(text)[1:]
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(SystemExit) as ended:
        cli.main([*words, "--scale", "1", "--device", "cpu"])
    assert ended.value.code == 0
    picture = np.asarray(Image.open("picture.png").convert("RGB"))
    expected = drawn(tiny_pipeline, place, HOSTILE, 11, settings | {"negative_prompt": negative})
    np.testing.assert_array_equal(picture, expected)


@pytest.mark.parametrize(
    ("lora", "negative", "omega"),
    [("own", "", 0), ("other", "", 0), (None, "", 0), ("own", "it's blue", 0), ("own", "it's blue", 2.0)],
)
def test_the_code_draws_the_same(
    tiny_pipeline: Path, loras: dict[str, Path], lora: str | None, negative: str, omega: float
) -> None:
    """By diffusers for students, by fewstep for a teacher's solver."""
    place = loras[lora] if lora else None
    folder = read_folder(tiny_pipeline)
    settings = {"steps": 3, **({"gamma": 0.4, "size": (96, 64)} if lora else {"omega": 2.0})}
    settings |= {"omega": omega} if omega else {}
    student, sampling, _ = resolve_student(folder, place, settings)
    text = as_code("a red disc", 12, settings, negative, folder=folder, student=student, sampling=sampling)
    assert ("diffusers" in text) == (lora is not None)
    names: dict[str, Any] = {}
    exec(compile(text, "copied", "exec"), names)
    settings |= {"negative_prompt": negative}
    picture, expected = np.asarray(names["picture"]), drawn(tiny_pipeline, place, "a red disc", 12, settings)
    assert picture.shape == expected.shape
    assert np.abs(picture.astype(int) - expected.astype(int)).max() <= 2
    assert (expected != drawn(tiny_pipeline, place, "a red disc", 13, settings)).any()


def test_a_prompt_is_data_in_the_code(tiny_pipeline: Path, loras: dict[str, Path]) -> None:
    folder = read_folder(tiny_pipeline)
    for place in (loras["own"], None):
        student, sampling, _ = resolve_student(folder, place, {})
        code = ast.parse(as_code(HOSTILE, 1, {}, folder=folder, student=student, sampling=sampling))
        assert HOSTILE in [node.value for node in ast.walk(code) if isinstance(node, ast.Constant)]
