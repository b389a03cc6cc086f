"""What the page may read and draw with; without the page."""

from __future__ import annotations

import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import fewstep
from fewstep.common.errors import UserError
from fewstep.web_app.models import Models, Request
from support.random_lora import random_lora


@pytest.fixture(scope="module")
def place(tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a teacher and two students of it."""
    folder = tmp_path_factory.mktemp("place")
    shutil.copytree(tiny_pipeline, folder / "teacher")
    random_lora(tiny_pipeline, folder / "first")
    shutil.copytree(folder / "first", folder / "second")
    return folder


@pytest.fixture
def models(place: Path) -> Models:
    return Models([place], device="cpu")


def asked(place: Path, **changes: object) -> Request:
    first = Request("three frogs", str(place / "teacher"), str(place / "first"), seed=4, steps=2)
    return replace(first, **changes)


@pytest.mark.parametrize(
    "outside", ["/etc/passwd", "../other", "teacher/../../other", "link", "~", "owner/name", "gone"]
)
def test_paths_outside_the_folders_are_refused(tmp_path: Path, outside: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether they exist or not, also through links and hub ids: a page reads what was named at its start."""
    inner, other = tmp_path / "inner", tmp_path / "other"
    (inner / "teacher").mkdir(parents=True)
    other.mkdir()
    (inner / "link").symlink_to(other)
    monkeypatch.chdir(inner)
    models = Models([inner])
    assert models.check("teacher", "teacher") == str(inner / "teacher")
    for field, work in (
        ("teacher", lambda: models.teacher(outside)),
        ("lora", lambda: models.check("lora", outside)),
        ("teacher", lambda: models.draw(Request("a", outside, "none"))),
    ):
        with pytest.raises(UserError) as error:
            work()
        assert error.value.field == field
    assert Models([inner], [str(other)]).check("lora", str(other)) == str(other), "named at start"
    with pytest.raises(UserError) as error:
        Models([tmp_path / "gone"])
    assert error.value.field == "folders"


def test_menus_offer_what_fits(models: Models, place: Path) -> None:
    teacher = models.teacher(str(place / "teacher"))
    teachers, students, runs = models.menus(teacher)
    assert ("teacher", str(place / "teacher")) in teachers
    assert [value for _, value in students] == ["none", str(place / "first"), str(place / "second")]
    assert runs == []
    world = fewstep.load(device="cpu").generator.backbone.folder
    fitting = [value for _, value in models.menus(world)[1]]
    assert str(place / "first") not in fitting, "of another base"
    assert set(models.bundled_students) < set(fitting)


def test_pictures_settings_and_times(models: Models, place: Path) -> None:
    drawn = models.draw(asked(place, gamma=0.9))
    (expected,) = fewstep.load(place / "teacher", place / "first", device="cpu").draw(
        "three frogs", 4, steps=2, gamma=0.9
    )
    np.testing.assert_array_equal(np.asarray(drawn.picture), np.asarray(expected))
    assert drawn.evaluations == 2
    assert drawn.seconds > 0
    inside = json.loads(drawn.text["fewstep"])
    assert (inside["prompt"], inside["seed"], inside["sampling"]["gamma"]) == ("three frogs", 4, 0.9)
    teacher = models.draw(asked(place, lora="none", omega=3.0))
    assert teacher.evaluations == 4, "guided calls count two"
    assert (np.asarray(teacher.picture) != np.asarray(expected)).any()


def test_few_networks_stay_in_memory(models: Models, place: Path) -> None:
    """One for each student, of one teacher; and a student that a run has improved is read again."""
    for lora in ("first", "second", "first"):
        models.draw(asked(place, lora=str(place / lora)))
    first, second = models._loaded._loaded.values()
    assert first.generator.backbone.vae is second.generator.backbone.vae
    file = place / "first" / "pytorch_lora_weights.safetensors"
    for later in (10, 20, 30):
        os.utime(file, (file.stat().st_atime, file.stat().st_mtime + later))
        models.draw(asked(place))
    assert len(models._loaded._loaded) == 3
    assert list(models._loaded._loaded.values())[-1] is not first


def test_it_goes_on_after_an_error(models: Models, place: Path) -> None:
    before = models.draw(asked(place)).picture
    for wrong in ({"steps": 0}, {"size": (63, 64)}, {"prompt": " "}, {"lora": str(place)}):
        with pytest.raises(UserError):
            models.draw(asked(place, **wrong))

    def fail() -> None:
        raise RuntimeError("injected")

    with pytest.raises(RuntimeError, match="injected"):
        models.draw(asked(place), fail)
    assert models.draw(asked(place)).picture.tobytes() == before.tobytes()


def test_one_drawing_at_a_time_in_order(models: Models, place: Path) -> None:
    """Visitors do not overtake each other, and do not compute at the same time."""
    models.draw(asked(place))
    drawing: list[int] = []
    order: list[int] = []

    def visit(number: int) -> None:
        def call() -> None:
            order.append(number)
            assert drawing in ([], [number])
            drawing[:] = [number]
            if order.count(number) == 2:
                drawing.clear()

        models.draw(asked(place, seed=number), call)

    with ThreadPoolExecutor(4) as visitors:
        for future in [visitors.submit(visit, number) for number in range(4)]:
            future.result()
    assert order == sorted(order, key=order.index)
    assert sorted(order) == [0, 0, 1, 1, 2, 2, 3, 3]
