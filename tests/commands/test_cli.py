"""What a person types: help that teaches, refusals of one line, exit code 2, nothing written."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from fewstep.commands import app as cli
from fewstep.common.tensors import load_tensors, save_tensors
from fewstep_worlds.emoji8.config import TeacherConfig


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run in an empty folder, to see what is left in it."""
    place = tmp_path / "here"
    place.mkdir()
    monkeypatch.chdir(place)


def written() -> list[str]:
    return sorted(str(path) for path in Path().rglob("*"))


Refuse = Callable[..., str]


@pytest.fixture
def refuse(capsys: pytest.CaptureFixture[str]) -> Refuse:
    """Run the command; it must exit with 2, say one line, write nothing. Returns the line."""

    def run(*arguments: str, keeps: tuple[str, ...] = ()) -> str:
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
        return err

    return run


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


def test_an_unknown_recipe_names_the_nearest(refuse: Refuse) -> None:
    line = refuse("distill", "--recipe", "lcmm")
    assert line.startswith("fewstep: recipe = 'lcmm' is not one of cd, ct, ctm, kd, lcm, ")
    assert line.endswith("the nearest is lcm\n")
    assert "nowhere.yaml" in refuse("distill", "--recipe", "nowhere.yaml")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optim.leraning_rate=1", "unknown key optim.leraning_rate; the nearest known one is optim."),
        ("lr=1e-3", "unknown key lr; the nearest known one is optim.lr"),
        ("methd.k=2", "unknown key methd; the nearest known one is method"),
        ("loop.step=2", "unknown key loop.step; the nearest known one is loop.steps"),
        ("optim.lr", "override 'optim.lr' is not of the form key=value"),
        ("optim.lr=fast", "optim.lr = 'fast'"),
        ("optim.lr=0", "optim.lr = 0 must be above 0"),
        ("optim.lr=.inf", "optim.lr = inf"),
        ("loop.steps=0", "loop.steps = 0 must be at least 1; the nearest legal one is 1"),
        ("sampling.steps=51", "steps = 51 is out of range for grid = 50; the nearest legal one is 50"),
        ("sampling.grid=0", "grid = 0 has no points; the nearest legal one is 1"),
        ("method.grid=-5", "grid = -5 has less than 2 points; the nearest legal one is 2"),
        ("sampling.gamma=1.5", "sampling.gamma = 1.5 must be at most 1; the nearest legal one is 1"),
        ("method.jump=hop", "method.jump = 'hop' is not one of skip, cm_skip, first_order, second_order; the"),
        ("method.grid=25", "sampling.grid = 50 has times that method.grid = 25 does not train"),
        ("sampling.end=clean", "sampling.end = 'clean' is not the end point that is trained"),
        ("loop.accumulate=5", "batch = 32 is not a multiple of accumulate = 5; the nearest legal one is 30"),
        ("student.targets=[to_k,to_qq]", "student.targets: no layer of the teacher's network ends with 'to_qq'"),
        (
            "method.grid=60 sampling.grid=60",
            "method.grid = 60 does not divide the teacher's 1000 training indices; ",
        ),
        (
            "sampling.sampler=ddim sampling.grid=60",
            "sampling.grid = 60 does not divide the teacher's 1000 training indices; ",
        ),
        (
            "sampling.sampler=ddim sampling.spacing=trailing sampling.steps=2000",
            "sampling.steps = 2000 is out of range; the nearest legal one is 1000",
        ),
        (
            "validation.teacher_steps=2000",
            "validation.teacher_steps = 2000 is out of range; the nearest legal one is 1000",
        ),
        ("validation.prompts=validaton", "prompt list 'validaton' is unknown; the nearest is 'validation'"),
        ("data.source=nowhere", "data.source = 'nowhere' does not exist"),
        ("teacher=nowhere", "teacher = 'nowhere' does not exist"),
    ],
)
def test_a_wrong_setting_is_named_with_the_nearest(
    refuse: Refuse, tiny_pipeline: Path, override: str, words: str
) -> None:
    teacher = () if override.startswith("teacher") else ("--teacher", str(tiny_pipeline))
    changes = [word for change in override.split() for word in ("-s", change)]
    assert words in refuse("distill", *teacher, *changes)


def test_wrong_config_files(refuse: Refuse, tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("optim: {lr: 1e-4\n")
    assert "is not valid YAML" in refuse("distill", "--config", str(file))
    file.write_text("- optim\n")
    assert "must hold a mapping" in refuse("distill", "--config", str(file))
    file.write_text("optim:\n  rate: 1e-4\n")
    assert "unknown key optim.rate; the nearest known one is optim." in refuse("distill", "--config", str(file))
    assert "cannot read config" in refuse("distill", "--config", str(tmp_path / "none.yaml"))


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
        line = refuse(*arguments)
        assert "zero terminal SNR" in line
        assert "the nearest legal one is 'v_prediction'" in line
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
    line = refuse("distill", *teacher, "-s", f"data.source={picture_folder}", "--out", place)
    assert f"cannot write {place}" in line
    line = refuse("sample", "a disc", *teacher, "--lora", str(distilled), "--out", f"{place}/a.png")
    assert f"cannot write {place}" in line


def test_a_run_folder_of_another_config(refuse: Refuse, tiny_overrides: list[str]) -> None:
    from fewstep.distillation.config import resolve
    from fewstep.training.run_folder import RunLog

    RunLog(Path("run"), resolve("tcd", None, tiny_overrides), title="x", quiet=True)
    words = [word for override in [*tiny_overrides, "optim.lr=0.5"] for word in ("-s", override)]
    assert "holds a run with another optim.lr (0.001, now 0.5)" in refuse("distill", "--out", "run", *words)


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
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("fewstep: ")]
    assert len(said) == 1
    assert "step-00000004: No space left on device; nothing was left there" in said[0]
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
    (said,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("fewstep: ")]
    assert "No space left on device" in said
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
    line = refuse("sample", "a disc", "--teacher", str(tiny_pipeline), "--lora", str(distilled), "--out", "a.png")
    assert "cannot write a.png: No space left on device" in line
    assert Path("a.png").read_bytes() == b"the old picture"


# ---- sample


def test_prompts_that_are_not_there(refuse: Refuse, tmp_path: Path) -> None:
    assert "prompts is empty" in refuse("sample")
    assert "prompts is empty" in refuse("sample", " ")
    assert "prompt_file = 'none.txt' cannot be read: No such file" in refuse("sample", "--prompt-file", "none.txt")
    empty = tmp_path / "empty.txt"
    empty.write_text("\n  \n")
    assert "holds no prompt" in refuse("sample", "--prompt-file", str(empty))
    empty.write_bytes(b"\xff\xfe\x00")
    assert "save it as UTF-8" in refuse("sample", "--prompt-file", str(empty))
    assert "cannot be read" in refuse("sample", "--prompt-file", str(tmp_path))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--steps", "0"), "steps = 0 must be at least 1; the nearest legal one is 1"),
        (("--steps", "51"), "steps = 51 is out of range for grid = 50; the nearest legal one is 50"),
        (("--steps", "four"), "Invalid value for '--steps': Input should be a valid integer"),
        (("--steps", "3", "--sampler", "dpmpp_2s"), "steps = 3 network calls cannot be split into dpmpp_2s"),
        (("--gamma", "-0.1"), "gamma = -0.1 must be at least 0; the nearest legal one is 0"),
        (("--gamma", "1.01"), "gamma = 1.01 must be at most 1; the nearest legal one is 1"),
        (("--gamma", "nan"), "gamma = nan"),
        (("--gamma", "0.5", "--sampler", "lcm"), "gamma = 0.5 says nothing to sampler = 'lcm'; leave it out"),
        (("--omega", "-1"), "omega = -1.0 must be at least 0"),
        (("--sampler", "dimm"), "sampler = 'dimm' is not one of sss, lcm, ddim, euler, heun, dpm_2, dpmpp_2s,"),
        (("--count", "0"), "count = 0 must be at least 1"),
        (("--batch", "0"), "batch = 0 must be at least 1"),
        (("--scale", "-3"), "scale = -3 must be at least 1"),
        (("--seed", "-1"), "seed = -1 is out of range; the nearest legal one is 0"),
        (("--out", "picture.gif"), "out = 'picture.gif' must end in .png or .webp; the nearest is 'picture.png'"),
        (("--out", "picture"), "out = 'picture' must end in .png or .webp"),
        (("--lora", "tdc"), "lora = 'tdc' is neither a file nor a bundled student; the nearest is 'tcd'"),
        (("--colour", "red"), "No such option"),
    ],
)
def test_options_out_of_range(
    refuse: Refuse, tiny_pipeline: Path, distilled: Path, options: tuple[str, ...], words: str
) -> None:
    lora = () if "--lora" in options else ("--lora", str(distilled))
    assert words in refuse("sample", "a disc", "--teacher", str(tiny_pipeline), *lora, *options)


def test_a_place_that_is_named_like_a_bundled_student(refuse: Refuse) -> None:
    Path("tcd").mkdir()
    line = refuse("sample", "a disc", "--lora", "tcd", keeps=("tcd",))
    assert "lora = 'tcd' is a bundled student and also" in line
    assert str(Path("tcd").resolve()) in line


def test_teacher_sampling_has_its_own_range(refuse: Refuse, tiny_pipeline: Path) -> None:
    """trailing takes more steps than the students' grid has points, but not more than there are indices."""
    teacher = ("--teacher", str(tiny_pipeline), "--lora", "none")
    assert "steps = 0" in refuse("sample", "a disc", *teacher, "--steps", "0")
    line = refuse("sample", "a disc", *teacher, "--steps", "1001")
    assert "steps = 1001 is out of range; the nearest legal one is 1000" in line
    with pytest.raises(SystemExit) as stop:
        cli.main(["sample", "a disc", *teacher, "--steps", "51", "--out", "t.png"])
    assert stop.value.code == 0


def test_out_is_a_folder(refuse: Refuse, tiny_pipeline: Path, distilled: Path) -> None:
    Path("a.png").mkdir()
    teacher = ("--teacher", str(tiny_pipeline), "--lora", str(distilled))
    assert "out = 'a.png' is a folder" in refuse("sample", "a disc", *teacher, "--out", "a.png")


def test_loras_that_are_none(refuse: Refuse, tiny_pipeline: Path, distilled: Path, tmp_path: Path) -> None:
    def with_lora(path: Path) -> str:
        return refuse("sample", "a disc", "--teacher", str(tiny_pipeline), "--lora", str(path))

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
    assert "is a pickle, which is never read; convert it" in with_lora(pickled)
    assert "holds no pytorch_lora_weights.safetensors" in with_lora(tmp_path)
    assert "is a whole pipeline; give it as the teacher" in with_lora(tiny_pipeline)


def test_a_lora_of_another_base(refuse: Refuse, tiny_pipeline: Path, distilled: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_pipeline, other)
    file = other / "unet" / "diffusion_pytorch_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))
    line = refuse("sample", "a disc", "--teacher", str(other), "--lora", str(distilled))
    assert "was trained on another base (sha256 " in line
    strange = tmp_path / "strange.safetensors"
    for module, a, b, words in (
        ("mid_block.nowhere", (2, 32), (32, 2), "'unet.mid_block.nowhere.lora_A.weight' names no layer"),
        ("conv_in", (2, 3, 3, 3), (16, 2, 1, 1), "is for another base: conv_in is (16, 4, 3, 3), not (16, 3, 3, 3)"),
    ):
        tensors = {f"unet.{module}.lora_A.weight": torch.zeros(a), f"unet.{module}.lora_B.weight": torch.zeros(b)}
        save_tensors(strange, tensors)
        line = refuse("sample", "a disc", "--teacher", str(tiny_pipeline), "--lora", str(strange))
        assert words in line


def test_a_broken_teacher(refuse: Refuse, tiny_pipeline: Path, tmp_path: Path) -> None:
    def at(path: Path) -> str:
        return refuse("sample", "a disc", "--teacher", str(path), "--lora", "none")

    assert "holds no model_index.json" in at(tmp_path)
    broken = tmp_path / "broken"
    shutil.copytree(tiny_pipeline, broken)
    index = broken / "model_index.json"
    data = json.loads(index.read_text())
    index.write_text(json.dumps(data | {"_class_name": "KandinskyPipeline"}))
    assert "is a KandinskyPipeline; the nearest supported pipeline is SanaPipeline" in at(broken)
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
    assert "prompt_file = 'none.txt' cannot be read" in refuse("evaluate", *teacher, "--prompt-file", "none.txt")
    known = ("evaluate", *teacher, "--prompt-file", str(prompts))
    assert "prompt_file holds 9 prompts; KID needs at least 10" in refuse(*known)
    prompts.write_text("a red disc\n" * 10)
    assert "real = 'nowhere' is not a folder" in refuse(*known, "--real", "nowhere")
    assert "steps = 51 is out of range" in refuse(*known, "--steps", "51")
    assert "gamma = 2.0 must be at most 1" in refuse(*known, "--gamma", "2")
    assert "device = 'gpu' is not one of auto, cpu, cuda; the nearest is 'cpu'" in refuse(*known, "--device", "gpu")
    record = tiny_pipeline.parent / "few" / "fewstep.json"
    shutil.copytree(tiny_pipeline, record.parent)
    record.write_text(json.dumps({"sampling": {"sampler": "ddim", "spacing": "grid", "grid": 30}}))
    line = refuse(*known, "--reference", str(record.parent))
    assert "grid = 30 does not divide the teacher's 1000 training indices; the nearest legal one is 25" in line


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("unet.loop.step=1", "unknown key unet.loop.step; the nearest known one is unet.loop.steps"),
        ("vae.latent_channels=8", "unet.latent_channels = 16 and vae.latent_channels = 8 differ; the nearest is 8"),
        ("unet.groups=48", "unet.groups = 48 does not divide all of unet.channels = [128, 128]; the nearest legal one"),
        ("unet.start=nowhere", "'nowhere' does not exist"),
        ("unet.text_width=64", "unet.text_width = 64 is not the text encoder's; the nearest legal one is 384"),
    ],
)
def test_train_teacher_refuses_before_it_trains(refuse: Refuse, override: str, words: str) -> None:
    assert words in refuse("train-teacher", "-s", override)


def test_train_teacher_refuses_other_settings_of_a_part_that_is_done(refuse: Refuse, tmp_path: Path) -> None:
    folder = tmp_path / "teacher" / "vae"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(TeacherConfig().vae.model_dump(mode="json")))
    assert "holds a run with another beta" in refuse(
        "train-teacher", "--out", str(tmp_path / "teacher"), "-s", "vae.beta=1e-3"
    )


def test_train_teacher_replaces_nothing_but_a_pipeline(refuse: Refuse, tiny_pipeline: Path, tmp_path: Path) -> None:
    out, runs = tmp_path / "runs" / "teacher", tmp_path / "runs"
    (runs / "other").mkdir(parents=True)
    file = tmp_path / "notes"
    file.write_text("mine")
    card = tmp_path / "card"
    shutil.copytree(tiny_pipeline, card)
    (card / "README.md").write_text("mine")
    half = tmp_path / "half"
    (half / "unet").mkdir(parents=True)
    for target, words in (
        (runs, f"is a place of the run in {out}; the nearest legal one is {str(out / 'pipeline')!r}"),
        (out, "is a place of the run"),
        (out / "unet", "is a place of the run"),
        (file, "holds notes, which would be lost"),
        (card, "holds README.md, which would be lost"),
        (half, "holds unet, which would be lost"),
        (runs / "other" / "..", "is a place of the run"),
    ):
        assert words in refuse("train-teacher", "--out", str(out), "--target", str(target))
    assert file.read_text() == "mine"


def test_the_demo_refuses_a_seed_that_noise_cannot_have(refuse: Refuse) -> None:
    assert "seed = 100 must be at most 89; the nearest legal one is 89" in refuse("demo", "-s", "seed=100")


# ---- in a process of its own

VERBS = (
    *("recipes", "distill", "sample", "synthesize", "evaluate", "demo", "benchmark", "train-teacher"),
    *("train-adapter", "chinese", "train-perceptual", "train-reward", "tlcm"),
)


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


def test_refusals_are_light(tiny_pipeline: Path, distilled: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(distilled.read_bytes()[:-1])
    teacher = ("--teacher", str(tiny_pipeline))
    for arguments in (
        ("distill", "--recipe", "nope"),
        ("distill", "-s", "optim.nope=1"),
        ("train-perceptual", "-s", "pairs.groups=17"),
        ("train-perceptual", *teacher),
        ("sample", "a disc", *teacher, "--lora", str(cut)),
        ("sample", "a disc", *teacher, "--lora", str(distilled), "--steps", "51"),
        ("sample", "a disc", *teacher, "--lora", "none", "--steps", "1001"),
        ("sample", "a disc", *teacher, "--lora", str(distilled), "--device", "gpu"),
        ("sample", "一只狗", *teacher, "--lora", str(distilled), "--adapter", str(tmp_path)),
        ("train-adapter", *teacher, "--pairs", str(cut)),
        ("train-adapter", *teacher, "-s", "mixed=0"),
        ("chinese", "-s", "concepts=121"),
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
    done = command("--help")
    assert done.returncode == 0
    for verb in VERBS:
        assert verb in done.stdout


@pytest.mark.parametrize(
    ("verb", "options"),
    [
        ("recipes", ("--settings",)),
        ("distill", ("--recipe", "--out", "--teacher", "--config", "--set", "--dry-run")),
        (
            "sample",
            ("--prompt-file", "--lora", "--steps", "--gamma", "--omega", "--sampler", "--seed", "--count", "--out"),
        ),
        ("synthesize", ("--prompts", "--out", "--teacher", "--kind", "--set", "--dry-run")),
        ("evaluate", ("--prompt-file", "--lora", "--real", "--steps", "--out")),
        ("demo", ("--out", "--set")),
        ("benchmark", ("--out", "--set")),
        ("train-teacher", ("--out", "--target", "--config", "--set")),
        ("train-adapter", ("--out", "--pairs", "--teacher", "--config", "--set")),
        ("train-perceptual", ("--out", "--prompts", "--teacher", "--config", "--set")),
        ("chinese", ("--out", "--set")),
    ],
)
def test_help_names_every_option(verb: str, options: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main([verb, "--help"])
    out = capsys.readouterr().out
    assert stop.value.code == 0
    for option in options:
        assert option in out


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
    for shown in ("loop.validate_every = 500:", "vae.loop.steps = 2800:", "unet.optim.lr = 0.0005:", "method.k = 1:"):
        assert f"  {shown}" in out, "a section's own default, not its class's"
    sections = {key.rpartition(".")[0] for key in dotted_keys(DistillConfig)}
    for key in dotted_keys(DistillConfig):
        assert key in sections or f"  {key} = " in out, key


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
    assert "network evaluations a sample and step: 4 (student 1, target 1, teacher 2)" in out
    assert written() == [], "a dry run leaves nothing"
    file = Path("run/student/pytorch_lora_weights.safetensors")
    assert f"wrote {file}" in run("distill", *words)
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
