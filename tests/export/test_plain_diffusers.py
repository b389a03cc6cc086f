"""The plain-diffusers script of docs/guide/diffusers.md and `fewstep sample` draw the same picture.

The script runs in its own process and imports nothing of this project.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import fewstep as api
from support.random_lora import random_lora

ROOT = Path(__file__).resolve().parents[2]
GUIDE = ROOT / "docs" / "guide" / "diffusers.md"
AFTER = """
import sys

assert "fewstep" not in sys.modules
picture.save(sys.argv[1])
"""


def guide_script() -> str:
    """Return the first script of the guide."""
    return re.findall(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.S)[0]


def script_for(teacher: Path, lora: Path, prompt: str) -> str:
    """Return the guide's script with these in place of the bundled teacher, its student and the prompt."""
    script = guide_script()
    for named, given in (
        ("world/teacher", str(teacher)),
        ("world/students/tcd", str(lora)),
        ("an octopus, noto style", prompt),
    ):
        assert script.count(f'"{named}"') == 1
        script = script.replace(f'"{named}"', repr(given))
    return script + AFTER


@pytest.mark.slow
def test_a_script_without_fewstep_draws_the_same_picture(tiny_pipeline: Path, tmp_path: Path) -> None:
    lora = random_lora(tiny_pipeline, tmp_path / "student")
    out, theirs = tmp_path / "ours.png", tmp_path / "theirs.png"
    api.sample(["a red disc"], out=out, lora=lora, teacher=str(tiny_pipeline), seed=0, scale=1)
    script = tmp_path / "script.py"
    script.write_text(script_for(tiny_pipeline, lora.parent, "a red disc"), encoding="utf-8")
    subprocess.run([sys.executable, str(script), str(theirs)], check=True, timeout=120)
    ours = np.asarray(Image.open(out)).astype(np.float32)  # the sheet's white margin
    wanted = np.asarray(Image.open(theirs)).astype(np.float32)
    assert ours.std() > 5  # not a flat picture
    np.testing.assert_allclose(ours, wanted, atol=1.0)

    plain = tmp_path / "plain.png"
    api.sample(
        ["a red disc"], out=plain, lora=None, teacher=str(tiny_pipeline), seed=0, scale=1,
        settings={"sampler": "sss", "steps": 4, "gamma": 0.3, "omega": 0.0, "spacing": "grid", "end": "index0"},
    )  # fmt: skip
    without = np.asarray(Image.open(plain)).astype(np.float32)
    assert np.abs(without - ours).mean() > 2  # the LoRA matters


@pytest.mark.slow
def test_the_script_draws_what_fewstep_draws_with_the_bundled_pair(tmp_path: Path) -> None:
    """The unchanged script, from the checkout's root."""
    (tmp_path / "script.py").write_text(guide_script() + AFTER, encoding="utf-8")
    ours, theirs = tmp_path / "ours.png", tmp_path / "theirs.png"
    command = [sys.executable, str(tmp_path / "script.py"), str(theirs)]
    subprocess.run(command, check=True, timeout=120, cwd=ROOT)
    api.sample(["an octopus, noto style"], out=ours, seed=0, scale=1)
    drawn = np.asarray(Image.open(ours)).astype(np.float32)
    assert drawn.std() > 20
    np.testing.assert_allclose(drawn, np.asarray(Image.open(theirs)).astype(np.float32), atol=1.0)
