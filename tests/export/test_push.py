"""Uploads to a hub: huggingface_hub itself against a local stand-in of the hub's interface."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

import fewstep
from fewstep.common.errors import UserError
from support.random_lora import random_lora

TOKEN = "hf_standin"


class Hub(ThreadingHTTPServer):
    """A hub of model repositories in memory: their files, whether each is private, and entries that a card lacked."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.address = f"http://127.0.0.1:{self.server_port}"
        self.repos: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.large: dict[str, bytes] = {}
        self.lacking: list[str] = []

    def create(self, held: Any) -> tuple[Any, int]:
        name = f"{held.get('organization') or 'me'}/{held['name']}"
        known = name in self.repos
        if not known:
            self.repos[name], self.private[name] = {}, held.get("visibility") == "private"
        return {"url": f"{self.address}/{name}"}, 409 if known else 200

    def validate(self, held: Any) -> tuple[Any, int]:
        front = yaml.safe_load(held["content"].split("---\n")[1])
        wrong = [key for key in ("license", "library_name", "pipeline_tag", "tags") if key not in front]
        self.lacking += wrong
        errors = [{"message": f"{key} is required"} for key in wrong]
        return {"errors": errors, "warnings": []}, 400 if wrong else 200

    def modes(self, held: Any) -> tuple[Any, int]:
        def mode(path: str) -> str:
            return "lfs" if path.endswith(".safetensors") else "regular"

        files = [{"path": file["path"], "uploadMode": mode(file["path"])} for file in held["files"]]
        return {"files": [{**file, "shouldIgnore": False, "oid": None} for file in files]}, 200

    def batch(self, held: Any) -> tuple[Any, int]:
        objects = [
            {**item, "actions": {"upload": {"href": f"{self.address}/large/{item['oid']}"}}} for item in held["objects"]
        ]
        return {"transfer": "basic", "objects": objects}, 200

    def commit(self, name: str, lines: list[Any]) -> tuple[Any, int]:
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                self.repos[name][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.repos[name][value["path"]] = self.large[value["oid"]]
        return {"commitUrl": f"{self.address}/{name}/commit/1", "commitOid": "1" * 40}, 200


class Answers(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: Any) -> None:
        """Be silent."""

    def answer(self, value: Any, status: int = 200) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers["Content-Length"] or 0))

    def do_GET(self) -> None:
        known = self.headers["Authorization"] == f"Bearer {TOKEN}"
        if self.path == "/api/whoami-v2":
            self.answer({"name": "me", "type": "user"} if known else {"error": "no"}, 200 if known else 401)
        else:
            self.answer({"error": "no"}, 404)

    def do_PUT(self) -> None:
        self.server.large[self.path.rpartition("/")[2]] = self.body()
        self.answer({})

    def do_POST(self) -> None:
        hub, text = self.server, self.body().decode()
        if self.path.endswith("/commit/main"):
            name = self.path.removeprefix("/api/models/").removesuffix("/commit/main")
            self.answer(*hub.commit(name, [json.loads(line) for line in text.splitlines()]))
            return
        handlers = {"/create": hub.create, "/validate-yaml": hub.validate, "/main": hub.modes, "/batch": hub.batch}
        (handler,) = [own for end, own in handlers.items() if self.path.endswith(end)]
        self.answer(*handler(json.loads(text)))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    from huggingface_hub import constants

    made = Hub()
    for name, value in (("ENDPOINT", made.address), ("HF_HUB_OFFLINE", False), ("HF_HUB_DISABLE_XET", True)):
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    thread = threading.Thread(target=made.serve_forever, daemon=True)
    thread.start()
    yield made
    made.shutdown()
    made.server_close()


def test_an_export_is_uploaded_whole(hub: Hub, tiny_pipeline: Path, tmp_path: Path) -> None:
    """The hub gets the bytes of every file, with a card whose front matter it accepts; a second time too."""
    student = random_lora(tiny_pipeline, tmp_path / "student")
    words: dict[str, Any] = {"teacher": tiny_pipeline, "check": False}
    for prompt, private in (("a red disc", True), ("a blue bar", False)):
        out = tmp_path / prompt
        fewstep.export_as(student, out=out, push="me/fast", private=private, license="mit", prompts=prompt, **words)
        files = {file.name: file.read_bytes() for file in out.iterdir()}
        assert hub.repos["me/fast"] == files
        assert set(files) == {"README.md", "pictures.webp", "pytorch_lora_weights.safetensors"}
        assert b'load_lora_weights("me/fast", ' in files["README.md"]
    assert hub.private == {"me/fast": True}, "a repository that exists keeps its own"
    assert hub.lacking == []


@pytest.mark.parametrize("push", ["fast", "me/fast@main", "a/b/c", ""])
def test_names_of_no_repository(push: str, hub: Hub, tiny_pipeline: Path, tmp_path: Path) -> None:
    student = random_lora(tiny_pipeline, tmp_path / "student")
    with pytest.raises(UserError) as error:
        fewstep.export_as(student, out=tmp_path / "out", teacher=tiny_pipeline, push=push)
    assert error.value.field == "push"
    assert hub.repos == {}
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("problem", ["wrong token", "no token", "offline", "no hub"])
def test_a_hub_that_does_not_answer_is_found_out_before_the_export(
    problem: str, hub: Hub, tiny_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    student = random_lora(tiny_pipeline, tmp_path / "student")
    if problem == "wrong token":
        monkeypatch.setenv("HF_TOKEN", "hf_other")
    elif problem == "no token":
        monkeypatch.delenv("HF_TOKEN")
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    elif problem == "offline":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    else:
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError) as error:
        fewstep.export_as(student, out=tmp_path / "out", teacher=tiny_pipeline, push="me/fast")
    assert error.value.field == "push"
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_card_that_the_hub_refuses_is_one_line(
    hub: Hub, tiny_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The export itself is kept."""
    monkeypatch.setattr("fewstep.export.model_card.front_matter", lambda *_: "tags: [a]\n")
    student = random_lora(tiny_pipeline, tmp_path / "student")
    with pytest.raises(UserError) as error:
        fewstep.export_as(student, out=tmp_path / "out", teacher=tiny_pipeline, push="me/fast", check=False)
    assert error.value.field == "push"
    assert hub.lacking == ["license", "library_name", "pipeline_tag"]
    assert hub.repos == {"me/fast": {}}
    assert (tmp_path / "out" / "README.md").is_file()


def test_private_without_push_has_no_effect(tiny_pipeline: Path, tmp_path: Path) -> None:
    student = random_lora(tiny_pipeline, tmp_path / "student")
    with pytest.raises(UserError) as error:
        fewstep.export_as(student, out=tmp_path / "out", teacher=tiny_pipeline, private=True)
    assert error.value.field == "private"
