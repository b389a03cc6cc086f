"""The verbs as functions, for scripts and notebooks; the command is a thin layer over them."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fewstep.distillation.checks import WATCHING, check_installed
from fewstep.common.arguments import checked
from fewstep.common.config import validate
from fewstep.common.errors import UserError

if TYPE_CHECKING:
    from fewstep.distillation.estimate import Estimated
    from fewstep.evaluation.metric import Figure
    from fewstep.distillation.config import DistillConfig


@checked
def distill(
    recipe: str = "tcd",
    *,
    out: Path | str,
    teacher: Path | str = "",
    config: Path | str | None = None,
    overrides: str | Sequence[str] = (),
    teacher_config: Path | str = "",
) -> Path:
    """Distil a teacher into a few-step student and return its file.

    Args:
        recipe: a bundled recipe or a YAML file.
        out: run folder; a run that was stopped is resumed from it.
        teacher: pipeline folder, single-file checkpoint or hub id; empty for the one that recipe, config or overrides
            name, else the bundled one.
        config: YAML file laid over the recipe.
        overrides: `a.b=value` laid over both.
        teacher_config: for a single file, a pipeline folder of its kind, for its configs.

    Raises:
        UserError: anything wrong, in one line, before any long work.
    """
    settings = _distill_config(recipe, out, named_teacher(teacher, teacher_config), config, overrides)
    from fewstep.distillation import distill as distillation

    return distillation.distill(settings, Path(out))


@checked
def estimate(
    recipe: str = "tcd",
    *,
    out: Path | str,
    teacher: Path | str = "",
    config: Path | str | None = None,
    overrides: str | Sequence[str] = (),
    teacher_config: Path | str = "",
) -> list[Estimated]:
    """What `distill` with the same arguments will take in time and memory, stage by stage; nothing is written.

    Raises:
        UserError: what `distill` would refuse.
    """
    settings = _distill_config(recipe, out, named_teacher(teacher, teacher_config), config, overrides)
    from fewstep.distillation import distill as distillation

    return distillation.estimate_run(settings)


def named_teacher(teacher: Path | str, config: Path | str = "") -> str:
    """What settings name a teacher by: its folder, made first where it is a single file; empty for the bundled one.

    Raises:
        UserError: as `teachers.teacher_folder`; a config without a teacher.
    """
    from fewstep.backbones.teachers import teacher_folder

    if config and not teacher:
        raise UserError(f"config = {str(config)!r} goes with a single-file teacher; name one, or leave it out")
    return str(teacher_folder(teacher, config)) if teacher else ""


def _distill_config(
    recipe: str, out: Path | str, teacher: Path | str, config: Path | str | None, overrides: str | Sequence[str]
) -> DistillConfig:
    """The settings of a distillation, refused here if it could not run."""
    from fewstep.distillation.checks import check_distillation
    from fewstep.common.files import check_writable
    from fewstep.backbones.pipeline_folder import read_folder
    from fewstep.distillation.config import resolve, teacher_path
    from fewstep.training.run_folder import check_same_run

    settings = resolve(recipe, config, overrides, teacher)
    check_distillation(settings, read_folder(teacher_path(settings.teacher)))
    check_writable(Path(out))
    check_same_run(Path(out), settings, later=True)
    if any(stage.loop.watch_every for stage in settings.each_stage()):
        check_installed("distill with loop.watch_every", WATCHING)
    narrow: list[str] = [
        stage.student.base for stage in settings.each_stage() if stage.student.base in ("8bit", "4bit")
    ]
    narrow += [stage.optim.kind for stage in settings.each_stage() if stage.optim.kind == "adamw_8bit"]
    if narrow:
        check_installed(f"distill with {narrow[0]}", ["bitsandbytes"], "quantize")
    return settings


@checked
def sample(
    prompts: str | Sequence[str],
    *,
    out: Path | str,
    prompt_file: Path | str | None = None,
    lora: Path | str | None = "auto",
    teacher: Path | str = "",
    seed: int = 0,
    count: int = 1,
    scale: int | None = None,
    device: str = "auto",
    settings: Mapping[str, Any] | None = None,
    adapter: Path | str | None = None,
    teacher_config: Path | str = "",
    image: Path | str | None = None,
    strength: float | None = None,
    precision: str = "fp32",
    compile: bool = False,
    batch: int | None = None,
) -> Path:
    """Draw `count` pictures a prompt into one file: a picture, or a sheet with a row a prompt.

    Args:
        prompts: what to draw, one prompt or several.
        out: picture file to write, .png or .webp.
        prompt_file: further prompts, one a line.
        lora: `tcd` for the bundled student, a LoRA file or folder, None for the teacher itself; `auto` is
            `tcd` for the bundled teacher and None for another.
        teacher: pipeline folder, single-file checkpoint or hub id; empty for the bundled one.
        seed: of the first picture; the others count up.
        count: pictures a prompt.
        scale: whole factor by which pictures are enlarged; None for the one that makes them 256 pixels wide, 1 for
            larger ones.
        device: auto, cpu or cuda.
        settings: changes to the sampling settings that the student brings along (None values are ignored).
        adapter: folder that `train_adapter` wrote: prompts may then be of any of its languages.
        teacher_config: for a single-file teacher, a pipeline folder of its kind.
        image: picture to begin from, cropped and scaled to what is drawn.
        strength: share of the noisiest time that it is noised to, in (0, 1]; None for .5. All steps are made below it.
        precision: fp32, bf16, fp16 or auto; what the denoiser is kept and computes in.
        compile: compile the denoiser; worth its minutes where many pictures are drawn.
        batch: pictures drawn at once; None for 16 of 512 x 512 pixels, as many more or fewer of others, at most 64.

    Raises:
        UserError: no prompt, a setting out of range, a LoRA or adapter of another base, an unwritable place, a
            picture that cannot be read, a strength below which the grid has fewer times than steps.
    """
    from fewstep.data.images import read_cropped
    from fewstep.data.prompts import read_prompts
    from fewstep.common.files import check_writable
    from fewstep.backbones.pipeline_folder import read_folder
    from fewstep.common.choices import check_device
    from fewstep.distillation.config import teacher_path
    from fewstep.students.resolve import choose_student

    named = [prompts] if isinstance(prompts, str) else prompts
    wanted = [*named, *(read_prompts(prompt_file, "prompt_file") if prompt_file else [])]
    if not wanted or any(not prompt.strip() for prompt in wanted):
        raise UserError('prompts is empty; give at least one, e.g. "a doggy, fluent 3d style"')
    path = Path(out)
    if path.suffix.lower() not in (".png", ".webp"):
        raise UserError(f"out = {str(path)!r} must end in .png or .webp; the nearest is {path.stem + '.png'!r}")
    if path.is_dir():
        raise UserError(f"out = {str(path)!r} is a folder; the nearest file is {str(path / 'sample.png')!r}")
    for name, value in (("count", count), ("scale", scale), ("batch", batch)):
        if value is not None and value < 1:
            raise UserError(f"{name} = {value} must be at least 1; the nearest legal one is 1")
    _check_seed(seed, count * len(wanted))
    if strength is not None and image is None:
        raise UserError(f"strength = {strength} says nothing without an image; name one, or leave it out")
    check_device(device)
    folder = read_folder(teacher_path(named_teacher(teacher, teacher_config)))
    student, sampling, _ = choose_student(folder, lora, settings or {})
    width, height = sampling.size or (folder.picture_size, folder.picture_size)
    begun = None if image is None else read_cropped(Path(image), width, height)
    if adapter is not None:
        from fewstep.inference.multilingual.record import read_adapter

        read_adapter(adapter, folder)
    check_writable(path.parent)
    from fewstep.common.device import pick_device, pick_drawing

    place = pick_device(device)
    computes = pick_drawing(precision, place)
    import numpy as np

    from fewstep.backbones.lengths import tell_cut
    from fewstep.inference.generator import load_artist, save_picture, sheet
    from fewstep.diffusion.draw_latents import Source, call_times
    from fewstep.backbones.scheduler_config import path_of

    share = 0.5 if strength is None else strength
    if begun is not None:  # refused before weights are loaded
        call_times(sampling, path_of(folder.noise), share)
    artist = load_artist(folder.path, student, place, adapter, computes, compiled=compile, batch=batch)
    if artist.adapter is not None:
        for prompt, (caption, likeness) in zip(wanted, artist.adapter.readings(wanted), strict=True):
            print(f"{prompt!r} is read as {caption!r}, likeness {likeness:.2f}", file=sys.stderr)
    else:
        tell_cut(artist.backbone, wanted)
    source = None if begun is None else Source(artist.backbone.to_latents(begun[None]), share)
    every = [prompt for prompt in wanted for _ in range(count)]
    pictures: np.ndarray = artist.draw(every, range(seed, seed + len(every)), sampling, source)
    enlarged = scale or max(1, 256 // pictures.shape[2])
    return save_picture(sheet(pictures, count if len(wanted) > 1 else min(count, 8), enlarged), path)


@checked
def evaluate(
    *,
    prompt_file: Path | str,
    out: Path | str,
    lora: Path | str | None = "auto",
    teacher: Path | str = "",
    real: Path | str | None = None,
    reference: Path | str | None = None,
    reference_omega: float | None = None,
    seed: int = 0,
    device: str = "auto",
    settings: Mapping[str, Any] | None = None,
    teacher_config: Path | str = "",
    precision: str = "fp32",
    compile: bool = False,
    batch: int | None = None,
) -> Mapping[str, Figure]:
    """Draw one picture a prompt and measure them; returns the figures by name and writes figures.json.

    The processes of a launch share the drawing out; the main one measures and writes, the others return nothing.

    Args:
        prompt_file: one prompt a line; FD needs at least 500.
        out: folder for figures.json.
        lora: a bundled student, a LoRA file or folder, None for the pipeline itself, or `auto` as in `sample`.
        teacher: pipeline folder, single-file checkpoint or hub id; empty for the bundled one.
        real: folder of real pictures; None for Emoji-8's training split.
        reference: pipeline folder whose 50-step pictures from the same noise are compared with; None for the
            teacher that a LoRA stands on.
        reference_omega: its guidance; None for the mean that the student was trained with, or what it brings along.
        seed: seed of the first picture, and of the bootstrap.
        device: auto, cpu or cuda.
        settings: changes to the sampling settings.
        teacher_config: for a single-file teacher, a pipeline folder of its kind.
        precision: fp32, bf16, fp16 or auto; what the denoisers, the reference's too, are kept and compute in.
        compile: compile them.
        batch: pictures drawn at once; None as in `sample`.

    Raises:
        UserError: anything wrong, in one line, before any long work.
    """
    from fewstep.distillation.checks import check_real, check_sampling
    from fewstep.data.prompts import read_prompts
    from fewstep.evaluation.limits import KID_FEWEST
    from fewstep.backbones.pipeline_writer import end_point_sampling
    from fewstep.common.files import check_writable
    from fewstep.backbones.pipeline_folder import read_folder
    from fewstep.common.choices import check_device
    from fewstep.distillation.config import Sampling, teacher_path
    from fewstep.students.resolve import choose_student
    from fewstep_worlds.emoji8 import dataset as emoji8

    check_device(device)
    if batch is not None and batch < 1:
        raise UserError(f"batch = {batch} must be at least 1; the nearest legal one is 1")
    prompts = read_prompts(prompt_file, "prompt_file")
    if len(prompts) < KID_FEWEST:
        raise UserError(f"prompt_file holds {len(prompts)} prompts; KID needs at least {KID_FEWEST} pictures")
    if real is not None:
        check_real(Path(real))
    _check_seed(seed, 8 * len(prompts))
    folder = read_folder(teacher_path(named_teacher(teacher, teacher_config)))
    chosen = choose_student(folder, lora, settings or {})
    other = Path(reference) if reference else (folder.path if chosen.lora else None)
    base = read_folder(other, "reference") if other else folder
    asked = chosen.sampling.size
    if asked and asked[0] != asked[1]:
        raise UserError(f"size = {list(asked)} is no square, as measured pictures are; the nearest is {[asked[0]] * 2}")
    size, seen = asked[0] if asked else folder.picture_size, asked[0] if asked else base.picture_size
    if seen != size:
        raise UserError(
            f"reference = {str(other)!r} draws {seen} pixels a side, not {size}; the nearest is the student's teacher"
        )
    if real is None:
        emoji8.check_size(size, "real left out")
    own = end_point_sampling(base.path)
    omega = reference_omega if reference_omega is not None else chosen.omega_seen
    drawn = validate(Sampling, own.model_dump() | {"size": asked} | ({} if omega is None else {"omega": omega}))
    check_sampling(drawn, base)
    check_writable(Path(out))
    check_installed("evaluate")
    from fewstep.common.device import pick_device, pick_drawing

    place = pick_device(device)
    computes = pick_drawing(precision, place)
    from fewstep.evaluation import run as measuring
    from fewstep.common.accelerator import make_accelerator

    return measuring.evaluate_folder(
        folder.path,
        prompts,
        lora=chosen.lora,
        real=Path(real) if real else None,
        sampling=chosen.sampling,
        reference=other,
        reference_sampling=drawn,
        seed=seed,
        device=make_accelerator("fp32", place).device,
        precision=computes,
        compiled=compile,
        batch=batch,
        out=Path(out),
    )


@checked
def playground(
    recipes: str | Sequence[str] = ("lcm", "tcd", "ctm", "pcm"),
    *,
    out: Path | str = "runs/playground",
    overrides: str | Sequence[str] = (),
) -> Path:
    """Train recipes in the plane beside an exact teacher, and draw what they learn; returns the figure's path.

    Args:
        recipes: names of recipes; one row of the figure each.
        out: folder for figure.webp, table.md, figures.json and the runs; a run that was stopped goes on.
        overrides: dotted changes to the playground's settings, e.g. "path=flow".

    Raises:
        UserError: an unknown recipe or key, or an illegal value, before any long work.
    """
    from fewstep.common.files import check_writable
    from fewstep_worlds.plane.settings import resolve_play

    named = recipes.split(",") if isinstance(recipes, str) else list(recipes)
    configs = [resolve_play(name.strip(), overrides) for name in named]
    check_writable(Path(out))
    check_installed("playground", ("matplotlib",))
    from fewstep_worlds.plane.play import play

    return play(configs, Path(out))


def _check_seed(seed: int, count: int) -> None:
    if not 0 <= seed <= 2**63 - 1 - count:
        legal = 0 if seed < 0 else 2**63 - 1 - count
        raise UserError(f"seed = {seed} is out of range; the nearest legal one is {legal}")
