"""The verbs as functions, as a notebook calls them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import fewstep
from fewstep.commands import app as cli
from fewstep.common.arguments import with_options
from fewstep.common.errors import UserError
from fewstep.common.files import read_json, write_json
from fewstep.distillation.config import resolve
from fewstep_worlds.common.location import root


def picture(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_every_verb_stays_a_function() -> None:
    """Modules of the package that are imported later must not take a verb's name."""
    import fewstep.distillation.distill
    import fewstep.evaluation.run

    for name in fewstep.__all__:
        assert callable(getattr(fewstep, name)), name
    assert set(fewstep.__all__) <= set(dir(fewstep))


@pytest.mark.slow
def test_an_estimate_can_be_repeated(tiny_overrides: list[str], tmp_path: Path) -> None:
    for _ in range(2):
        (estimated,) = fewstep.estimate("tcd", out=tmp_path / "run", overrides=tiny_overrides)
        assert estimated.calls == {"student": 2, "teacher": 2}
    assert not (tmp_path / "run").exists()
    few = tmp_path / "few"
    few.mkdir()
    for number in range(3):
        Image.new("RGB", (64, 64)).save(few / f"{number}.png")
        (few / f"{number}.txt").write_text("a red disc")
    words = [*tiny_overrides, f"data.source={few}", "loop.validate_every=2"]
    with pytest.raises(UserError, match=r"validate_every"):
        fewstep.estimate("tcd", out=tmp_path / "run", overrides=words)


def test_one_word_or_several(tiny_pipeline: Path, tmp_path: Path) -> None:
    """A string is one prompt, and one override; another teacher than the bundled one draws as itself."""
    few = {"settings": {"steps": 2}, "teacher": tiny_pipeline, "device": "cpu"}
    exclusive = fewstep.sample("a red disc", out=tmp_path / "alone.png", **few)
    listed = fewstep.sample(["a red disc"], lora=None, out=tmp_path / "listed.png", **few)
    assert picture(exclusive).shape == (256, 256, 3), "one picture, without a margin, 64 pixels four times"
    np.testing.assert_array_equal(picture(exclusive), picture(listed))
    small = fewstep.sample("a red disc", out=tmp_path / "small.png", scale=1, **few)
    np.testing.assert_array_equal(picture(small).repeat(4, 0).repeat(4, 1), picture(exclusive))
    with pytest.raises(UserError) as error:
        fewstep.distill("tcd", out=tmp_path / "run", teacher=tiny_pipeline, overrides="optim.rl=1")
    assert error.value.field == "optim.rl"


def test_the_bundled_teacher_by_its_path_has_its_student(tmp_path: Path) -> None:
    first = fewstep.sample("an octopus", out=tmp_path / "a.png", device="cpu")
    second = fewstep.sample("an octopus", out=tmp_path / "b.png", teacher=root() / "teacher", device="cpu")
    np.testing.assert_array_equal(picture(first), picture(second))


def test_settings_are_given_by_options_or_by_keys(tiny_pipeline: Path, tmp_path: Path) -> None:
    few = {"teacher": tiny_pipeline, "device": "cpu", "lora": None}
    by_option = fewstep.sample("a red disc", out=tmp_path / "a.png", steps=3, **few)
    for name, settings in (("b", {"steps": 3}), ("c", "steps=3"), ("d", ["steps=3"])):
        other = fewstep.sample("a red disc", out=tmp_path / f"{name}.png", steps=2, settings=settings, **few)
        np.testing.assert_array_equal(picture(by_option), picture(other))


def test_settings_of_a_training_are_words_or_a_mapping(tiny_overrides: list[str], tmp_path: Path) -> None:
    """A section is a mapping or a dotted name; what each gives is the same."""
    keys = [word.partition("=")[0] for word in tiny_overrides]
    plain = {key: word.partition("=")[2] for key, word in zip(keys, tiny_overrides) if key != "loop.steps"}
    given: dict[str, Any] = {
        **plain, "optim": {"lr": 1e-5, "ema": None}, "loop.steps": 5, "student.targets": ["to_q"], "loop": {"keep": 1}
    }  # fmt: skip
    words = [
        *(f"{key}={value}" for key, value in plain.items()),
        "optim.lr=1e-5", "optim.ema=null", "loop.steps=5", "student.targets=[to_q]", "loop.keep=1",
    ]  # fmt: skip
    assert resolve("tcd", None, with_options(given, {})) == resolve("tcd", None, words)
    with pytest.raises(UserError) as error:
        fewstep.distill("tcd", out=tmp_path / "run", overrides={"optim": {"rl": 1}})
    assert error.value.field == "optim.rl"


def test_guidance_is_given_once(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("an octopus\n")
    both: dict[str, Any] = {"omega": 1.0, "guidance_scale": 2.0, "out": tmp_path / "out"}
    for draw in (
        lambda: fewstep.evaluate(prompt_file=prompts, **both),
        lambda: fewstep.draw_folder("geneval", prompts, **both),
    ):
        with pytest.raises(UserError) as error:
            draw()
        assert error.value.field == "guidance_scale"


def test_bundled_pictures_for_a_teacher_of_another_size(tiny_pipeline: Path, tmp_path: Path) -> None:
    large = tmp_path / "large"
    shutil.copytree(tiny_pipeline, large)
    write_json(large / "unet" / "config.json", {**read_json(large / "unet" / "config.json"), "sample_size": 64})
    with pytest.raises(UserError, match=r"data\.source = 'stickers'.* 64 .* 512"):
        fewstep.estimate("tcd", out=tmp_path / "run", teacher=large)


@pytest.fixture
def sampling_raises(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], None]:
    """Run `fewstep sample`, and raise an error in it."""

    def run(error: BaseException) -> None:
        def fail(*_: object, **__: object) -> None:
            raise error

        monkeypatch.setattr("fewstep.backbones.teachers.read_teacher", fail)
        cli.main(["sample", "a disc"])

    return run


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes"),
        MemoryError("Unable to allocate 2 TiB"),
    ],
)
def test_out_of_memory_is_one_line(
    error: Exception, sampling_raises: Callable[[BaseException], None], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        sampling_raises(error)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("fewstep: out of memory (")


def test_other_errors_of_a_library_are_not_hidden(sampling_raises: Callable[[BaseException], None]) -> None:
    with pytest.raises(RuntimeError, match="a bug"):
        sampling_raises(RuntimeError("a bug"))


def test_ctrl_c_promises_only_what_is_kept(
    sampling_raises: Callable[[BaseException], None], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Work in a run folder goes on; a picture that was being drawn does not."""
    from fewstep.common.files import hold_folder

    for error in (KeyboardInterrupt(), stopped_in(tmp_path)):
        with pytest.raises(SystemExit) as ended:
            sampling_raises(error)
        assert ended.value.code == 130
    first, second = capsys.readouterr().err.splitlines()
    assert "again" not in first
    assert str(tmp_path) in second
    assert "again" in second
    with hold_folder(tmp_path):
        pass


def stopped_in(folder: Path) -> KeyboardInterrupt:
    from fewstep.common.files import hold_folder

    with pytest.raises(KeyboardInterrupt) as stop, hold_folder(folder):
        raise KeyboardInterrupt
    return stop.value


def test_weights_are_those_that_would_be_loaded(tmp_path: Path) -> None:
    """Of a file and shards side by side diffusers reads the shards, transformers the file; a variant alone is read."""
    from fewstep.backbones.weight_files import weight_files

    def names(stem: str) -> list[str]:
        return [file.name for file in weight_files(tmp_path / stem)]

    for stem in ("diffusion_pytorch_model", "model"):
        folder = tmp_path / stem
        folder.mkdir()
        (folder / f"{stem}.fp16.safetensors").touch()
        assert names(stem) == [f"{stem}.fp16.safetensors"]
        (folder / f"{stem}.safetensors").touch()
        assert names(stem) == [f"{stem}.safetensors"]
        index = {
            "weight_map": {"b": f"{stem}-2.safetensors", "a": f"{stem}-1.safetensors", "c": f"{stem}-1.safetensors"}
        }
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index))
    assert names("diffusion_pytorch_model") == [f"diffusion_pytorch_model-{i}.safetensors" for i in (1, 2)]
    assert names("model") == ["model.safetensors"]
    (tmp_path / "model" / "model.safetensors").unlink()
    (tmp_path / "model" / "model.safetensors.index.json").write_text('{"weight_map": [1]}')
    with pytest.raises(UserError, match="holds no weight_map of files"):
        names("model")
