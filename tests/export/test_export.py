"""`fewstep export`: every form of every family is read back by those who will read it, and draws what we draw."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from fewstep import export_as
from fewstep.backbones.families import FAMILIES
from fewstep.backbones.pipeline_folder import read_folder
from fewstep.commands import app as cli
from fewstep.commands.export import CARD_PROMPTS
from fewstep.common.errors import UserError
from fewstep.common.safetensors_header import read_safetensors_header
from fewstep.distillation import distill as distillation
from fewstep.distillation.config import resolve
from fewstep.export.formats import ADAPTERS, FORMS, ExportForm, support
from fewstep.inference.generator import load_image_generator
from fewstep.students.lora_checks import check_lora
from support import tiny_pipelines

KINDS = tuple(dict.fromkeys(family.kind for family in FAMILIES.values()))
MADE = {
    "sd": tiny_pipelines.sd,
    "pixart alpha": lambda folder: tiny_pipelines.pixart(folder, "PixArtAlphaPipeline"),
    "flux schnell": lambda folder: tiny_pipelines.flux(folder, guidance=False),
    "sd, v, zero terminal SNR": lambda folder: tiny_pipelines.sd(folder, "v_prediction", zero_snr=True),
    **{kind: tiny_pipelines.FAMILIES[kind] for kind in KINDS if kind != "sd"},
}

VARIANTS = ("flux schnell", "sd, v, zero terminal SNR")
"""Bases that the fast tests have in another form."""
SLOW = pytest.mark.slow

NEW = ("z_image", "qwen_image", "flux2", "chroma", "krea2", "anima")
FLOWS = [name for name in MADE if not name.startswith(("sd", "pixart"))] + ["sd3"]


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return tiny_pipelines.Lazily(lambda name: MADE[name](tmp_path_factory.mktemp("base") / "tiny"))


class Students(dict[tuple[str, str], Path]):
    """A student of each base and kind, three steps, trained when first asked for; the scale alpha / rank is not 1."""

    def __init__(self, folders: dict[str, Path], pictures: Path, root: Callable[[str], Path]) -> None:
        super().__init__()
        self.folders, self.pictures, self.root = folders, pictures, root

    def __missing__(self, key: tuple[str, str]) -> Path:
        name, kind = key
        words = [
            f"teacher={self.folders[name]}", f"data.source={self.pictures}", "device=cpu", f"student.kind={kind}",
            "student.rank=2", "student.alpha=3", "loop.steps=3", "loop.batch=2", "loop.validate_every=null",
            "optim.lr=1e-2", "optim.ema=null", "optim.warmup=0", "sampling.steps=2", "sampling.gamma=0.4",
        ]  # fmt: skip
        self[key] = distillation.distill(resolve("tcd", None, words), self.root("run"), quiet=True)
        return self[key]


@pytest.fixture(scope="session")
def students(
    folders: dict[str, Path], picture_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str], Path]:
    return Students(folders, picture_folder, tmp_path_factory.mktemp)


@pytest.mark.matrix
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", [pytest.param(name, marks=SLOW) if name in VARIANTS else name for name in MADE])
def test_what_is_written_is_read_back(
    name: str,
    form: ExportForm,
    folders: dict[str, Path],
    students: dict[tuple[str, str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By diffusers, by PEFT, or by us alone where no other tool reads it: all layers, and latents within 1e-4."""
    base, student = folders[name], students[name, "lora"]
    found = support(form, read_folder(base).family.kind)
    if found.reader is None:
        with pytest.raises(UserError, match="is not offered for"):
            export_as(student, form, out=tmp_path / "made", teacher=base)
        assert not (tmp_path / "made").exists()
        return
    place, checked = export_as(student, form, out=tmp_path / "made", teacher=base, prompts=["a red disc", "blue"])
    assert checked is not None
    assert checked.reader == found.reader
    layers = len(check_lora(student, read_folder(base)).layers)
    assert checked.loaded == checked.modules >= layers > 5
    assert (checked.modules == layers) == (form in ADAPTERS)
    assert checked.difference < 1e-4
    card = (tmp_path / "made" / "README.md").read_text(encoding="utf-8")
    assert "| network calls | 2 |" in card
    code = found.reader != "fewstep" and not read_folder(base).family.modular
    assert ("```python" in card) == code
    if code:
        monkeypatch.chdir(tmp_path)
        drawn = [by_card(code, base, name) for code in re.findall(r"```python\n(.*?)```", card, re.S)]
        assert len(drawn) == (1 if name in FLOWS else 2), "diffusers has no gamma on a flow"
        assert drawn[0].shape[0] >= 16
        assert np.abs(drawn[0] - drawn[-1]).max() <= 1, "diffusers' own scheduler makes the same jumps"
    assert (tmp_path / "made" / "pictures.webp").stat().st_size > 100
    assert place.exists()


def by_card(code: str, base: Path, name: str) -> np.ndarray:
    """Return the picture of a card's own lines, from seed 3."""
    code = code.replace('"BASE"', repr(str(base)))
    small = "height=64, width=64, " if name in (*NEW, "pixart", "pixart alpha") else ""  # no real size
    more = f"use_resolution_binning=False, {small}" if name.startswith("pixart") else small
    assert code.count("pipe(prompt=") == 1
    code = code.replace("pipe(prompt=", f"pipe({more}generator=torch.Generator().manual_seed(3), prompt=")
    variables: dict[str, Any] = {"torch": torch}
    exec(code, variables)
    return np.asarray(variables["picture"]).astype(int)


@pytest.mark.parametrize("name", ["sd3", pytest.param("flux", marks=pytest.mark.slow)])
def test_eulers_scheduler_draws_a_flow_student_at_gamma_0(
    name: str, folders: dict[str, Path], picture_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [
        f"teacher={folders[name]}", f"data.source={picture_folder}", "device=cpu", "student.rank=2", "loop.steps=1",
        "loop.batch=2", "loop.validate_every=null", "sampling.gamma=0", "sampling.steps=3", "optim.lr=0.1",
    ]  # fmt: skip
    student = distillation.distill(resolve("tcd", None, words), tmp_path / "run", quiet=True)
    export_as(student, out=tmp_path / "made", teacher=folders[name], prompts=["a red disc"])
    monkeypatch.chdir(tmp_path)
    card = (tmp_path / "made" / "README.md").read_text(encoding="utf-8")
    plain, ours = (by_card(code, folders[name], name) for code in re.findall(r"```python\n(.*?)```", card, re.S))
    assert np.abs(plain - ours).max() <= 2
    assert ours.std() > 3


def front_of(card: Path) -> dict[str, Any]:
    front: dict[str, Any] = yaml.safe_load(card.read_text(encoding="utf-8").split("---\n")[1])
    return front


def test_the_front_matter_names_base_and_licence(
    folders: dict[str, Path], students: dict[tuple[str, str], Path], tmp_path: Path
) -> None:
    """By the base's own card, unless others are given; and the facts of the training."""
    from huggingface_hub import ModelCard

    base, student = tmp_path / "base", students["sd", "lora"]
    shutil.copytree(folders["sd"], base)
    words: dict[str, Any] = {"teacher": base, "prompts": ["a red disc"], "check": False}
    export_as(student, out=tmp_path / "none", **words)
    (base / "README.md").write_text("---\nlicense: openrail++\ntags: [a]\n---\n# Base\n")
    export_as(student, out=tmp_path / "own", base_model="owner/base", **words)
    export_as(student, "merged", out=tmp_path / "given", base_model="owner/base", license="mit", **words)
    none, own, given = (front_of(tmp_path / name / "README.md") for name in ("none", "own", "given"))
    assert none["license"] == "other"
    assert "base_model" not in none
    assert (own["base_model"], own["base_model_relation"], own["license"]) == ("owner/base", "adapter", "openrail++")
    assert (given["base_model_relation"], given["license"]) == ("finetune", "mit")
    assert own["library_name"] == "diffusers"
    assert own["pipeline_tag"] == "text-to-image"
    assert {"lora", "tcd"} <= set(own["tags"])
    assert "lora" not in given["tags"]
    loaded = ModelCard.load(tmp_path / "own" / "README.md")
    assert loaded.data.base_model == "owner/base"
    assert 'from_pretrained("owner/base")' in loaded.text
    facts = dict(re.findall(r"^\| (.*?) \| (.*?) \|$", loaded.text.partition("## Training")[2], re.M))
    assert (facts["optimiser steps"], facts["batch"], facts["learning rate"]) == ("3", "2", "0.01")
    assert facts["guidance of the teacher"] == "2 to 14 (lcm)"


@pytest.mark.parametrize(
    ("name", "form"),
    [pytest.param(name, "merged", marks=[pytest.mark.slow] * (name in NEW)) for name in MADE]
    + [(name, "single-file") for name in MADE if name.startswith("sd") and name != "sd3"],
)
def test_a_fully_trained_student_is_exported_too(
    name: str, form: ExportForm, students: dict[tuple[str, str], Path], tmp_path: Path
) -> None:
    student = students[name, "full"]
    _, checked = export_as(student, form, out=tmp_path / "made", prompts=["a red disc"])
    assert checked is not None
    assert checked.loaded == checked.modules > 20
    assert checked.difference < 1e-4
    with pytest.raises(UserError, match="form = 'peft' holds a LoRA, the student is a whole pipeline"):
        export_as(student, "peft", out=tmp_path / "no")


def test_a_wrong_file_is_found_out(
    folders: dict[str, Path], students: dict[tuple[str, str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The proof fails where a layer is lost or a scale is another; nothing is left."""
    import fewstep.export.adapters as adapters
    import fewstep.export.export as exporting

    plain = adapters.write_kohya

    def losing(file: Path, *more: Any) -> Path:
        plain(file, *more)
        tensors = load_file(file)
        lost = next(iter(tensors)).rpartition(".lora_")[0].removesuffix(".alpha")
        metadata, _ = read_safetensors_header(file)
        save_file({key: value for key, value in tensors.items() if not key.startswith(lost)}, file, metadata)
        return file

    def scaling(file: Path, *more: Any) -> Path:
        plain(file, *more)
        metadata, _ = read_safetensors_header(file)
        tensors = {key: value * (2 if key.endswith(".alpha") else 1) for key, value in load_file(file).items()}
        save_file(tensors, file, metadata)
        return file

    for spoil, words in ((losing, r"\d+ of \d+ layers"), (scaling, "latents within")):
        monkeypatch.setattr(exporting, "write_kohya", spoil)
        with pytest.raises(UserError, match=rf"was not written: read back by diffusers: .*{words}"):
            export_as(students["sd", "lora"], "kohya", out=tmp_path / "made", teacher=folders["sd"])
        assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("form", ["merged", "single-file"])
def test_a_wrong_part_of_a_whole_pipeline_is_found_out(
    form: ExportForm,
    folders: dict[str, Path],
    students: dict[tuple[str, str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Latents do not show the autoencoder, and hardly a text encoder's last bits: both are counted, and one decodes."""
    import fewstep.export.export as exporting

    plain_file, plain_folder = exporting.checkpoint_weights, exporting.write_pipeline
    wrong = ""

    def one_file(*args: Any, **more: Any) -> dict[str, torch.Tensor]:
        weights = plain_file(*args, **more)
        name = next(name for name in weights if wrong in name and name.endswith("bias"))
        return {**weights, name: weights[name] + 1e-6}

    def one_folder(place: Path, *more: Any) -> None:
        plain_folder(place, *more)
        if wrong == "scale":
            config = place / "vae" / "config.json"
            config.write_text(json.dumps({**json.loads(config.read_text()), "scaling_factor": 0.2}))
            return
        (file,) = next(part for part in place.iterdir() if part.name.startswith(wrong)).glob("*.safetensors")
        weights = load_file(file)
        save_file({**weights, (name := next(iter(weights))): weights[name] + 1e-6}, file, {"format": "pt"})

    monkeypatch.setattr(exporting, "checkpoint_weights", one_file)
    monkeypatch.setattr(exporting, "write_pipeline", one_folder)
    spoiled = {"single-file": ("first_stage_model.decoder", "cond_stage_model"), "merged": ("vae", "text", "scale")}
    for wrong in spoiled[form]:
        with pytest.raises(UserError, match="was not written: read back by diffusers") as error:
            export_as(students["sd", "lora"], form, out=tmp_path / "made", teacher=folders["sd"], prompts=["a disc"])
        came, went = re.findall(r"(\d+) of (\d+) tensors, latents and a decoded corner within", str(error.value))[0]
        assert int(went) - int(came) == (wrong != "scale")
        assert not (tmp_path / "made").exists()


def test_a_teacher_is_read_back_as_well(folders: dict[str, Path], tmp_path: Path) -> None:
    """A whole pipeline that solvers draw, with guidance: proved by a few plain jumps under the same guidance."""
    _, checked = export_as(folders["sd"], "single-file", out=tmp_path / "made", prompts=["a red disc"])
    assert checked is not None
    assert checked.difference < 1e-4
    with pytest.raises(UserError, match="student = 'none' is the teacher itself"):
        export_as("none", "kohya", out=tmp_path / "no", teacher=folders["sd"])


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "flux", "pixart"])
def test_a_scale_that_the_metadata_holds_goes_into_the_matrices(
    name: str, folders: dict[str, Path], students: dict[tuple[str, str], Path], tmp_path: Path
) -> None:
    """By ComfyUI's rule, no `.alpha` key means scale 1: B A of the file is the whole change."""
    folder = read_folder(folders[name])
    metadata = {f"{folder.network}.r": 2, f"{folder.network}.lora_alpha": 3}
    save_file(
        load_file(students[name, "lora"]),
        tmp_path / "scaled.safetensors",
        {"lora_adapter_metadata": json.dumps(metadata)},
    )
    path, _ = export_as(tmp_path / "scaled.safetensors", out=tmp_path / "made", teacher=folders[name], check=False)
    header = check_lora(tmp_path / "scaled.safetensors", folder)
    own, made = load_file(header.file), load_file(path)
    assert not [key for key in made if key.endswith(".alpha")]
    for layer in header.layers.values():
        assert layer.scale == 1.5
        a, b = (own[key].float() for key in layer.keys)
        ours = made[layer.keys[1]].float().flatten(1) @ made[layer.keys[0]].float().flatten(1)
        torch.testing.assert_close(ours, 1.5 * b.flatten(1) @ a.flatten(1))
    assert {layer.scale for layer in check_lora(path, folder).layers.values()} == {1.0}


def test_half_precision_is_a_rounding(
    folders: dict[str, Path], students: dict[tuple[str, str], Path], tmp_path: Path
) -> None:
    """Every matrix of the file is the fp32 one, rounded; and so the picture, within the stated share."""
    made = {}
    for precision in ("fp32", "fp16"):
        path, checked = export_as(
            students["sdxl", "lora"], "single-file", out=tmp_path / precision, teacher=folders["sdxl"],
            precision=precision, prompts=["a red disc"],
        )  # fmt: skip
        made[precision] = load_file(path)
        assert checked is not None
        assert checked.loaded == checked.modules
    for name, value in made["fp16"].items():
        assert value.dtype == torch.float16
        assert torch.equal(value, made["fp32"][name].half()), name
    base = folders["sdxl"]
    path, _ = export_as(
        students["sdxl", "lora"], "merged", out=tmp_path / "merged", teacher=base, precision="fp16",
        prompts=["a red disc"], check=False,
    )  # fmt: skip
    (own,) = (path / "unet").glob("*.safetensors")
    assert {value.dtype for value in load_file(own).values()} == {torch.float16}
    for part in ("vae", "text_encoder", "text_encoder_2"):  # the base's own files
        (own,) = (path / part).glob("*.safetensors")
        assert own.read_bytes() == (base / part / own.name).read_bytes()


@pytest.mark.slow
def test_settings_are_read_back_from_every_form(
    folders: dict[str, Path], students: dict[tuple[str, str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`fewstep sample` draws the same from the student and from each of its exports."""
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))
    base, student = folders["sd"], students["sd", "lora"]
    shared = ["a red disc", "--seed", "3", "--device", "cpu", "--scale", "1"]

    def drawn(*words: str) -> bytes:
        with pytest.raises(SystemExit) as left:
            cli.main(["sample", *shared, *words, "--out", str(tmp_path / "drawn.png")])
        assert left.value.code == 0
        with Image.open(tmp_path / "drawn.png") as picture:
            return picture.tobytes()

    wanted = drawn("--teacher", str(base), "--lora", str(student.parent))
    assert wanted != drawn("--teacher", str(base), "--lora", "none", "--steps", "2", "--sampler", "sss", "--omega", "0")
    for form in FORMS:
        path, _ = export_as(student, form, out=tmp_path / form, teacher=base, check=False)
        if form == "merged":
            options = ["--teacher", str(path), "--lora", "none"]
        elif form == "single-file":
            options = ["--teacher", str(path), "--teacher-config", str(base), "--lora", "none"]
        else:
            options = ["--teacher", str(base), "--lora", str(path)]
        assert drawn(*options) == wanted, form


def test_a_student_with_the_landing_as_input(folders: dict[str, Path], picture_folder: Path, tmp_path: Path) -> None:
    """Its second embedding goes along where there is a place for it."""
    words = [
        f"teacher={folders['sd']}", f"data.source={picture_folder}", "device=cpu", "student.rank=2", "loop.steps=2",
        "loop.batch=2", "loop.validate_every=null", "optim.lr=1e-2", "optim.ema=null", "optim.warmup=0",
    ]  # fmt: skip
    student = distillation.distill(resolve("tcd-s", None, words), tmp_path / "run", quiet=True)
    for form in ("diffusers", "merged"):
        path, checked = export_as(student, form, out=tmp_path / form, teacher=folders["sd"])
        assert checked is not None
        assert (checked.reader, checked.difference) == ("fewstep", pytest.approx(0, abs=1e-5))
        folder = path if form == "merged" else path.parent
        assert (folder / "conditioning.safetensors").read_bytes() == (
            student.parent / "conditioning.safetensors"
        ).read_bytes()
        assert "fewstep.attach(pipe" in (folder / "README.md").read_text(encoding="utf-8")
    with pytest.raises(UserError, match="cannot hold extra conditioning"):
        export_as(student, "kohya", out=tmp_path / "no", teacher=folders["sd"])


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["tcd", "--form", "kohja"], "did you mean 'kohya'?"),
        (["tcd", "--form", "single-file"], "holds CLIP text encoders, the text_encoder is a BertModel"),
        (["tdc"], "lora = 'tdc' is neither a file nor a bundled student"),
        (["tcd", "--precision", "fp8"], "precision = 'fp8' is not one of fp32, fp16, bf16"),
        (["tcd", "--precision", "bf16"], "a LoRA keeps its own"),
        (["WHOLE", "--form", "merged", "--teacher", "nowhere"], "teacher = 'nowhere' has no effect"),
        (["tcd", "--out", "TAKEN"], "which would be lost; give a new folder"),
    ],
)  # fmt: skip
def test_refusals(words: list[str], reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("years of work")
    given = {"TAKEN": str(tmp_path / "taken"), "WHOLE": str(_teacher())}
    words = [given.get(word, word) for word in words]
    if "--out" not in words:
        words += ["--out", str(tmp_path / "new")]
    with pytest.raises(SystemExit) as left:
        cli.main(["export", *words])
    assert left.value.code == 2
    printed = capsys.readouterr().err
    assert reason in printed
    assert printed.count("\n") == 1
    assert not (tmp_path / "new").exists()
    assert (tmp_path / "taken" / "thesis.txt").read_text() == "years of work"


def test_mismatched_parts_are_one_line(
    folders: dict[str, Path],
    students: dict[tuple[str, str], Path],
    picture_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Another base, another rank, another number of channels: exit code 2, before any long work."""
    own, other, lora = folders["sd"], folders["sdxl"], str(students["sd", "lora"])
    fitting = tmp_path / "fitting"
    shutil.copytree(own, fitting)
    weights = fitting / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({name: value + 1e-3 for name, value in load_file(weights).items()}, weights, {"format": "pt"})
    wide = tmp_path / "wide"
    shutil.copytree(own, wide)
    config = wide / "unet" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "in_channels": 9}))
    new = ["--out", str(tmp_path / "new")]
    drawn = ["--out", str(tmp_path / "new.png")]
    data = ["-s", f"data.source={picture_folder}"]
    for words, reason in (
        (["sample", "a", "--lora", lora, "--teacher", str(other), *drawn], "is for another base"),
        (["sample", "a", "--lora", lora, "--teacher", str(fitting), *drawn], "was trained on another base (sha256"),
        (["export", lora, "--teacher", str(other), *new], "is for another base"),
        (["export", lora, "--teacher", str(fitting), *new], "was trained on another base (sha256"),
        (["distill", "--teacher", str(own), *data, *new, "-s", f"student.start={lora}"], "use 2"),
        (["sample", "a", "--lora", "none", "--teacher", str(wide), *drawn], "in_channels = 9, its latents have 4"),
        (["distill", "--teacher", str(wide), *data, *new], "in_channels = 9, its latents have 4"),
    ):
        with pytest.raises(SystemExit) as left:
            cli.main(words)
        printed = capsys.readouterr().err
        assert left.value.code == 2, words
        assert reason in printed
        assert printed.count("\n") == 1
        assert not (tmp_path / "new").exists()
        assert not (tmp_path / "new.png").exists()


def test_the_bundled_student_for_other_tools(tmp_path: Path) -> None:
    """One line by the command; the card shows the pictures and the file's own settings."""
    path, checked = export_as("tcd", "kohya", out=tmp_path / "tcd-kohya")
    assert checked is not None
    assert checked.difference < 1e-4
    assert path.name == "tcd-kohya.safetensors"
    alphas = {key: float(value) for key, value in load_file(path).items() if key.endswith(".alpha")}
    header = check_lora(_bundled(), read_folder(_teacher()))
    assert len(alphas) == len(header.layers) == checked.modules
    layer = next(iter(header.layers.values()))
    assert set(alphas.values()) == {layer.scale * layer.a[0]}
    card = (tmp_path / "tcd-kohya" / "README.md").read_text(encoding="utf-8")
    for prompt in CARD_PROMPTS:
        assert prompt in card
    record = json.loads(card.rpartition("```json\n")[2].removesuffix("\n```\n"))
    assert record["sampling"] == load_image_generator(_teacher(), _bundled()).sampling.model_dump(mode="json")


def _teacher() -> Path:
    from fewstep.backbones.teachers import teacher_path

    return teacher_path("")


def _bundled() -> Path:
    from fewstep_worlds.common.location import root

    return root() / "students" / "tcd"
