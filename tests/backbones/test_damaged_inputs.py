"""Damaged and odd inputs of every kind, made by `damage`: each ends as plain diffusers does, or in one line."""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from safetensors.torch import save_file

from fewstep.backbones.families import CONSISTENCY
from fewstep.backbones.pipeline_folder import read_folder
from fewstep.commands import app as cli
from fewstep.commands.export import export_as
from fewstep.common.errors import UserError
from fewstep.data.images import Captioned, from_folder
from fewstep.data.prompts import read_prompts
from fewstep.data.shards import from_shards
from fewstep.distillation.config import resolve
from fewstep.students.lora_file import FILE as LORA_FILE
from fewstep.students.lora_header import base_shapes
from support import tiny_pipelines
from support.damage import (
    CAPTIONS,
    NUMBERS,
    SIDE,
    WRONG,
    Damage,
    DataDamage,
    Files,
    data_damages,
    file_damages,
    folder_damages,
    json_damages,
    lora_damages,
    lora_weights,
    pixels,
    prompt_damages,
    setting_damages,
    some,
    undamaged,
    weight_damages,
)

PROMPT = "a red cat"
RUNS = 16
"""Damages of a run folder that are tried."""
LORA, SINGLE = "lora.safetensors", "model.safetensors"
CLOSE = 2
"""Levels of 255 by which pictures may differ: rounding."""
STEPS = ["--steps", "2", "--omega", "2.0"]
SOLVER = [*STEPS, "-s", "sampler=ddim", "-s", "spacing=trailing", "-s", "end=clean"]


def command(*words: str) -> tuple[int, str]:
    """Run the command in this process: its exit code and what it wrote to stderr."""
    errors = io.StringIO()
    with redirect_stderr(errors), redirect_stdout(io.StringIO()), pytest.raises(SystemExit) as stop:
        cli.main([str(word) for word in words])
    return int(stop.value.code or 0), errors.getvalue()


def refused(code: int, errors: str) -> bool:
    """Whether the command ended in one line of its own and exit code 2; fails where it ended in anything else."""
    assert code in (0, 2), errors
    if code == 0:
        return False
    assert errors.startswith("fewstep: "), errors
    assert errors.count("\n") == 1, errors
    return True


def drawn(out: Path, *words: Path | str) -> np.ndarray | None:
    """The picture that `fewstep sample` draws, int [H, W, 3]; None where it refuses."""
    options = ("--device", "cpu", "--scale", "1", "--out", str(out))
    code, errors = command("sample", PROMPT, *words, *options)
    return None if refused(code, errors) else np.asarray(Image.open(out)).astype(int)


def by_diffusers(load: Callable[[], Any]) -> np.ndarray | None:
    """The same picture by a pipeline of plain diffusers; None where diffusers cannot load or draw it."""
    from diffusers import DDIMScheduler

    try:
        pipe = load()
        pipe.set_progress_bar_config(disable=True)
        if type(pipe).__name__ != CONSISTENCY:  # which has one of its own
            again = {"timestep_spacing": "trailing", "set_alpha_to_one": True, "clip_sample": False}
            pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, **again)
        noise = torch.Generator("cpu").manual_seed(0)
        found = pipe(PROMPT, generator=noise, num_inference_steps=2, guidance_scale=3.0).images[0]
        return np.asarray(found).astype(int)
    except Exception:  # whatever diffusers raises on it
        return None


def loaded(kind: str, folder: Path) -> Any:
    """A pipeline of diffusers from a folder."""
    import diffusers

    return getattr(diffusers, kind).from_pretrained(folder, local_files_only=True, use_safetensors=True)


def same(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two pictures are one but for rounding."""
    return one.shape == other.shape and int(abs(one - other).max()) <= CLOSE


@dataclass
class Bench:
    """An undamaged input of one kind: a folder that is copied, damaged, and drawn from twice.

    Attributes:
        root: the folder.
        damages: all that is known for it.
        words: (a copy) -> the command's words that name it.
        load: (a copy) -> a pipeline of plain diffusers from it.
        plain: the undamaged picture, by diffusers.
    """

    root: Path
    damages: list[Damage]
    words: Callable[[Path], Sequence[Path | str]]
    load: Callable[[Path], Any]

    @cached_property
    def plain(self) -> np.ndarray:
        """The undamaged picture, by diffusers."""
        found = by_diffusers(lambda: self.load(self.root))
        assert found is not None
        return found

    def judge(self, damage: Damage | None, place: Path) -> str:
        """Damage a copy and draw from it: "right" or "refused".

        Raises:
            AssertionError: it ended otherwise.
        """
        copy = Path(shutil.copytree(self.root, place / "input"))
        if damage is not None:
            damage.apply(copy)
        ours = drawn(place / "ours.png", *self.words(copy))
        if ours is None:
            return "refused"
        theirs = None if damage and damage.means else by_diffusers(lambda: self.load(copy))
        wanted = self.plain if theirs is None else theirs
        assert same(ours, wanted), f"{'the undamaged' if theirs is None else 'another'} picture"
        return "right"


def pipeline_bench(make: Callable[[Path], Path], place: Path) -> Bench:
    """A tiny pipeline folder of a family."""
    root = make(place / "pipe")
    kind = read_folder(root).pipeline
    solver = STEPS if kind == CONSISTENCY else SOLVER
    return Bench(
        root,
        list(folder_damages(root)),
        lambda copy: ("--teacher", copy, "--lora", "none", *solver),
        lambda copy: loaded(kind, copy),
    )


def lora_bench(place: Path) -> Bench:
    """A LoRA of a tiny pipeline that is not damaged itself."""
    base = tiny_pipelines.sd(place / "pipe")
    root = place / "lora"
    root.mkdir()
    save_file(lora_weights(base_shapes(read_folder(base))), root / LORA, {"format": "pt"})

    def load(copy: Path) -> Any:
        pipe = loaded("StableDiffusionPipeline", base)
        pipe.load_lora_weights(copy, weight_name=LORA)
        return pipe

    return Bench(root, list(lora_damages(LORA)), lambda copy: ("--teacher", base, "--lora", copy / LORA, *SOLVER), load)


def single_file_bench(place: Path) -> Bench:
    """A checkpoint in one file, and the folder of its configs, which is not damaged itself."""
    base = tiny_pipelines.sd(place / "pipe")
    root = place / "single"
    export_as(base, form="single-file", out=root, check=False, device="cpu")
    (file,) = root.glob("*.safetensors")
    file.rename(root / SINGLE)

    def load(copy: Path) -> Any:
        from diffusers import StableDiffusionPipeline

        return StableDiffusionPipeline.from_single_file(
            str(copy / SINGLE), config=str(base), local_files_only=True, safety_checker=None
        )

    words: Callable[[Path], Sequence[Path | str]] = lambda copy: (  # noqa: E731
        *("--teacher", copy / SINGLE, "--config", base, "--lora", "none", *SOLVER),
    )
    return Bench(root, list(weight_damages(SINGLE)), words, load)


BENCHES: dict[str, tuple[int, Callable[[Path], Bench]]] = {
    "sd": (40, lambda place: pipeline_bench(tiny_pipelines.sd, place)),
    "sdxl": (10, lambda place: pipeline_bench(tiny_pipelines.sdxl, place)),
    "lcm": (8, lambda place: pipeline_bench(tiny_pipelines.lcm, place)),
    "lora": (24, lora_bench),
    "single": (8, single_file_bench),
}
"""How many damages are tried of each kind, and what makes it."""


@pytest.fixture(scope="module")
def bench_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Bench]:
    """The undamaged inputs of a kind, which are right."""
    made: dict[str, Bench] = {}

    def get(name: str) -> Bench:
        if name not in made:
            made[name] = BENCHES[name][1](tmp_path_factory.mktemp(name))
            assert made[name].judge(None, tmp_path_factory.mktemp(name)) == "right"
        return made[name]

    return get


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "number"), [(kind, n) for kind, (count, _) in BENCHES.items() for n in range(count)])
def test_a_damaged_network_draws_as_in_diffusers_or_is_refused(
    kind: str, number: int, bench_of: Callable[[str], Bench], tmp_path: Path
) -> None:
    bench = bench_of(kind)
    damage = some(bench.damages, BENCHES[kind][0])[number]
    try:
        assert bench.judge(damage, tmp_path) in ("right", "refused")
    except BaseException as error:
        error.add_note(f"of {damage.name}")
        raise


# ---- pictures, captions, prompts


def by_pillow(held: bytes) -> np.ndarray:
    """A picture by Pillow alone, uint8 [H, W, 3], transparent parts on white."""
    with Image.open(io.BytesIO(held)) as image:
        seen = ImageOps.exif_transpose(image).convert("RGBA")
    flat = Image.new("RGBA", seen.size, "white")
    flat.alpha_composite(seen)
    return np.asarray(flat.convert("RGB"))


def check_data(damage: DataDamage, found: Captioned, rows: np.ndarray, files: Files) -> None:
    """Pictures are right, the undamaged ones equal, with their captions; what is missing is counted."""
    by = {tuple(captions): row for captions, row in zip(found.captions, rows, strict=True)}
    assert len(by) == len(found)
    for name in "acd":
        if (CAPTIONS[name],) in by:
            np.testing.assert_array_equal(by.pop((CAPTIONS[name],)), pixels(name))
    if len(found) < len(CAPTIONS):
        assert found.left_out, "some are missing, and none is counted"
    if not by:
        return
    ((captions, seen),) = by.items()
    assert captions == damage.captions
    if damage.near:
        wanted = np.asarray(Image.fromarray(pixels("b")).convert("L").convert("RGB")) if damage.grey else pixels("b")
        assert abs(seen.astype(int) - wanted).mean() < 3
    else:
        (held,) = [data for name, data in files.items() if name.startswith("b.") and name != "b.txt"]
        np.testing.assert_array_equal(seen, by_pillow(held))


@pytest.mark.parametrize("where", ["folder", "shard"])
@pytest.mark.parametrize("damage", data_damages(), ids=lambda damage: damage.name)
def test_damaged_pictures_and_captions_are_right_or_refused(damage: DataDamage, where: str, tmp_path: Path) -> None:
    files = damage.change(undamaged())
    try:
        if where == "folder":
            for name, held in files.items():
                file = tmp_path / "pictures" / name
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(held)
            found = from_folder(tmp_path / "pictures", SIDE)
        else:
            with tarfile.open(tmp_path / "a.tar", "w") as tar:
                for name, held in files.items():
                    member = tarfile.TarInfo(name)
                    member.size = len(held)
                    tar.addfile(member, io.BytesIO(held))
            found = from_shards([str(tmp_path / "a.tar")], SIDE, tmp_path / "cache")
        assert found.pictures is not None
        rows = found.pictures.read(range(len(found)))
    except UserError as error:
        refusal = str(error)
    else:
        check_data(damage, found, rows, files)
        return
    assert "\n" not in refusal


@pytest.mark.parametrize(("held", "prompts"), [pytest.param(h, p, id=name) for name, h, p in prompt_damages()])
def test_a_damaged_prompt_file_is_read_as_it_is_meant_or_refused(
    held: bytes, prompts: list[str] | None, tmp_path: Path
) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes(held)
    if prompts:
        assert read_prompts(file) == prompts
        return
    with pytest.raises(UserError, match=r"prompts\.txt"):
        read_prompts(file)


# ---- settings


@pytest.mark.parametrize("where", ["override", "file"])
@pytest.mark.parametrize(("key", "text", "meant"), list(setting_damages()))
def test_a_setting_means_what_is_written_or_is_refused(
    key: str, text: str, meant: Any, where: str, tmp_path: Path
) -> None:
    *sections, last = key.split(".")
    lines = [f"{'  ' * i}{name}:" for i, name in enumerate(sections)] + [f"{'  ' * len(sections)}{last}: {text}"]
    (tmp_path / "law.yaml").write_text("\n".join(lines) + "\n", encoding="utf-8")
    file, overrides = (None, [f"{key}={text}"]) if where == "override" else (tmp_path / "law.yaml", [])
    if meant is WRONG:
        with pytest.raises(UserError) as refusal:
            resolve("tcd", file, overrides)
        assert "\n" not in str(refusal.value)
        return
    found: Any = resolve("tcd", file, overrides)
    for name in key.split("."):
        found = getattr(found, name)
    assert (type(found), found) == (type(meant), meant)


# ---- runs


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str], bytes]:
    """A run that was stopped at step 2 of 4, the command's words for it but its place, and the student it ends with."""
    base = tmp_path_factory.mktemp("run")
    teacher = tiny_pipelines.sd(base / "pipe")
    for name, held in undamaged().items():
        (base / "pictures").mkdir(exist_ok=True)
        (base / "pictures" / name).write_bytes(held)
    settings = [f"data.source={base / 'pictures'}", "device=cpu", "student.rank=2", "student.targets=[to_q,conv1]"]
    settings += ["loop.steps=4", "loop.batch=2", "loop.save_every=2", "loop.validate_every=null", "optim.ema=0.8"]
    words = ["distill", "--recipe", "tcd", "--teacher", str(teacher), *(w for s in settings for w in ("-s", s))]
    assert command(*words, "--out", base / "run")[0] == 0
    whole = (base / "run" / "student" / LORA_FILE).read_bytes()
    for part in ("student", "checkpoints/step-00000004"):
        shutil.rmtree(base / "run" / part)
    return base / "run", words, whole


def run_damages(root: Path) -> list[Damage]:
    """Damage every file of a run folder; of kept latents and text states names, types and shapes are compared alone."""
    found: list[Damage] = []
    for file in sorted(path for path in root.rglob("*") if path.is_file()):
        place = str(file.relative_to(root))
        if file.suffix == ".json":
            found += json_damages(root, place)
        elif file.suffix == ".safetensors":
            kept = place.startswith("cache")
            found += [each for each in weight_damages(place) if not (kept and each.name.endswith(NUMBERS))]
        else:
            found += file_damages(place)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("number", range(RUNS))
def test_a_damaged_run_ends_as_the_undamaged_one_or_is_refused(
    number: int, stopped: tuple[Path, list[str], bytes], tmp_path: Path
) -> None:
    root, words, whole = stopped
    damage = some(run_damages(root), RUNS)[number]
    copy = Path(shutil.copytree(root, tmp_path / "run"))
    damage.apply(copy)
    code, errors = command(*words, "--out", copy)
    try:
        assert code in (0, 2), errors
        if code == 2:
            assert errors.splitlines()[-1].startswith("fewstep: "), errors
        else:
            assert (copy / "student" / LORA_FILE).read_bytes() == whole
    except BaseException as error:
        error.add_note(f"of {damage.name}")
        raise


# ---- the command itself


def test_the_command_exits_with_2_and_one_line(bench_of: Callable[[str], Bench], tmp_path: Path) -> None:
    """In a process of its own: nothing but the line on stderr, and no picture."""
    bench = bench_of("sd")
    damages = {damage.name: damage for damage in bench.damages}
    places = ("unet/config.json: empty", "unet/diffusion_pytorch_model.safetensors: half", "model_index.json: a list")
    started = []
    for i, name in enumerate(places):
        copy = Path(shutil.copytree(bench.root, tmp_path / f"copy-{i}"))
        damages[name].apply(copy)
        out = tmp_path / f"{i}.png"
        words = ["sample", PROMPT, "--teacher", str(copy), "--out", str(out), *SOLVER]
        piped: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append((out, subprocess.Popen([sys.executable, "-m", "fewstep.commands.app", *words], **piped)))
    for out, process in started:
        _, errors = process.communicate(timeout=300)
        assert refused(process.returncode, errors)
        assert not out.exists()
