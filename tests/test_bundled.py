"""The bundled teacher itself: it draws what it is asked for, and a distillation of it moves the metric."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fewstep import api
from fewstep.drawing import Artist, load_artist
from fewstep.evaluation.teacher import pixel_rmse
from fewstep.settings import TEACHER_SAMPLING, Sampling
from fewstep.world import emoji8, location
from fewstep.world.students import law, students_omega

TAUGHT = 48
"""Pictures of the short distillation, whose captions are drawn too."""
FEW = {"sampler": "sss", "steps": 2, "gamma": 0.2, "spacing": "grid", "end": "index0"}


@pytest.fixture(scope="module")
def teacher() -> Artist:
    return load_artist(location.root() / "teacher")


@pytest.fixture(scope="module")
def captioned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A folder of training pictures, and their captions."""
    folder = tmp_path_factory.mktemp("taught")
    data = emoji8.load("train")
    chosen = range(0, len(data), len(data) // TAUGHT)[:TAUGHT]
    captions = [emoji8.name_with_style(data.records[i]) for i in chosen]
    lines = []
    for i, caption in zip(chosen, captions, strict=True):
        Image.fromarray(data.pictures[i]).save(folder / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "text": caption}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder, captions


def test_a_short_distillation_moves_the_metric(
    teacher: Artist, captioned: tuple[Path, list[str]], tmp_path: Path
) -> None:
    """Two calls of a student land nearer to the teacher's end points than two guided calls of the teacher."""
    folder, prompts = captioned
    changes = ["loop.steps=24", "loop.batch=16", "loop.precision=fp32", "loop.watch_every=null", "optim.ema=null"]
    lora = api.distill("tcd", out=tmp_path / "run", config=law(), overrides=[f"data.source={folder}", *changes])
    assert isinstance(lora, Path)
    seeds = range(len(prompts))
    omega = students_omega()
    end_points = teacher.draw(prompts, seeds, TEACHER_SAMPLING.model_copy(update={"steps": 16, "omega": omega}))

    def distance(artist: Artist, omega: float) -> np.ndarray:
        return pixel_rmse(artist.draw(prompts, seeds, Sampling(**FEW, omega=omega)), end_points)

    student = distance(load_artist(location.root() / "teacher", lora), 0.0)
    untaught, guided = distance(teacher, 0.0), distance(teacher, omega)
    print(student.mean(), untaught.mean(), guided.mean())
