"""`fewstep report`: pictures of a page are those of `load`, at the network evaluations that it names."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import fewstep
from fewstep.common.errors import UserError
from fewstep.common.files import read_json
from support import tiny_pipelines

PROMPTS = ["a red disc", "a blue <ring>"]


@pytest.fixture(scope="module")
def runs(tiny_overrides: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("runs")
    words = [*tiny_overrides, "loop.validate_every=null", "optim.lr=0.1", "student.targets=[to_q]"]
    for name, steps in (("four", 4), ("two", 2)):
        fewstep.distill("tcd", out=folder / name, overrides=[*words, f"sampling.steps={steps}"])
    return [folder / "four", folder / "two"]


@pytest.fixture
def prompt_file(tmp_path: Path) -> Path:
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    return tmp_path / "prompts.txt"


def pictures(page: str) -> list[np.ndarray]:
    codes = re.findall(r"data:image/webp;base64,([A-Za-z0-9+/=]+)", page)
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(code))).convert("RGB")) for code in codes]


@pytest.mark.slow
def test_columns_are_the_teacher_at_equal_cost_then_the_students_then_the_teacher(
    runs: list[Path], prompt_file: Path, tiny_pipeline: Path, tmp_path: Path
) -> None:
    out = fewstep.report([str(run) for run in runs], prompt_file=prompt_file, seed=5, out=tmp_path / "page.html")
    text = out.read_text(encoding="utf-8")
    assert "a blue &lt;ring&gt;" in text
    teacher = fewstep.load(tiny_pipeline, None)
    guided: dict[str, Any] = {"omega": 7.0, "sampler": "ddim"}  # the mean that the students were trained with
    columns = [
        teacher.draw(PROMPTS, seeds=5, steps=2, **guided),
        *(fewstep.load(tiny_pipeline, run / "student").draw(PROMPTS, seeds=5) for run in runs),
        teacher.draw(PROMPTS, seeds=5, omega=7.0),
    ]
    wanted = [np.asarray(column[row]) for row in range(2) for column in columns]
    drawn = pictures(text)
    assert len(drawn) == len(wanted)
    for own, other in zip(drawn, wanted, strict=True):
        np.testing.assert_array_equal(own, other)
    costs = re.findall(r"<small>(\d+) steps?, (\d+) network", text)
    assert costs[:3] == [("2", "4"), ("4", "4"), ("2", "2")]
    counted = read_json(runs[0] / "evaluations.json")["a_sample_and_step"]
    assert f"<td>{sum(counted.values()):.4g}</td>" in text


def test_what_cannot_be_compared_is_refused(
    runs: list[Path], prompt_file: Path, tiny_overrides: list[str], tmp_path: Path
) -> None:
    other = tiny_pipelines.sd(tmp_path / "sd")
    words = [*tiny_overrides, "loop.validate_every=null", "student.targets=[to_q]", "loop.steps=1"]
    words = [word for word in words if not word.startswith("teacher=")]
    fewstep.distill("tcd", out=tmp_path / "other", teacher=other, overrides=words)
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "config.yaml").write_text(f"teacher: {other}\n")
    good = str(runs[0])
    cases: list[tuple[Any, dict[str, Any], str]] = [
        ([good, str(tmp_path / "other")], {}, "runs"),
        (str(tmp_path / "new"), {}, "runs"),
        (str(tmp_path), {}, "run"),
        ([], {}, "runs"),
        (good, {"out": tmp_path / "page.pdf"}, "out"),
        (good, {"steps": 60}, "steps"),
    ]
    for named, options, field in cases:
        with pytest.raises(UserError) as refused:
            fewstep.report(named, prompt_file=prompt_file, **{"out": tmp_path / "page.html", **options})
        assert refused.value.field == field, str(refused.value)
    assert not (tmp_path / "page.html").exists()
