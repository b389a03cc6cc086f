"""What the page's controls do, without a browser."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fewstep

pytest.importorskip("gradio", reason="the extra app is not installed")

from fewstep.common.errors import UserError
from fewstep.web_app.models import Models, Request
from fewstep.web_app.page import Page, Session, guarded
from support.random_lora import random_lora

TYPED = {"seed": 3, "steps": 2, "gamma": 0.3, "omega": 0.0, "size": "64x64", "negative": ""}


@pytest.fixture(scope="module")
def place(tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    shutil.copytree(tiny_pipeline, folder / "teacher")
    random_lora(tiny_pipeline, folder / "first")
    return folder


@pytest.fixture(scope="module")
def page(place: Path) -> Page:
    return Page(Models([place], device="cpu"), place)


def values(place: Path, prompt: str = "three frogs", **changes: Any) -> list[Any]:
    """Return what the controls hold, in the order of the page."""
    return [prompt, str(place / "teacher"), str(place / "first"), *{**TYPED, **changes}.values()]


def test_settings_begin_with_those_of_the_lora(page: Page, place: Path) -> None:
    own = page.models.student(page.models.teacher(str(place / "teacher")), str(place / "first")).sampling
    shown = page.defaults(str(place / "teacher"), str(place / "first"))
    students, steps, gamma, omega, size = shown[1], *shown[4:8]
    assert students["value"] == str(place / "first")
    assert (steps["value"], gamma["value"], omega) == (own.steps, own.gamma, own.omega)
    assert size["value"] == "64x64"


def test_another_teacher_begins_with_the_student_that_fits_it(page: Page, place: Path) -> None:
    student = page.defaults(str(place / "teacher"))[1]
    assert student["value"] == "none"
    bundled = page.defaults("")[1]
    assert bundled["value"] in page.models.bundled_students
    for shown in (student, bundled):
        assert shown["value"] in [value for _, value in shown["choices"]]


@pytest.mark.parametrize(("size", "drawn"), [("96x64", (96, 64)), ("64x96", (64, 96)), (" 96 ", (96, 96))])
def test_sizes(page: Page, place: Path, size: str, drawn: tuple[int, int]) -> None:
    picture, _ = page.draw(Session(), True, *values(place, size=size))
    assert picture.size == drawn


def test_the_teachers_picture_stops_at_a_new_key(page: Page, place: Path) -> None:
    """It draws the same prompt and seed; a newer drawing ends it, and its place stays as it is."""
    session = Session()
    page.draw(session, True, *values(place))
    assert session.drawn is not None
    (student, teacher), _ = page.compare(session, True, 3, 2.0)
    assert student == session.drawn.picture
    own = Request("three frogs", str(place / "teacher"), "none", 3, 3, omega=2.0)
    assert teacher.tobytes() == page.models.draw(own).picture.tobytes()
    calls: list[int] = []
    draw = page.models.draw

    def typing(request: Request, on_call: Any) -> Any:
        def call() -> None:
            calls.append(1)
            session.number += len(calls) == 2
            on_call()

        return draw(request, call)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page.models, "draw", typing)
        with pytest.raises(InterruptedError):
            page.compare(session, True, 3, 2.0)
        assert len(calls) == 2
        calls.clear()
        assert guarded(2, page.compare)(session, True, 3, 2.0)[0] == {"__type__": "update"}


def test_pictures_are_led_away_from_the_negative_prompt(page: Page, place: Path) -> None:
    """The student's at no guidance, and the teacher's beside it at its own."""
    session, plain = Session(), Session()
    page.draw(plain, True, *values(place))
    page.draw(session, True, *values(place, negative="blue squares"))
    model = fewstep.load(place / "teacher", place / "first", device="cpu")
    assert session.drawn is not None
    assert plain.drawn is not None
    (expected,) = model.draw("three frogs", 3, steps=2, gamma=0.3, negative_prompt="blue squares")
    np.testing.assert_array_equal(np.asarray(session.drawn.picture), np.asarray(expected))
    assert session.drawn.picture.tobytes() != plain.drawn.picture.tobytes()
    (_, teacher), _ = page.compare(session, True, 3, 2.0)
    (_, without), _ = page.compare(plain, True, 3, 2.0)
    assert teacher.tobytes() != without.tobytes()


def test_a_sheet_shows_the_pictures_that_are_drawn_one_by_one(page: Page, place: Path) -> None:
    sheets = [sheet for sheet, _ in page.sheet([1, 2], [0.0, 1.0], [], *values(place))]
    assert len(sheets) == 2
    names = [str(place / "first"), "none"]
    (*_, (students, _)) = page.sheet([1, 2], [0.0], names, *values(place))
    assert students.size == sheets[-1].size
    base = Request("three frogs", str(place / "teacher"), str(place / "first"), 3, 2)
    for sheet, changes in ((sheets[-1], {"gamma": 1.0}), (students, {"lora": "none"})):
        expected = page.models.draw(replace(base, **changes)).picture.resize((192, 192), 3)
        np.testing.assert_array_equal(np.asarray(sheet)[-196:-4, -196:-4], np.asarray(expected))
    for empty in ((), [0.0], []), ([1], [], []):
        with pytest.raises(UserError):
            next(page.sheet(*empty, *values(place)))


def test_kept_settings_are_restored(page: Page, place: Path) -> None:
    session = Session()
    page.draw(session, True, *values(place, "a cat <b>above</b> a house", seed=8, gamma=0.7, negative=" blue "))
    files, _ = page.keep(session)
    event: Any = type("Event", (), {"value": {"image": {"path": files[0]}}})
    *restored, about = page.restore(event)
    assert restored == ["a cat <b>above</b> a house", "blue", 8, 2, 0.7, 0.0, "64x64"]
    assert "<b>" not in about
    assert session.drawn is not None
    assert json.loads(session.drawn.text["fewstep"])["student"] == "first"


def test_an_error_is_text_and_changes_nothing_else(page: Page) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("<script>alert(1)</script>")

    kept, shown = guarded(2, broken)()
    assert kept == {"__type__": "update"}
    assert "<script>" not in shown
    assert "&lt;script&gt;" in shown
    with pytest.raises(UserError):
        page.keep(Session())
