"""The page in a real browser: what a person types is what is drawn, and nothing else happens."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("gradio", reason="the extra app is not installed")
pytest.importorskip("selenium", reason="selenium is not installed")

from fewstep.common.errors import UserError
from fewstep.web_app.models import Drawn, Models, Request
from fewstep.web_app.page import build
from fewstep.web_app.server import listen
from support.page import CHROMIUM, DRIVER, Visitor, chromium, served
from support.random_lora import random_lora

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no chromium and chromedriver; .ci/run installs them"),
]


@pytest.fixture(scope="module")
def place(tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a teacher, a student and a run, and one outside of what the page may read."""
    folder = tmp_path_factory.mktemp("place")
    shutil.copytree(tiny_pipeline, folder / "in" / "teacher")
    random_lora(tiny_pipeline, folder / "in" / "first")
    shutil.copytree(folder / "in", folder / "out")
    run = folder / "in" / "run"
    run.mkdir()
    (run / "config.yaml").write_text("loop: {steps: 9}\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def models(place: Path) -> Models:
    return Models([place / "in"], device="cpu")


@pytest.fixture(scope="module")
def driver() -> Iterator[Any]:
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def address(models: Models, place: Path) -> Iterator[str]:
    kept = place / "kept"
    kept.mkdir()
    blocks = build(models, kept, str(place / "in" / "teacher"), str(place / "in" / "first"), "")
    with served(blocks, kept) as found:
        yield found


@pytest.fixture
def visitor(driver: Any, address: str) -> Visitor:
    return Visitor(driver, address)


def asked(place: Path, prompt: str, **changes: Any) -> Request:
    settings = {"seed": 0, "steps": 4, "gamma": 0.3, **changes}
    return Request(prompt, str(place / "in" / "teacher"), str(place / "in" / "first"), **settings)


def test_typing_draws_the_newest_prompt(visitor: Visitor, models: Models, place: Path) -> None:
    visitor.type("three frogs on yellow")
    last = models.draw(asked(place, "three frogs on yellow")).picture
    visitor.wait(lambda: visitor.shows(last))
    visitor.set("steps", 2)
    visitor.set("seed", 9)
    changed = models.draw(asked(place, "three frogs on yellow", steps=2, seed=9)).picture
    visitor.wait(lambda: visitor.shows(changed))
    assert "2 network evaluations" in visitor.text("status")


def test_not_every_keystroke_is_drawn(visitor: Visitor, models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a picture is drawn, only the newest of the prompts that are typed meanwhile waits."""
    drawn: list[str] = []
    draw = models.draw

    def slow(request: Request, *rest: Any) -> Drawn:
        drawn.append(request.prompt)
        time.sleep(1)
        return draw(request, *rest)

    monkeypatch.setattr(models, "draw", slow)
    visitor.type("a cat above a rocket")
    visitor.wait(lambda: drawn and drawn[-1] == "a cat above a rocket")
    assert len(drawn) < 6
    assert drawn == sorted(drawn, key=len)


def test_the_seed_is_kept_or_new(visitor: Visitor) -> None:
    def seed() -> str:
        return str(visitor.find("#seed input").get_attribute("value"))

    visitor.type("an apple")
    visitor.wait(lambda: visitor.text("status").endswith("seed 0"))
    visitor.click("again")
    visitor.wait(lambda: seed() != "0" and visitor.text("status").endswith(f"seed {seed()}"))
    visitor.tick("lock")
    visitor.type("s")
    visitor.wait(lambda: "seed" in visitor.text("status") and not visitor.text("status").endswith(f"seed {seed()}"))


def test_teacher_beside_student(visitor: Visitor, models: Models, place: Path) -> None:
    visitor.type("a rocket on red checks")
    visitor.tick("beside")
    visitor.set("more", 3)
    visitor.wait(lambda: "teacher: 6 network evaluations" in visitor.text("times"))
    assert "student: 4 network evaluations" in visitor.text("times")
    pair = visitor.wait(lambda: visitor.driver.find_elements("css selector", "#pair img"))
    assert len({image.get_attribute("src") for image in pair}) == 2


def test_what_a_person_types_is_text(visitor: Visitor, place: Path) -> None:
    """In the line of an error, in menus, in copied code, in the gallery and in its settings."""
    script = "<img src=x onerror=window.broken=1><script>window.broken=1</script>"
    visitor.type(script)
    visitor.set("seed", 5)
    visitor.wait(lambda: visitor.text("status").endswith("seed 5"))  # of the whole prompt: no picture follows
    visitor.click("keep")
    visitor.wait(lambda: "kept" in visitor.text("status"))
    visitor.click("command")
    visitor.wait(lambda: "onerror" in visitor.text("copied"))
    visitor.choose("teacher", script)
    visitor.wait(lambda: "onerror" in visitor.text("about"))
    visitor.tab("Gallery")
    visitor.wait(lambda: visitor.find("#gallery .thumbnail-item, #gallery button img")).click()
    visitor.wait(lambda: "onerror" in visitor.text("inside"))
    assert visitor.driver.execute_script("return window.broken") is None
    assert not visitor.driver.find_elements("css selector", "img[src='x']")


def test_kept_pictures_hold_their_settings(visitor: Visitor, models: Models, place: Path) -> None:
    visitor.set("seed", 77)
    visitor.type("two sailboats")
    expected = models.draw(asked(place, "two sailboats", seed=77))
    visitor.wait(lambda: visitor.shows(expected.picture))
    visitor.click("keep")
    visitor.wait(lambda: "kept" in visitor.text("status"))
    newest = max((place / "kept").glob("*.png"))
    with Image.open(newest) as picture:
        np.testing.assert_array_equal(np.asarray(picture), np.asarray(expected.picture))
        inside = json.loads(picture.text["fewstep"])
    assert (inside["prompt"], inside["seed"], inside["sampling"]["steps"]) == ("two sailboats", 77, 4)
    visitor.set("seed", 1)
    visitor.type("something else", clear=True)
    visitor.tab("Gallery")
    visitor.wait(lambda: visitor.find("#gallery .thumbnail-item, #gallery button img")).click()
    visitor.wait(lambda: visitor.text("inside"))
    visitor.tab("Draw")
    visitor.wait(lambda: visitor.shows(expected.picture))


def test_a_sheet_of_steps_and_gamma(visitor: Visitor) -> None:
    visitor.type("a doggy")
    visitor.tab("Sheet")
    visitor.click("sheet")
    visitor.wait(lambda: "3 of 3" in visitor.text("progress"))
    visitor.wait(lambda: visitor.find("#tiles img").get_property("naturalHeight") > 3 * 192)  # 0 until it is loaded
    assert visitor.find("#tiles img").get_property("naturalWidth") > 4 * 192


def test_a_run_is_watched_while_it_trains(visitor: Visitor, place: Path) -> None:
    run, log = place / "in" / "run", place / "in" / "run" / "log.jsonl"
    log.write_text('{"step": 1, "time": 1, "student/loss": 0.5}\n', encoding="utf-8")
    visitor.driver.refresh()
    visitor.wait(lambda: visitor.text("about"))
    visitor.tab("Run")
    visitor.choose("run", str(run))
    visitor.wait(lambda: "step 1 of 9" in visitor.text("state"))
    with log.open("a", encoding="utf-8") as stream:
        stream.write('{"step": 7, "time": 2, "student/loss": 0.4}\n{"step": 7, "time": 3, "validation/kid": 0.1}\n')
    (run / "best").mkdir(exist_ok=True)
    (run / "best" / "figures.json").write_text('{"step": 7, "kid": 0.1}', encoding="utf-8")
    (run / "grids").mkdir(exist_ok=True)
    Image.new("RGB", (321, 123)).save(run / "grids" / "step-00000007.webp")
    visitor.wait(lambda: "step 7 of 9" in visitor.text("state"))
    assert "kid 0.1" in visitor.text("state")
    visitor.wait(lambda: visitor.find("#grid img").get_property("naturalWidth") == 321)


def test_folders_that_were_not_named_stay_closed(visitor: Visitor, place: Path, address: str) -> None:
    visitor.type("three frogs")
    visitor.wait(lambda: "evaluations" in visitor.text("status"))
    for menu in ("student", "teacher"):
        outside = str(place / "out" / ("teacher" if menu == "teacher" else "first"))
        visitor.choose(menu, outside)
        visitor.wait(lambda outside=outside: outside in visitor.text("about"))
        assert visitor.find("#about .error")
    (place / "in" / "note.txt").write_text("secret", encoding="utf-8")
    (place / "kept" / "note.txt").write_text("kept", encoding="utf-8")
    for file in (place / "out" / "first" / "note.txt", place / "in" / "note.txt", Path("/etc/passwd")):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(f"{address}/gradio_api/file={file}")
        assert refused.value.code in (403, 404)


def test_it_answers_after_errors(
    visitor: Visitor, models: Models, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = models.draw
    errors = iter([RuntimeError("out of luck"), UserError("steps = 9 is too many"), MemoryError("no room")])

    def failing(request: Request, *rest: Any) -> Drawn:
        for error in errors:
            raise error
        return draw(request, *rest)

    monkeypatch.setattr(models, "draw", failing)
    for letter, message in zip("abc", ("RuntimeError: out of luck", "steps = 9 is too many", "MemoryError: no room")):
        visitor.type(letter)
        visitor.wait(lambda message=message: visitor.text("status") == message)
    visitor.type("d")
    last = draw(asked(place, "abcd")).picture
    visitor.wait(lambda: visitor.shows(last))
    assert not visitor.driver.find_elements("css selector", "#status .error")


def test_the_browser_loads_nothing_from_elsewhere(visitor: Visitor, address: str) -> None:
    visitor.type("three frogs")
    visitor.wait(lambda: "evaluations" in visitor.text("status"))
    entries = [json.loads(entry["message"])["message"] for entry in visitor.driver.get_log("performance")]
    asked_for = [
        entry["params"]["request"]["url"] for entry in entries if entry["method"] == "Network.requestWillBeSent"
    ]
    assert len(asked_for) > 10
    assert [url for url in asked_for if not url.startswith((address, "data:", "blob:"))] == []


def test_other_names_of_this_machine_are_refused(address: str) -> None:
    """A page of another site, whose name leads to this machine, reads nothing."""
    for host, code in (("evil.example", 400), ("localhost:1", 200)):
        request = urllib.request.Request(address, headers={"Host": host})
        try:
            with urllib.request.urlopen(request) as answer:
                found = answer.status
                assert "default-src 'self'" in answer.headers["content-security-policy"]
        except urllib.error.HTTPError as error:
            found = error.code
        assert found == code, host


def test_a_port_in_use_is_refused() -> None:
    with listen("127.0.0.1", 0) as first:
        with pytest.raises(UserError) as error:
            listen("127.0.0.1", first.getsockname()[1])
        assert error.value.field == "port"
    for host, port, field in (
        ("no.such.host.example", 0, "host"),
        ("192.0.2.1", 0, "host"),
        ("127.0.0.1", 70000, "port"),
    ):
        with pytest.raises(UserError) as error:
            listen(host, port)
        assert error.value.field == field


OFFLINE = """
import socket, sys
def refused(self, place, *rest):
    if self.family != socket.AF_UNIX and place[0] not in ("127.0.0.1", "localhost"):
        print("CONNECTED", place, flush=True)
    return connect(self, place, *rest)
connect = socket.socket.connect
socket.socket.connect = refused
found = socket.getaddrinfo
def named(host, *rest, **more):
    if host not in ("127.0.0.1", "localhost", None):
        print("LOOKED UP", host, flush=True)
    return found(host, *rest, **more)
socket.getaddrinfo = named
from fewstep.commands.app import main
main(sys.argv[1:])
"""
"""The command, in a process that reports connections to other machines."""


def test_the_command_starts_without_network_and_ends_with_a_signal(place: Path, tmp_path: Path) -> None:
    words = ["app", str(place / "in"), "--teacher", str(place / "in" / "teacher"), "--port", "0", "--device", "cpu"]
    process = subprocess.Popen(
        [sys.executable, "-c", OFFLINE, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    try:
        assert line.startswith("http://127.0.0.1:"), line
        with urllib.request.urlopen(line.split()[0]) as answer:
            assert answer.status == 200
    finally:
        process.terminate()
        out, err = process.communicate(timeout=300)
    assert "CONNECTED" not in out + line
    assert "LOOKED UP" not in out + line
    assert process.returncode == 128 + 15, err
    assert "Traceback" not in err


def test_a_thousand_keys_with_errors(
    models: Models, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from app_keystrokes import type_keys

    monkeypatch.setattr(models, "draw", models.draw)  # restored afterwards
    teacher, lora = (str(place / "in" / name) for name in ("teacher", "first"))
    figures = type_keys(models, teacher, lora, tmp_path, keys=1000, pause=0.0, every=5, singles=0)
    assert figures.right
    assert figures.failed > 10
    assert figures.memory[-1] < figures.memory[3] + 20
