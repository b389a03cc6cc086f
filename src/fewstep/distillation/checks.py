"""Checks of a distillation from settings, JSON and file headers alone, before any long work. Light: no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from fewstep.backbones.checks import (
    check_diffusion,
    check_grid,
    check_guidance,
    check_steps,
    check_times,
    index_count,
)
from fewstep.backbones.families import GUIDANCE_KEY, GUIDANCE_WIDTH, adapts
from fewstep.backbones.pipeline_folder import PipelineFolder, read_folder
from fewstep.backbones.pipeline_writer import read_record
from fewstep.backbones.teachers import read_teacher
from fewstep.common.choices import End, ExtraCondition, Jump
from fewstep.common.config import validate
from fewstep.common.defaults import check_world_size
from fewstep.common.errors import UserError, did_you_mean
from fewstep.common.files import read_mapping
from fewstep.common.safetensors_header import read_safetensors_header
from fewstep.data.config import DataConfig
from fewstep.data.sources import CaptionedSource, ImageFolder, Shards, open_captioned, read_named_prompts
from fewstep.diffusion.config import GridSpec, Sampling
from fewstep.distillation.config import DistillConfig, within
from fewstep.distillation.synthesis.record import SynthesizedSet, is_synthesis, open_set
from fewstep.methods.config import ConsistencyConfig
from fewstep.scorers.registry import check_scorer
from fewstep.students.lora_checks import check_lora
from fewstep.students.lora_file import CONDITIONING, student_of_run
from fewstep.students.lora_header import LoraHeader, base_shapes

Source = CaptionedSource | SynthesizedSet


def open_source(config: DataConfig, teacher: PipelineFolder) -> Source:
    """Parse and check `data.source`, for pictures of `data.size` or of the teacher's own size.

    Raises:
        UserError: as `open_captioned`, or as `open_set` for a synthesised set.
    """
    folder = Path(config.source)
    if is_synthesis(folder):
        return open_set(folder)
    return open_captioned(config.source, config.size or teacher.picture_size)


class Inputs(NamedTuple):
    """Checked inputs of a distillation.

    Attributes:
        source: of the data.
        start: the student that it starts from, a LoRA or a whole pipeline; None without one.
    """

    teacher: PipelineFolder
    source: Source
    start: LoraHeader | PipelineFolder | None


def read_inputs(config: DistillConfig) -> Inputs:
    """Read and check the inputs of a distillation.

    Raises:
        UserError: as `read_teacher`, `open_source` and `read_start`.
    """
    teacher = read_teacher(config.teacher)
    return Inputs(teacher, open_source(config.data, teacher), read_start(config, teacher))


def check_distillation(config: DistillConfig, folder: PipelineFolder) -> Inputs:
    """Refuse what cannot be trained or validated; return what the settings name.

    Args:
        folder: the teacher's.

    Raises:
        UserError: no such data or validation prompts, a grid off the teacher's schedule, no such layers.
    """
    check_diffusion(folder)
    stages = config.each_stage()
    if config.data.size:
        folder.check_size("data.size", (config.data.size, config.data.size))
    source = open_source(config.data, folder)
    _check_source(config, source, folder)
    for stage in stages:
        _check_start_of_pairs(config.data.source, source, stage.method)
    embedded = folder.embeds_guidance or (config.student.kind == "full" and folder.network == "unet")
    if config.student.kind == "lora" and config.student.targets:
        _check_targets(config.student.targets, folder)
    start = read_start(config, folder)
    check_followed(stages, start)
    check_beside(config.validation.beside, folder)
    for stage in stages:
        if stage.loop.validate_every:
            if stage.validation.prompts:
                read_named_prompts(stage.validation.prompts)
            check_steps("validation.teacher_steps", stage.validation.teacher_steps, index_count(folder))
        check_grid("method.grid", stage.method.grid, folder)
        check_times("sampling.", stage.sampling, folder)
        check_guidance("sampling.", stage.sampling, embedded)
        _check_loss_networks(stage, folder)
    return Inputs(folder, source, start)


def _check_source(config: DistillConfig, source: Source, folder: PipelineFolder) -> None:
    """Refuse a set of another size, and buckets of pictures that have one size."""
    if isinstance(source, SynthesizedSet) and config.data.size not in (None, folder.picture_size):
        raise UserError(
            f"data.size = {config.data.size} is not that of the set in data.source; use {folder.picture_size}"
        )
    if not config.data.buckets:
        return
    if not isinstance(source, ImageFolder | Shards):
        raise UserError(
            f"data.buckets = True needs pictures of several shapes, data.source = {config.data.source!r} has none; "
            "use False, or a folder of pictures"
        )
    for stage in config.each_stage():
        if stage.method.start != "data":
            raise UserError(f"data.buckets = True needs method.start = 'data', not {stage.method.start!r}; use False")


def _check_start_of_pairs(named: str, source: Source, method: ConsistencyConfig) -> None:
    """Refuse a recipe whose pairs start on what the source does not hold."""
    if isinstance(source, SynthesizedSet):
        drawn = source.manifest.plan.settings
        if method.start == "trajectory" and (drawn.grid, drawn.end) != (method.grid, method.end):
            raise UserError(
                f"data.source = {named!r} holds points of grid = {drawn.grid}, end = {drawn.end!r}, method has grid = "
                f"{method.grid}, end = {method.end!r}; use the set's",
                field="method.grid",
            )
        if method.start == "trajectory" and drawn.kind != "trajectories":
            raise UserError(
                f"data.source = {named!r} holds latents alone, method.start = 'trajectory' needs points; use 'data'",
                field="method.start",
            )
    elif method.point == "stored":
        raise UserError(
            f"method.point = 'stored' needs network outputs, which data.source = {named!r} does not hold; use a folder "
            "of `fewstep synthesize --kind trajectories`"
        )
    elif method.start == "data" and not source.pictures:
        raise UserError(
            f"data.source = {named!r} has prompts alone, method.start = 'data' needs pictures; use 'rollout'",
            field="method.start",
        )
    elif method.start in ("simulation", "noise") and method.adversarial.reads_data and not source.pictures:
        raise UserError(
            f"data.source = {named!r} has prompts alone, method.adversarial.real = 'data' needs pictures; use weight 0",
            field="method.adversarial.weight",
        )


def _check_loss_networks(config: DistillConfig, folder: PipelineFolder) -> None:
    """Refuse a distance between latents or a reward whose files or packages are missing."""
    if config.method.distance == "latent_lpips" and config.latent_lpips.folder:
        read_mapping(Path(config.latent_lpips.folder) / "perceptual.json")
    held_out = config.validation.scorer if config.loop.validate_every else ""
    trained = config.method.reward.scorer if config.method.reward.weight else ""
    for field, named in (("method.reward.scorer", trained), ("validation.scorer", held_out)):
        name, _, place = named.partition(":")
        if named == "world":
            check_world_size(folder.picture_size, f"{field} = 'world'", "name a scorer, NAME:FOLDER")
        elif named:
            check_scorer(name, Path(place))


def _check_targets(targets: Sequence[str], folder: PipelineFolder) -> None:
    layers = [
        name.removesuffix(".weight")
        for name, shape in base_shapes(folder).items()
        if name.endswith(".weight") and len(shape) >= 2
    ]
    for target in targets:
        if not any(layer == target or layer.endswith(f".{target}") for layer in layers):
            ends = sorted({layer.rpartition(".")[2] for layer in layers} - {"0", "1", "2"})
            raise UserError(
                f"student.targets: no layer of the teacher's network ends with {target!r}{did_you_mean(target, ends)}",
                field="student.targets",
            )


def read_start(run: DistillConfig, folder: PipelineFolder) -> LoraHeader | PipelineFolder | None:
    """Read the headers of the student that a run starts from, if any; refuse one that it cannot start from.

    A student of another base of the same shapes is a legal start: it is trained on.

    Args:
        folder: the teacher's.

    Raises:
        UserError: no student, of another architecture, of another rank, with other extra conditioning, or with layers
            that are not trained.
    """
    config = run.student
    if not config.start:
        return None
    conditioning = run.each_stage()[0].method.extra_conditioning
    if config.kind == "full":
        return _check_full_start(str(student_of_run(Path(config.start))), folder, conditioning)
    header = check_lora(config.start, folder, same_base=False)
    own = header.sampling.extra_conditioning if header.sampling else ()
    if set(own) - set(conditioning):
        raise UserError(
            f"method.extra_conditioning = {list(conditioning)} differs from that of student.start = {config.start!r}; "
            f"use {sorted(own)}"
        )
    trained = config.targets or folder.family.targets
    for module, layer in header.layers.items():
        if layer.a[0] != config.rank:
            raise UserError(
                f"student.rank = {config.rank} differs from that of student.start = {config.start!r}; use {layer.a[0]}"
            )
        if not any(adapts(target, module) for target in trained):
            raise UserError(
                f"student.targets leaves out {module}, which student.start = {config.start!r} adapts; use the targets "
                "that it was trained with",
                field="student.targets",
            )
    return header


def check_beside(named: str, folder: PipelineFolder) -> None:
    """Refuse a student that a trained adapter cannot be drawn beside; an empty name means none.

    Args:
        folder: the teacher's.

    Raises:
        UserError: as `check_lora`; or a student with inputs of its own.
    """
    header = check_lora(named, folder) if named else None
    if header and header.sampling and header.sampling.extra_conditioning:
        extra = ", ".join(header.sampling.extra_conditioning)
        raise UserError(f"validation.beside = {named!r} has inputs of its own ({extra}); name a student without")


class Learned(NamedTuple):
    """What a student has learned: its jump, the grid of its times, its end point and extra inputs."""

    jump: Jump
    grid: GridSpec
    end: End
    extra_conditioning: Sequence[ExtraCondition]


def learned_by(start: LoraHeader | PipelineFolder) -> Learned | None:
    """Return what a student has learned, by its record; None for one without a record."""
    if isinstance(start, LoraHeader):
        sampling = start.sampling
    else:
        held = read_record(start.path).get("sampling")
        sampling = validate(Sampling, held) if isinstance(held, dict) else None
    if sampling is None:
        return None
    grid: GridSpec = 8 if sampling.spacing == "tlcm" else sampling.grid
    return Learned(sampling.step_jump, grid, sampling.end, sampling.extra_conditioning)


def check_followed(stages: Sequence[DistillConfig], start: LoraHeader | PipelineFolder | None) -> None:
    """Refuse to follow a student by jumps that it has not learned.

    Args:
        stages: whole configs; each starts from the student of the one before.
        start: the student that the first one starts from.

    Raises:
        UserError: there is none, or its jumps, times, end point or inputs are others.
    """
    before = learned_by(start) if start else None
    for number, stage in enumerate(stages):
        method, follow = stage.method, "method.follow = 'start'"
        if method.follow == "start":
            if start is None and number == 0:
                raise UserError(f"{follow} needs a finished student; name it as student.start", field="student.start")
            if before is not None:
                if before.jump != "first_order":
                    raise UserError(f"{follow} needs a student that lands at t_n, and its jump is {before.jump!r}")
                if before.extra_conditioning:
                    raise UserError(f"{follow} has no inputs for a student with {', '.join(before.extra_conditioning)}")
                if not within(method.grid, before.grid, nested=True):
                    raise UserError(
                        f"method.grid = {method.grid} has times that the student has not learned; use {before.grid}"
                    )
                if method.end != before.end:
                    raise UserError(f"method.end = {method.end!r} is not the student's end point; use {before.end!r}")
        before = Learned(method.jump, method.grid, method.end, method.extra_conditioning)


def _check_full_start(start: str, folder: PipelineFolder, conditioning: Sequence[str]) -> PipelineFolder:
    other = read_folder(start, "student.start")
    own, found = base_shapes(folder), base_shapes(other)
    inside = "w" in conditioning and folder.network == "unet"  # then the UNet gets a guidance embedding, if it has none
    if inside:
        width = own.get("time_embedding.linear_1.weight", (0, 0))[1]
        found.setdefault(GUIDANCE_KEY, own.setdefault(GUIDANCE_KEY, (width, GUIDANCE_WIDTH)))
    if own != found:
        wrong = sorted(name for name in own.keys() | found.keys() if own.get(name) != found.get(name))[0]
        lacks_w = wrong == GUIDANCE_KEY and not inside
        remedy = "method.extra_conditioning = ['w']" if lacks_w else "a student of this teacher"
        raise UserError(
            f"student.start = {start!r} has another network than the teacher: {wrong} is {found.get(wrong)}, not "
            f"{own.get(wrong)}; use {remedy}"
        )
    file = other.path / CONDITIONING
    keys = read_safetensors_header(file)[1] if file.is_file() else ()
    embedded = {key.split(".")[2] for key in keys if key.count(".") > 2}
    own_embedded = [name for name in conditioning if name != "w" or not inside]
    if embedded - set(own_embedded):
        raise UserError(
            f"method.extra_conditioning embeds {own_embedded}, student.start = {start!r} embeds {sorted(embedded)} by "
            f"its {CONDITIONING}; use {sorted(embedded)}",
            field="method.extra_conditioning",
        )
    return other
