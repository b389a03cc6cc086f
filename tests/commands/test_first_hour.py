"""What a new user meets first: arguments of wrong types, names of teachers, sizes, full disks."""

from __future__ import annotations

import errno
import inspect
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError
from safetensors import SafetensorError

import fewstep
from fewstep.backbones import teachers
from fewstep.backbones.pipeline_folder import read_folder
from fewstep.common.arguments import checked
from fewstep.common.errors import UserError
from fewstep.common.files import atomic_folder, atomic_write, os_reason
from fewstep.data.config import DataConfig
from fewstep.diffusion.config import Sampling
from fewstep.inference import generator
from fewstep_worlds.common import location
from support import tiny_pipelines
from support.random_lora import random_lora

VERBS = [
    name
    for name in fewstep.__all__
    if inspect.isfunction(getattr(fewstep, name)) and hasattr(getattr(fewstep, name), "__wrapped__")
]


def test_every_public_function_checks_its_arguments() -> None:
    plain = [name for name in fewstep.__all__ if inspect.isfunction(getattr(fewstep, name)) and name not in VERBS]
    assert plain == []


@pytest.mark.parametrize("verb", VERBS)
def test_an_argument_of_another_type_is_named(verb: str) -> None:
    function = getattr(fewstep, verb)
    parameters = inspect.signature(function).parameters
    for wrong, parameter in parameters.items():
        if "Any" in str(parameter.annotation) and "[" not in str(parameter.annotation):
            continue
        given: dict[str, Any] = {
            name: {} if "Mapping" in str(other.annotation) else "1"
            for name, other in parameters.items()
            if other.default is inspect.Parameter.empty
        }
        with pytest.raises(UserError, match=f"^{wrong} = ") as error:
            function(**{**{name: value for name, value in given.items() if name != wrong}, wrong: object()})
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("seed", ["0", 0.5, True, None, [0]])
def test_text_is_no_number(seed: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^seed = "):
        fewstep.sample("x", out=tmp_path / "z.png", seed=seed)


@pytest.mark.parametrize(
    "given",
    [
        {"count": 10**9, "out": "z.png"},
        {"count": 700, "out": "z.webp"},
        {"scale": 10**6, "out": "z.png"},
        {"prompts": ["x"] * 70, "out": "z.webp"},
    ],
)
def test_a_sheet_that_no_file_holds_is_refused_before_it_is_drawn(
    given: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: object, **__: object) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(generator, "load_image_generator", load)
    teacher = tiny_pipelines.sd(tmp_path / "sd")
    with pytest.raises(UserError, match=r"^out = .* pixels"):
        fewstep.sample(**{"prompts": "x", "teacher": teacher, "lora": None} | given | {"out": tmp_path / given["out"]})


def test_numbers_and_lists_of_numpy_are_taken() -> None:
    @checked
    def f(words: str | list[str], seed: int = 0, omega: float | None = None) -> Any:
        return words, seed, omega

    assert f(np.array(["a", "b"]), np.int64(3), np.float32(0.5)) == (["a", "b"], 3, 0.5)  # type: ignore[arg-type]
    assert f("a", omega=2) == ("a", 0, 2)


@pytest.mark.parametrize(
    ("address", "known"),
    [
        ("owner/name", "owner/name"),
        ("owner/name@v2", "owner/name@v2"),
        ("https://huggingface.co/owner/name", "owner/name"),
        ("https://huggingface.co/owner/name/", "owner/name"),
        ("https:/huggingface.co/owner/name", "owner/name"),
        ("http://www.huggingface.co/owner/name?library=diffusers", "owner/name"),
        ("huggingface.co/owner/name", "owner/name"),
        ("hf.co/owner/name", "owner/name"),
        ("https://huggingface.co/owner/name/tree/fp16", "owner/name@fp16"),
        ("hf:owner/name", "owner/name"),
        ("hf://owner/name@main", "owner/name@main"),
        ("hf:/owner/name", "owner/name"),
    ],
)
def test_addresses_on_the_hub(address: str, known: str, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = []
    monkeypatch.setattr(teachers, "fetched", lambda named: requests.append(named) or Path("here"))
    assert teachers.teacher_folder(address) == Path("here")
    assert requests == [known]


@pytest.mark.parametrize(
    "address",
    [
        "https://example.com/owner/name",
        "s3://bucket/model",
        "https://huggingface.co/owner/name/blob/main/model.safetensors",
        "https://huggingface.co/datasets/owner/name",
        "https://huggingface.co/owner",
        "hf:owner",
        "ftp:/example.com/model.safetensors",
    ],
)
def test_other_addresses_are_refused_whole(address: str) -> None:
    with pytest.raises(UserError) as error:
        teachers.teacher_folder(address)
    shown = address.replace("ftp:/", "ftp://")
    assert f"teacher = {shown!r}" in str(error.value)


class GatedRepoError(Exception):
    """As huggingface_hub names it."""


class OddError(Exception):
    """An unknown one."""


@pytest.mark.parametrize("cause", [GatedRepoError("403 " + "x" * 500), OddError("It is on fire. " + "y" * 500)])
def test_the_hubs_reason_is_reported_whole(cause: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def fail(*args: Any, **options: Any) -> str:
        raise cause

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(UserError, match="'owner/name'") as error:
        teachers.fetched("owner/name")
    message = str(error.value)
    assert len(message) < 300
    assert "token" in message if isinstance(cause, GatedRepoError) else message.endswith("It is on fire")


def test_a_teacher_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "file.txt").write_text("a")
    (tmp_path / "empty").mkdir()
    for place, words in (("nowhere", "does not exist"), ("file.txt", "is a file"), ("empty", "no model_index.json")):
        for field in ("teacher", "reference"):
            with pytest.raises(UserError, match=f"^{field} = .*{words}"):
                read_folder(tmp_path / place, field)


def test_the_checkout_in_place_of_its_world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "world" / location.STICKERS).mkdir(parents=True)
    monkeypatch.setenv(location.ENVIRONMENT, str(tmp_path))
    with pytest.raises(UserError, match=str(tmp_path / "world")):
        location.root()
    monkeypatch.setenv(location.ENVIRONMENT, str(tmp_path / "world"))
    assert location.root() == tmp_path / "world"


@pytest.mark.parametrize("given", [96, [96, 96], (96, 96), "96", "96x96", "96, 96"])
def test_sizes_are_given_alike(given: Any) -> None:
    from fewstep.distillation.config import resolve

    assert Sampling(size=given).size == (96, 96)
    assert DataConfig(size=given).size == 96
    config = resolve("tcd", None, [f"data.size={list(given) if isinstance(given, tuple) else given}"])
    assert (config.data.size, config.sampling.size) == (96, (96, 96))
    assert Sampling(size=[96, 64]).size == (96, 64)


@pytest.mark.parametrize("given", [[96], "large", [1, 2, 3], {"width": 96}, True, [96, "high"]])
def test_what_is_no_size_is_refused(given: Any) -> None:
    for model in (Sampling, DataConfig):
        with pytest.raises(ValidationError, match="size"):
            model(size=given)


def test_a_size_that_is_no_square_is_not_learned() -> None:
    with pytest.raises(ValidationError, match="square"):
        DataConfig(size=[96, 64])


def copying(place: Path) -> None:
    """As `shutil.copytree` fails: one tuple a file."""
    raise shutil.Error([(f"a/{i}", f"{place}/{i}", f"[Errno 28] No space left on device: '{i}'") for i in range(40)])


def serialising(_: Path) -> None:
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def tokenising(_: Path) -> None:
    raise Exception("No space left on device (os error 28)")


def writing(_: Path) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("write", [copying, serialising, tokenising, writing])
@pytest.mark.parametrize("opened", [atomic_write, atomic_folder])
def test_a_full_disk_is_one_line_for_every_writer(write: Callable[[Path], None], opened: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No space left on device") as error, opened(tmp_path / "target") as part:
        write(part)
    assert len(str(error.value)) < len(str(tmp_path)) + 100
    assert list(tmp_path.iterdir()) == []


def test_other_errors_are_not_the_disks() -> None:
    for error in (ValueError("a bug"), UserError("[Errno 28] reported already"), RuntimeError("size mismatch (3, 4)")):
        assert os_reason(error) is None


@pytest.mark.parametrize("form", ["merged", "diffusers"])
def test_an_export_onto_a_full_disk_is_one_line(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whichever library comes to write first."""
    from fewstep.backbones import pipeline_writer as pipeline
    from fewstep.commands import app as cli

    teacher = tiny_pipelines.sd(tmp_path / "sd")
    student = random_lora(teacher, tmp_path / "student")
    monkeypatch.setattr(pipeline.shutil, "copytree", lambda a, b, **_: copying(b))
    monkeypatch.setattr("fewstep.common.tensors.save_file", lambda *_, **__: serialising(tmp_path))
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        cli.main(["export", str(student), "--teacher", str(teacher), "--form", form, "--out", str(tmp_path / "out")])
    assert ended.value.code == 2
    (line,) = [message for message in capsys.readouterr().err.splitlines() if message.startswith("fewstep:")]
    assert "No space left on device" in line
    assert len(line) < 300
    assert not (tmp_path / "out").exists()
