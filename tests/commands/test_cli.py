"""What a person types: help that teaches, refusals of one line, exit code 2, nothing written."""

from __future__ import annotations

import errno
import inspect
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cyclopts import App

import fewstep
from fewstep.commands import app as cli
from fewstep.commands.distill import ending
from fewstep.commands.recipes import recipes
from fewstep.commands.renamed import current
from fewstep.commands.verb import unwrapped
from fewstep.common.errors import UserError
from fewstep.common.tensors import load_tensors, save_tensors
from fewstep_worlds.plane.api import playground
from fewstep_worlds.studies import api


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run in an empty folder, to see what is left in it."""
    place = tmp_path / "here"
    place.mkdir()
    monkeypatch.chdir(place)


def written() -> list[str]:
    return sorted(str(path) for path in Path().rglob("*"))


Refuse = Callable[..., UserError]


@pytest.fixture
def refuse(capsys: pytest.CaptureFixture[str]) -> Refuse:
    """Run the command; it must exit with 2, print one line, write nothing. Returns the error."""

    def run(*arguments: str, keeps: tuple[str, ...] = ()) -> UserError:
        before = written()
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main(list(arguments))
        out, err = capsys.readouterr()
        assert stop.value.code == 2, err
        assert out == ""
        assert err.startswith("fewstep: ")
        assert err.count("\n") == 1, err
        assert "Traceback" not in err
        assert written() == sorted({*before, *keeps})
        error = stop.value.__context__
        assert isinstance(error, UserError)
        return error

    return run


def named(error: UserError) -> str:
    """The field that an error names: its own, or the one that its message begins with."""
    return error.field or re.split(" = |: ", str(error))[0]


@pytest.fixture
def distilled(tiny_pipeline: Path, tmp_path: Path) -> Path:
    """A LoRA of the tiny pipeline, whole and honest: zero but for its shape."""
    from fewstep.backbones.pipeline_folder import read_folder
    from fewstep.diffusion.config import Sampling
    from fewstep.students.lora import save_lora

    layer = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    weights = {f"{layer}.lora_A.weight": torch.ones(2, 32), f"{layer}.lora_B.weight": torch.zeros(32, 2)}
    base = read_folder(tiny_pipeline).fingerprint("unet")
    return save_lora(
        tmp_path / "good.safetensors",
        weights,
        rank=2,
        alpha=2,
        targets=["to_q"],
        base=base,
        sampling=Sampling(),
        notes={},
    )


# ---- distill


def test_the_last_of_a_repeated_option_counts(refuse: Refuse, tiny_pipeline: Path) -> None:
    """Scripts add options to a command line; all values of --set count."""
    error = refuse("distill", "--recipe", "tcd", "--recipe", "nope")
    assert error.field == "recipe"
    assert "'nope'" in str(error)
    words = ("--teacher", "nowhere", "--teacher", str(tiny_pipeline), "-s", "device=cpu", "-s", "loop.steps=0")
    assert named(refuse("distill", "--recipe", "nope", "--recipe", "tcd", *words)) == "loop.steps"
    assert named(refuse("distill", *words, "-s", "loop.steps=2", "-s", "device=gpu")) == "device"


def test_an_unknown_recipe_names_a_near_one(refuse: Refuse) -> None:
    for near, meant in (("lcmm", "'lcm'"), ("TLCMM", "'tlcm'")):
        error = refuse("distill", "--recipe", near)
        assert error.field == "recipe"
        assert str(error).endswith(f"did you mean {meant}?")
    assert "did you mean" not in str(refuse("distill", "--recipe", "something"))
    assert "nowhere.yaml" in str(refuse("distill", "--recipe", "nowhere.yaml"))


@pytest.mark.parametrize(
    ("override", "field"),
    [
        ("optim.leraning_rate=1", "optim.leraning_rate"),
        ("lr=1e-3", "lr"),
        ("methd.k=2", "methd"),
        ("loop.step=2", "loop.step"),
        ("optim.lr=fast", "optim.lr"),
        ("optim.lr=0", "optim.lr"),
        ("optim.lr=.inf", "optim.lr"),
        ("loop.steps=0", "loop.steps"),
        ("sampling.steps=51", "sampling.steps"),
        ("sampling.grid=0", "sampling.grid"),
        ("method.grid=-5", "method.grid"),
        ("sampling.gamma=1.5", "sampling.gamma"),
        ("method.jump=hop", "method.jump"),
        ("method.grid=25", "sampling.grid"),
        ("sampling.end=clean", "sampling.end"),
        ("loop.accumulate=5", "loop.batch"),
        ("student.targets=[to_k,to_qq]", "student.targets"),
        ("method.grid=60 sampling.grid=60", "method.grid"),
        ("sampling.sampler=ddim sampling.grid=60", "sampling.grid"),
        ("sampling.sampler=ddim sampling.spacing=trailing sampling.steps=2000", "sampling.steps"),
        ("validation.teacher_steps=2000", "validation.teacher_steps"),
        ("data.source=nowhere", "data.source"),
        ("teacher=nowhere", "teacher"),
    ],
)
def test_a_wrong_setting_is_named(refuse: Refuse, tiny_pipeline: Path, override: str, field: str) -> None:
    teacher = () if override.startswith("teacher") else ("--teacher", str(tiny_pipeline))
    changes = [word for change in override.split() for word in ("-s", change)]
    assert named(refuse("distill", *teacher, *changes)) == field


def test_what_is_no_setting_is_quoted(refuse: Refuse, tiny_pipeline: Path) -> None:
    for override, word in (("optim.lr", "key=value"), ("validation.prompts=validaton", "'validation'")):
        assert word in str(refuse("distill", "--teacher", str(tiny_pipeline), "-s", override))


def test_options_of_distill_that_set_settings(refuse: Refuse, tiny_pipeline: Path, tmp_path: Path) -> None:
    """--device, --precision and --prompt-file are settings, and --set lies over them."""
    teacher = ("--teacher", str(tiny_pipeline))
    for option, field in (("--device", "device"), ("--precision", "loop.precision"), ("--prompt-file", "data.source")):
        assert named(refuse("distill", *teacher, option, "nothing")) == field
    assert named(refuse("distill", *teacher, "--device", "cpu", "-s", "device=gpu")) == "device"
    assert (
        named(refuse("distill", *teacher, "--device", "gpu", "-s", "device=cpu", "-s", "data.source=no"))
        == "data.source"
    )


def test_wrong_config_files(refuse: Refuse, tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("optim: {lr: 1e-4\n")
    assert "YAML" in str(refuse("distill", "--config", str(file)))
    file.write_text("- optim\n")
    assert "mapping" in str(refuse("distill", "--config", str(file)))
    file.write_text("optim:\n  rate: 1e-4\n")
    assert refuse("distill", "--config", str(file)).field == "optim.rate"
    assert "none.yaml" in str(refuse("distill", "--config", str(tmp_path / "none.yaml")))


@pytest.mark.parametrize(
    ("verb", "options"),
    [
        ("sample", ("a disc",)),
        ("distill", ()),
        ("train-adapter", ()),
        ("synthesize", ("--out", "x", "--prompts", "prompts.txt")),
        ("train-perceptual", ("--prompts", "prompts.txt")),
    ],
)
def test_a_folder_of_configs_under_its_old_option(
    refuse: Refuse, tiny_pipeline: Path, verb: str, options: tuple[str, ...]
) -> None:
    Path("prompts.txt").write_text("".join(f"a red disc {number}\n" for number in range(600)))
    for option in ("--config", "--teacher-config"):
        error = refuse(verb, *options, "--teacher", str(tiny_pipeline), option, str(tiny_pipeline))
        assert error.field == "teacher_config", "of no single file"


def test_an_eps_teacher_with_zero_terminal_snr(
    refuse: Refuse, tiny_pipeline: Path, picture_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_pipeline, tmp_path / "zero")
    path = tmp_path / "zero" / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rescale_betas_zero_snr": True}))
    teacher = ("--teacher", str(tmp_path / "zero"))
    for arguments in (
        ("distill", *teacher, "-s", f"data.source={picture_folder}"),
        ("sample", "x", "--lora", "none", *teacher),
    ):
        line = str(refuse(*arguments))
        assert "zero terminal SNR" in line
        assert "v_prediction" in line
    path.write_text(json.dumps(json.loads(path.read_text()) | {"prediction_type": "v_prediction"}))
    cli_out = tmp_path / "v.png"
    with pytest.raises(SystemExit) as stop:
        cli.main(["sample", "a red disc", "--lora", "none", "--steps", "2", "--out", str(cli_out), *teacher])
    assert stop.value.code == 0
    assert cli_out.is_file()


@pytest.mark.parametrize("place", ["below a file", "/proc/fewstep/run"])
def test_an_unwritable_place(
    refuse: Refuse, tiny_pipeline: Path, picture_folder: Path, distilled: Path, place: str
) -> None:
    if place == "below a file":
        Path("file").write_text("")
        place = "file/run"
    teacher = ("--teacher", str(tiny_pipeline))
    line = str(refuse("distill", *teacher, "-s", f"data.source={picture_folder}", "--out", place))
    assert f"cannot write {place}" in line
    line = str(refuse("sample", "a disc", *teacher, "--lora", str(distilled), "--out", f"{place}/a.png"))
    assert f"cannot write {place}" in line


def test_a_run_folder_of_another_config(refuse: Refuse, tiny_overrides: list[str]) -> None:
    from fewstep.distillation.config import resolve
    from fewstep.training.run_folder import RunLog

    RunLog(Path("run"), resolve("tcd", None, tiny_overrides, omega=7.0), title="x", quiet=True)
    words = [word for override in [*tiny_overrides, "optim.lr=0.5"] for word in ("-s", override)]
    assert "optim.lr (0.001, now 0.5)" in str(refuse("distill", "--out", "run", *words))


@pytest.mark.slow
def test_a_full_disk_while_training(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tiny_overrides: list[str]
) -> None:
    """The second checkpoint does not fit: one line, the first one is whole, no half is left."""
    from fewstep.training import checkpoint

    plain = checkpoint.save_tensors

    def save(path: Path, *others: Any) -> None:
        plain(path, *others)
        if "step-00000004" in str(path) and path.name == "student.optimizer.safetensors":
            path.write_bytes(path.read_bytes()[:100])
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_tensors", save)
    changes = [*tiny_overrides, "student.targets=[to_q]"]
    words = ["distill", "--out", "run", *(word for change in changes for word in ("-s", change))]
    with pytest.raises(SystemExit) as stop:
        cli.main(words)
    assert stop.value.code == 2
    printed = [line for line in capfd.readouterr().err.splitlines() if line.startswith("fewstep: ")]
    assert len(printed) == 1
    assert "step-00000004: No space left on device; nothing was left there" in printed[0]
    assert [path.name for path in Path("run/checkpoints").iterdir()] == ["step-00000002"]
    monkeypatch.setattr(checkpoint, "save_tensors", plain)  # room again: the run goes on
    with pytest.raises(SystemExit) as stop:
        cli.main(words)
    assert stop.value.code == 0
    assert Path("run/student/pytorch_lora_weights.safetensors").is_file()


def test_a_full_disk_while_a_full_student_is_written(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tiny_overrides: list[str]
) -> None:
    """The library that writes it has an error of its own for this."""
    from diffusers import UNet2DConditionModel
    from safetensors import SafetensorError

    def save(self: Any, target: Path, **_: Any) -> None:
        target.mkdir()
        (target / "diffusion_pytorch_model.safetensors").write_bytes(b"half")
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(UNet2DConditionModel, "save_pretrained", save)
    changes = [*tiny_overrides, "student.kind=full", "loop.steps=1"]
    with pytest.raises(SystemExit) as stop:
        cli.main(["distill", "--out", "run", *(word for change in changes for word in ("-s", change))])
    assert stop.value.code == 2
    (printed,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("fewstep: ")]
    assert "No space left on device" in printed
    assert not Path("run/student").exists()


def test_a_full_disk_while_drawing(
    refuse: Refuse, monkeypatch: pytest.MonkeyPatch, tiny_pipeline: Path, distilled: Path
) -> None:
    from PIL import Image

    Path("a.png").write_bytes(b"the old picture")

    def save(self: Any, target: Any, **options: Any) -> None:
        Path(target).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", save)
    line = str(refuse("sample", "a disc", "--teacher", str(tiny_pipeline), "--lora", str(distilled), "--out", "a.png"))
    assert "cannot write a.png: No space left on device" in line
    assert Path("a.png").read_bytes() == b"the old picture"


# ---- sample


def test_prompts_that_are_not_there(refuse: Refuse, tmp_path: Path) -> None:
    assert refuse("sample").field == "prompts"
    assert refuse("sample", " ").field == "prompts"
    assert named(refuse("sample", "--prompt-file", "none.txt")) == "prompt_file"
    empty = tmp_path / "empty.txt"
    empty.write_text("\n  \n")
    assert "no prompt" in str(refuse("sample", "--prompt-file", str(empty)))
    empty.write_bytes(b"\xff\xfe\x00")
    assert "UTF-8" in str(refuse("sample", "--prompt-file", str(empty)))
    assert named(refuse("sample", "--prompt-file", str(tmp_path))) == "prompt_file"


@pytest.mark.parametrize(
    ("options", "field"),
    [
        (("--steps", "0"), "steps"),
        (("--steps", "51"), "steps"),
        (("--steps", "four"), "steps"),
        (("--steps", "4.5"), "steps"),
        (("--steps", "3", "--sampler", "dpmpp_2s"), "steps"),
        (("--gamma", "-0.1"), "gamma"),
        (("--gamma", "1.01"), "gamma"),
        (("--gamma", "nan"), "gamma"),
        (("--gamma", "0.5", "--sampler", "lcm"), "gamma"),
        (("--gamma", "0.5", "-s", "gamma=2"), "gamma"),
        (("--omega", "-1"), "omega"),
        (("--sampler", "dimm"), "sampler"),
        (("--count", "0"), "count"),
        (("--batch", "0"), "batch"),
        (("--scale", "-3"), "scale"),
        (("--seed", "-1"), "seed"),
        (("--device", "gpu"), "device"),
        (("--precision", "fp8"), "precision"),
        (("--strength", "0.5"), "strength"),
        (("--out", "picture.gif"), "out"),
        (("--out", "v1.5"), "out"),
        (("--format", "gif", "--out", "pictures"), "format"),
        (("--width", "60"), "width"),
        (("--height", "0"), "height"),
        (("--guidance-scale", "-1"), "guidance_scale"),
        (("--guidance-scale", "2", "--omega", "1"), "guidance_scale"),
        (("--negative-prompt", "blue", "--compile"), "negative_prompt"),
        (("--lora", "tdc"), "lora"),
        (("-s", "size=large"), "size"),
        (("--seed", "1", "--seed"), "seed"),
    ],
)
def test_options_out_of_range(
    refuse: Refuse, tiny_pipeline: Path, distilled: Path, options: tuple[str, ...], field: str
) -> None:
    lora = () if "--lora" in options else ("--lora", str(distilled))
    assert named(refuse("sample", "a disc", "--teacher", str(tiny_pipeline), *lora, *options)) == field


def test_unknown_verbs_and_options(refuse: Refuse) -> None:
    assert "sample" in str(refuse("sampel"))
    assert "--colour" in str(refuse("sample", "a disc", "--colour", "red"))
    assert "--prompt-file" in str(refuse("synthesize", "--out", "x"))


def test_a_place_that_is_named_like_a_bundled_student(refuse: Refuse) -> None:
    Path("tcd").mkdir()
    error = refuse("sample", "a disc", "--lora", "tcd", keeps=("tcd",))
    assert named(error) == "lora"
    assert str(Path("tcd").resolve()) in str(error)


def test_teacher_sampling_has_its_own_range(refuse: Refuse, tiny_pipeline: Path) -> None:
    """trailing takes more steps than the students' grid has points, but not more than there are indices."""
    teacher = ("--teacher", str(tiny_pipeline), "--lora", "none")
    for steps in ("0", "1001"):
        assert named(refuse("sample", "a disc", *teacher, "--steps", steps)) == "steps"
    with pytest.raises(SystemExit) as stop:
        cli.main(["sample", "a disc", *teacher, "--steps", "51", "--out", "t.png"])
    assert stop.value.code == 0


def test_loras_that_are_none(refuse: Refuse, tiny_pipeline: Path, distilled: Path, tmp_path: Path) -> None:
    def with_lora(path: Path) -> str:
        return str(refuse("sample", "a disc", "--teacher", str(tiny_pipeline), "--lora", str(path)))

    whole = distilled.read_bytes()
    cut = tmp_path / "cut.safetensors"
    for length in (0, 5, 40, len(whole) // 2, len(whole) - 1):
        cut.write_bytes(whole[:length])
        assert "cut.safetensors is not a whole safetensors file" in with_lora(cut)
    cut.write_bytes(whole + b"more")
    assert "is not a whole safetensors file" in with_lora(cut)
    cut.write_bytes(os.urandom(4096))
    assert "is not a whole safetensors file" in with_lora(cut)
    foreign = tmp_path / "foreign.safetensors"
    save_tensors(foreign, {"transformer.weight": torch.zeros(2, 2)})
    assert "'transformer.weight'" in with_lora(foreign)
    pickled = tmp_path / "lora.bin"
    pickled.write_bytes(b"\x80\x04")
    assert "is a pickle, which is never read" in with_lora(pickled)
    assert "holds no pytorch_lora_weights.safetensors" in with_lora(tmp_path)
    assert "is a whole pipeline; give it as the teacher" in with_lora(tiny_pipeline)


def test_a_lora_of_another_base(refuse: Refuse, tiny_pipeline: Path, distilled: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_pipeline, other)
    file = other / "unet" / "diffusion_pytorch_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))
    line = str(refuse("sample", "a disc", "--teacher", str(other), "--lora", str(distilled)))
    assert "was trained on another base (sha256 " in line
    strange = tmp_path / "strange.safetensors"
    for module, a, b, words in (
        ("mid_block.nowhere", (2, 32), (32, 2), "'unet.mid_block.nowhere.lora_A.weight' names no layer"),
        ("conv_in", (2, 3, 3, 3), (16, 2, 1, 1), "is for another base: conv_in is (16, 4, 3, 3), not (16, 3, 3, 3)"),
    ):
        tensors = {f"unet.{module}.lora_A.weight": torch.zeros(a), f"unet.{module}.lora_B.weight": torch.zeros(b)}
        save_tensors(strange, tensors)
        line = str(refuse("sample", "a disc", "--teacher", str(tiny_pipeline), "--lora", str(strange)))
        assert words in line


def test_a_broken_teacher(refuse: Refuse, tiny_pipeline: Path, tmp_path: Path) -> None:
    def at(path: Path) -> str:
        return str(refuse("sample", "a disc", "--teacher", str(path), "--lora", "none"))

    assert "holds no model_index.json" in at(tmp_path)
    broken = tmp_path / "broken"
    shutil.copytree(tiny_pipeline, broken)
    index = broken / "model_index.json"
    data = json.loads(index.read_text())
    index.write_text(json.dumps(data | {"_class_name": "KandinskyPipeline"}))
    assert "KandinskyPipeline" in at(broken)
    index.write_text("{")
    assert "is not valid JSON" in at(broken)
    index.write_text("[]")
    assert "holds a list; it must hold a mapping" in at(broken)
    index.write_text(json.dumps(data))
    for part in ("unet", "vae", "text_encoder"):
        (file,) = (broken / part).glob("*.safetensors")
        whole = file.read_bytes()
        save_tensors(file, {"some.layer.weight": torch.zeros(2)})
        line = at(broken)
        assert f"{part}: its " in line, "a foreign file"
        file.write_bytes(whole)
        save_tensors(file, dict(list(load_tensors(file).items())[1:]))
        assert f"{part}: its files hold no " in at(broken), "one weight less"
        file.write_bytes(whole[:-1])
        assert "is not a whole safetensors file" in at(broken)
        file.write_bytes(whole)
    file = broken / "unet" / "diffusion_pytorch_model.safetensors"
    file.rename(file.with_suffix(".bin"))
    assert "pickled weights are never read" in at(broken)


def test_evaluate_refuses_before_it_draws(refuse: Refuse, tiny_pipeline: Path, distilled: Path, tmp_path: Path) -> None:
    teacher = ("--teacher", str(tiny_pipeline), "--lora", str(distilled))
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red disc\n" * 9)
    assert named(refuse("evaluate", *teacher, "--prompt-file", "none.txt")) == "prompt_file"
    known = ("evaluate", *teacher, "--prompt-file", str(prompts))
    assert refuse(*known).field == "prompt_file"
    prompts.write_text("a red disc\n" * 10)
    for option, value in (("real", "nowhere"), ("steps", "51"), ("gamma", "2"), ("device", "gpu"), ("batch", "0")):
        assert named(refuse(*known, f"--{option}", value)) == option
    record = tiny_pipeline.parent / "few" / "fewstep.json"
    shutil.copytree(tiny_pipeline, record.parent)
    record.write_text(json.dumps({"sampling": {"sampler": "ddim", "spacing": "grid", "grid": 30}}))
    assert named(refuse(*known, "--reference", str(record.parent))) == "grid"


@pytest.mark.parametrize(
    ("override", "field"),
    [
        ("loop.step=1", "loop.step"),
        ("groups=48", "groups"),
        ("autoencoder=nowhere", "autoencoder"),
        ("text=nowhere", "text"),
    ],
)
def test_training_a_teacher_refuses_before_it_trains(
    refuse: Refuse, tiny_pipeline: Path, override: str, field: str
) -> None:
    finished = f"autoencoder={tiny_pipeline / 'vae'}"
    words = ("world", "stickers", "teacher", "--target", "pipeline", "-s", finished, "-s", override)
    assert named(refuse(*words)) == field


def test_training_a_teacher_replaces_nothing_but_a_pipeline(
    refuse: Refuse, tiny_pipeline: Path, tmp_path: Path
) -> None:
    out, runs = tmp_path / "runs" / "teacher", tmp_path / "runs"
    (runs / "other").mkdir(parents=True)
    file = tmp_path / "notes"
    file.write_text("mine")
    card = tmp_path / "card"
    shutil.copytree(tiny_pipeline, card)
    (card / "README.md").write_text("mine")
    half = tmp_path / "half"
    (half / "unet").mkdir(parents=True)
    for target, word in (
        (runs, str(out)),
        (out, str(out)),
        (out / "unet", str(out)),
        (runs / "other" / "..", str(out)),
        (file, "notes"),
        (card, "README.md"),
        (half, "unet"),
    ):
        assert word in str(refuse("world", "stickers", "teacher", "--out", str(out), "--target", str(target)))
    assert file.read_text() == "mine"


def test_the_demo_refuses_a_seed_that_noise_cannot_have(refuse: Refuse) -> None:
    assert refuse("demo", "-s", "seed=100").field == "seed"


# ---- in a process of its own

HEAVY = ("torch", "diffusers", "transformers", "scipy", "matplotlib")


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command as a user does, in a process that may not import anything heavy: seconds of waiting."""
    code = (
        "import atexit, sys\n"
        f"atexit.register(lambda: print([name for name in {HEAVY} if name in sys.modules]))\n"
        "from fewstep.commands.app import main\n"
        "main(sys.argv[1:])\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120)
    *lines, imported = done.stdout.splitlines()
    assert imported == "[]"
    done.stdout = "\n".join(lines)
    return done


@pytest.mark.slow
def test_refusals_are_light(tiny_pipeline: Path, distilled: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(distilled.read_bytes()[:-1])
    teacher = ("--teacher", str(tiny_pipeline))
    for arguments in (
        ("distill", "--recipe", "nope"),
        ("distill", "-s", "optim.nope=1"),
        ("train-latent-lpips", "-s", "pairs.groups=17"),
        ("train-latent-lpips", *teacher),
        ("sample", "a disc", *teacher, "--lora", str(cut)),
        ("sample", "a disc", *teacher, "--lora", str(distilled), "--steps", "51"),
        ("sample", "a disc", *teacher, "--lora", "none", "--steps", "1001"),
        ("sample", "a disc", *teacher, "--lora", str(distilled), "--device", "gpu"),
        ("sample", "一只狗", *teacher, "--lora", str(distilled), "--adapter", str(tmp_path)),
        ("train-adapter", *teacher, "--pairs", str(cut)),
        ("train-adapter", *teacher, "-s", "window=0"),
        ("world", "chinese", "-s", "prompts=19"),
    ):
        done = command(*arguments)
        assert done.returncode == 2
        assert done.stdout == ""
        assert len(done.stderr.splitlines()) == 1


def test_the_console_script_refuses_too() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fewstep", "distill", "--recipe", "nope"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert written() == []


def test_help_is_light() -> None:
    for flag in ("--help", "-h"):
        done = command(flag)
        assert done.returncode == 0
        for group in ("Distil", "Use", "Evaluate", "Data and other"):
            assert group in done.stdout
        for old in ("train-perceptual", "benchmark", "playground"):
            assert old not in done.stdout
    assert command("--version").stdout == fewstep.__version__
    done = command("sample", "--help")
    assert done.returncode == 0
    assert "--prompt-file" in done.stdout


@pytest.mark.slow
def test_a_command_imports_the_libraries_without_what_drawing_does_not_use() -> None:
    code = """
import sys
from fewstep.common import light_imports
light_imports.in_command = True
light_imports.import_libraries()
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextModel
print([name for name in light_imports.UNUSED if name in sys.modules])
import peft
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr


def test_distill_ends_with_the_student_the_best_and_a_command_that_draws_with_it(tmp_path: Path) -> None:
    run, student = tmp_path / "my run", tmp_path / "my run" / "student" / "a.safetensors"
    (run / "best").mkdir(parents=True)
    (run / "config.yaml").write_text("teacher: models/tiny\nloop: {steps: 4}\n")
    rows = [{"step": 2, "student/loss": 0.5}, {"step": 2, "validation/kid": 0.125}, {"step": 4, "validation/kid": 0.75}]
    (run / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run / "best" / "figures.json").write_text('{"step": 2, "kid": 0.125}')
    lines = "\n".join(ending(student, {"quiet": False})).splitlines()
    (kid,) = [line.split() for line in lines if line.strip().startswith("kid")]
    assert kid == ["kid", "0.75", "0.125"]
    assert str(student) in lines[-3]
    assert str(run / "best") in lines[-2]
    words = shlex.split(lines[-1])[1:]
    _, bound, _ = cli.app.parse_args(words[1:])
    assert bound.arguments["lora"] == str(student)
    assert bound.arguments["teacher"] == "models/tiny"
    assert list(ending(student, {"quiet": True})) == []


VERBS = {
    "init",
    "distill",
    "synthesize",
    "train-latent-lpips",
    "train-adapter",
    "train-style",
    "sample",
    "export",
    "evaluate",
    "draw-folder",
    "report",
    "recipes",
    "demo",
    "app",
}
STUDIES = {"playground", "benchmark", "family", "tlcm", "chinese", "versatility", "stickers"}


def verbs(app: App) -> set[str]:
    return {name for name in app if not name.startswith("-")}


def shown(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as stop:
        cli.main([*words, "--help"])
    assert stop.value.code == 0
    return " ".join(capsys.readouterr().out.replace("│", " ").split())


def test_every_verb_explains_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert verbs(cli.app) == {*VERBS, "world"}
    assert verbs(cli.studies) == STUDIES
    for words in [*((verb,) for verb in VERBS), *(("world", study) for study in STUDIES - {"stickers"})]:
        command = cli.app[words[0]] if len(words) == 1 else cli.studies[words[1]]
        help_ = shown(capsys, *words)
        for argument in command.assemble_argument_collection(parse_docstring=True):
            assert argument.name in help_
            assert argument.parameter.help, (words, argument.name)


def test_options_are_the_parameters_of_the_public_function(capsys: pytest.CaptureFixture[str]) -> None:
    for verb in VERBS - {"recipes", "demo", "export", "app"}:
        parameters = set(inspect.signature(getattr(fewstep, verb.replace("-", "_"))).parameters) - {"callback"}
        options = {argument.name for argument in cli.app[verb].assemble_argument_collection()} - {"--dry-run"}
        names = {"--set" if name in ("overrides", "settings") else f"--{name.replace('_', '-')}" for name in parameters}
        assert options == names


def test_examples_of_the_help_are_command_lines() -> None:
    seen = 0
    described = map(public, VERBS - {"app"})
    for function in (api.demo, api.family, api.tlcm, api.chinese, api.versatility, playground, *described):
        for line in re.findall(r"^Example: fewstep (.*)$", unwrapped(inspect.getdoc(function) or ""), re.M):
            seen += 1
            for part in line.split(";"):
                words = shlex.split(part.replace("fewstep ", "", 1) if part.startswith(" ") else part)
                cli.app.parse_args(words)
    assert seen >= 13


def public(verb: str) -> Any:
    named = "export_as" if verb == "export" else verb.replace("-", "_")
    return recipes if verb == "recipes" else api.demo if verb == "demo" else getattr(fewstep, named)


def test_old_verbs_and_options_are_read() -> None:
    studies = verbs(cli.studies)
    for old, new in (
        ("train-perceptual --prompts p --config c", "train-latent-lpips --prompt-file p --teacher-config c"),
        ("distill --prompts=p --config c.yaml", "distill --prompt-file=p --config c.yaml"),
        ("distill --config . --dry-run", "distill --teacher-config . --dry-run"),
        ("export tcd --prompt a --prompt b", "export tcd --prompts a --prompts b"),
        ("benchmark --out b", "world benchmark --out b"),
        ("family -s steps=1", "world family -s steps=1"),
        ("demo", "demo"),
        ("--help", "--help"),
        ("", ""),
    ):
        assert current(old.split(), studies) == new.split()


def test_alone_it_shows_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main([])
    out, err = capsys.readouterr()
    assert stop.value.code == 0
    assert "distill" in out
    assert len(out.splitlines()) > 5
    assert err == ""


def test_recipes_lists_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    from fewstep.common.config import dotted_keys
    from fewstep.distillation.config import DistillConfig

    with pytest.raises(SystemExit):
        cli.main(["recipes", "--settings"])
    out = capsys.readouterr().out
    for shown in ("loop.validate_every = 500:", "loop.steps = 20000:", "critic_optim.lr = 0.0002:", "method.k = 1:"):
        assert f"  {shown}" in out, "a section's own default, not its class's"
    sections = {key.rpartition(".")[0] for key in dotted_keys(DistillConfig)}
    for key in dotted_keys(DistillConfig):
        assert key in sections or f"  {key} = " in out, key


def test_recipes_describes_every_bundled_recipe() -> None:
    from fewstep.methods.recipes import describe, names

    assert all(all(describe(name).values()) for name in names())
    heading, *lines = recipes().splitlines()
    assert [line.split()[0] for line in lines] == names()
    tcd = next(line for line in lines if line.startswith("tcd ")).split()
    assert tcd[1:4] == ["4", "4", "2402.19159"], "steps, student + target + guided teacher, paper"
    assert heading.split()[:4] == ["recipe", "steps", "cost", "paper"]


def test_a_whole_slice(tiny_overrides: list[str], capsys: pytest.CaptureFixture[str], tiny_pipeline: Path) -> None:
    """distill --dry-run, distill, sample: what a newcomer does."""
    changes = [*tiny_overrides, "student.targets=[to_q]", "loop.steps=2"]
    words = ["--out", "run", *(word for change in changes for word in ("-s", change))]

    def run(*arguments: str) -> str:
        with pytest.raises(SystemExit) as stop:
            cli.main(list(arguments))
        out, err = capsys.readouterr()
        assert stop.value.code == 0, err
        return out

    out = run("distill", *words, "--dry-run")
    assert [line.split()[0] for line in out.splitlines()] == ["data", "time", "memory", "disk", "calls"]
    assert "network evaluations a sample and step: 4 (student 2, teacher 2)" in out
    assert written() == [], "a dry run leaves nothing"
    file = Path("run/student/pytorch_lora_weights.safetensors")
    assert str(file) in run("distill", *words)
    names = {path.name for path in Path("run").iterdir()}
    assert names - {"cache"} == {
        *("checkpoints", "student", "tensorboard"),
        *("config.yaml", "evaluations.json", "inputs.json", "log.jsonl", "versions.json", ".lock"),
    }
    for options, size in (
        (("--steps", "2"), (256, 256)),
        (("--count", "2", "--scale", "1", "--steps", "1"), (140, 72)),
    ):
        out = run(
            "sample", "a red disc", "--teacher", str(tiny_pipeline), "--lora", "run/student", "--out", "a.png", *options
        )
        from PIL import Image

        assert "wrote a.png" in out
        assert Image.open("a.png").size == size


def test_recipes_are_named_in_any_case() -> None:
    from fewstep.distillation.config import resolve

    assert resolve("TCD") == resolve("tcd")
    assert resolve("tcd", None, ["recipe=LCM"]) == resolve("lcm")


@pytest.mark.parametrize(
    ("recipe", "omegas", "w"),
    [("tcd", (1.0, 3.0), None), ("tlcm", (2.0, 2.0), None), ("lcm-full", (1.0, 3.0), 2.0), ("ctm", (0.0, 0.0), None)],
)
def test_a_teachers_own_guidance_replaces_the_recipes(
    recipe: str, omegas: tuple[float, float], w: float | None
) -> None:
    from fewstep.distillation.config import resolve

    config = resolve(recipe, omega=2.0)
    guides = config.method.guidance.guides
    assert (config.method.guidance.omegas if guides else (0.0, 0.0)) == omegas
    assert config.sampling.w == w
    named = ["method.guidance.high=20"]
    assert resolve("tcd", None, named, omega=2.0) == resolve("tcd", None, named), "not where one is named"


def test_a_plain_distillation_takes_the_guidance_in_the_teachers_folder(
    tiny_pipeline: Path, picture_folder: Path
) -> None:
    from fewstep.commands.distill import _settings

    words = ["device=cpu", f"data.source={picture_folder}", "loop.validate_every=null"]
    none = dict.fromkeys(("config", "prompt_file", "device", "precision"))
    settings, _, place = _settings(
        recipe="TCD", out=None, teacher=tiny_pipeline, teacher_config="", overrides=words, **none
    )
    assert settings.method.guidance.omegas == (3.5, 10.5), "its fewstep.json has omega 7"
    assert place == Path("runs/tcd")


def test_completion_knows_the_verbs(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fewstep", "--install-completion", "--shell", "bash"],
        env={**os.environ, "HOME": str(tmp_path), "SHELL": "/bin/bash"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    scripts = [path for path in tmp_path.rglob("*fewstep*") if path.is_file()]
    assert len(scripts) == 1
    script = scripts[0].read_text()
    for word in ("distill", "sample", "--prompt-file", "--gamma"):
        assert word in script
