"""What can be refused of a verb from settings, JSON and headers alone: fast, without torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fewstep.backbones.checks import _check_grid, _check_guidance, _check_steps, _check_times, _indices, check_diffusion
from fewstep.backbones.families import GUIDANCE_KEY, GUIDANCE_WIDTH
from fewstep.backbones.pipeline_folder import PipelineFolder, read_folder
from fewstep.common.defaults import check_world_size, world
from fewstep.common.errors import UserError, nearest
from fewstep.common.extras import WATCHING, check_installed
from fewstep.common.files import read_mapping
from fewstep.common.safetensors_header import read_safetensors_header
from fewstep.data.folder_files import check_pictures
from fewstep.data.prompts import is_prompt_file, is_shards, read_prompts
from fewstep.distillation.config import DistillConfig
from fewstep.distillation.synthesis.record import is_synthesis, read_manifest
from fewstep.inference.multilingual.settings import PACKAGES
from fewstep.methods.rewards.registry import check_scorer
from fewstep.students.lora_header import CONDITIONING, base_shapes, check_lora, of_run
from fewstep.training.config import StudentConfig


def check_distillation(config: DistillConfig, folder: PipelineFolder) -> None:
    """Refuse what could not be trained, or not be watched.

    Raises:
        UserError: no such pictures or watched prompts, a grid off the teacher's schedule, no such layers.
    """
    check_diffusion("teacher", folder)
    _check_shapes(config, folder)
    _check_source(config, folder)
    embedded = folder.embeds_guidance or (config.student.kind == "full" and folder.network == "unet")
    if config.student.kind == "lora" and config.student.targets:
        _check_targets(config.student.targets, folder)
    if config.student.start:
        check_start(config.student, folder, folder.family.targets, config.each_stage()[0].method.extra_conditioning)
    for stage in config.each_stage():
        if stage.loop.validate_every:
            _check_watched(stage.validation.prompts)
            _check_steps("validation.teacher_steps", stage.validation.teacher_steps, _indices(folder))
        _check_grid("method.grid", stage.method.grid, folder)
        _check_times("sampling.", stage.sampling, folder)
        _check_guidance("sampling.", stage.sampling, embedded)
        _check_looks(stage, folder)


def _check_shapes(config: DistillConfig, folder: PipelineFolder) -> None:
    """The sizes of pictures must be such as latents and network can have."""
    if config.data.size:
        folder.check_size("data.size", (config.data.size, config.data.size))
        if is_synthesis(config.data.source) and config.data.size != folder.picture_size:
            raise UserError(
                f"data.size = {config.data.size} is not that of the set in data.source; the nearest legal one is "
                f"{folder.picture_size}"
            )
    if not config.data.buckets:
        return
    source = config.data.source
    if source in ("emoji8", "captions") or is_prompt_file(source) or is_synthesis(source):
        raise UserError(
            f"data.buckets = True wants pictures of several shapes, data.source = {source!r} has none; the nearest is "
            "False, or a folder of pictures"
        )
    for stage in config.each_stage():
        if stage.method.start != "data":
            raise UserError(
                f"data.buckets = True goes with method.start = 'data', not {stage.method.start!r}; the nearest is False"
            )


def _check_looks(config: DistillConfig, folder: PipelineFolder) -> None:
    """The frozen networks that a stage looks through must be there."""
    if config.method.distance == "latent_lpips":
        if config.latent_lpips.folder:
            read_mapping(Path(config.latent_lpips.folder) / "perceptual.json")
        else:
            check_installed("method.distance = 'latent_lpips'", WATCHING)
    reward = config.method.reward
    if not reward.weight:
        return
    if reward.scorer == "world":
        check_world_size(folder.picture_size, "method.reward.scorer = 'world'", "name a scorer, NAME:FOLDER")
        check_installed("method.reward.scorer = 'world'", PACKAGES, "multilingual")
        return
    name, _, place = reward.scorer.partition(":")
    check_scorer(name, Path(place))


def _check_source(config: DistillConfig, folder: PipelineFolder) -> None:
    source = config.data.source
    exclusive = source == "captions" or is_prompt_file(source)
    if not is_synthesis(source) and any(stage.method.point == "stored" for stage in config.each_stage()):
        raise UserError(
            f"method.point = 'stored' asks for predictions that data.source = {source!r} does not hold; "
            "the nearest legal one is a folder that `fewstep synthesize --kind trajectories` wrote"
        )
    if exclusive:
        if source != "captions":
            read_prompts(source, "data.source")
        else:
            check_world_size(config.data.size or folder.picture_size, "data.source = 'captions'", "give a prompt file")
        for stage in config.each_stage():
            if stage.method.start == "data":
                raise UserError(
                    f"data.source = {source!r} has prompts alone, method.start = 'data' noises pictures; "
                    "the nearest legal start is 'rollout'"
                )
        return
    if is_synthesis(source):
        drawn = read_manifest(Path(source)).plan.settings
        for stage in config.each_stage():
            if stage.method.start == "trajectory" and (drawn.grid, drawn.end) != (stage.method.grid, stage.method.end):
                raise UserError(
                    f"data.source = {source!r} holds points of grid = {drawn.grid}, end = {drawn.end!r}, not of "
                    f"method.grid = {stage.method.grid}, end = {stage.method.end!r}; the nearest legal are the set's"
                )
            if stage.method.start == "trajectory" and drawn.kind != "trajectories":
                raise UserError(
                    f"data.source = {source!r} holds latents alone, method.start = 'trajectory' asks for points; "
                    "the nearest legal start is 'data'"
                )
    elif source == "emoji8":
        check_world_size(config.data.size or folder.picture_size, "data.source = 'emoji8'")
    elif is_shards(source):
        from fewstep.data.shards import find_shards

        find_shards(source)
    else:
        check_pictures(source)


def _check_watched(named: str) -> None:
    if not named:
        return
    if is_prompt_file(named):
        read_prompts(named, "validation.prompts")
        return
    world("validation.prompts").read_prompts(named)


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
                f"student.targets = {target!r} ends the name of no layer of the teacher's UNet; "
                f"the nearest is {nearest(target, ends)!r}"
            )


def check_start(config: StudentConfig, folder: PipelineFolder, targets: Sequence[str], told: Sequence[str]) -> None:
    """Refuse a student that a run could not start from, from its files' headers alone.

    Args:
        targets: layers that the backbone adapts where the config names none.
        told: what the run's network is told.

    Raises:
        UserError: no student, of another base or architecture, of another rank, told something else, or with layers
            that are not trained.
    """
    if not config.start:
        return
    if config.kind == "full":
        _check_full_start(str(of_run(Path(config.start))), folder, told)
        return
    header = check_lora(config.start, folder)
    heard = header.sampling.extra_conditioning if header.sampling else ()
    if set(heard) - set(told):
        raise UserError(
            f"student.start = {config.start!r} is told {sorted(heard)}, method.extra_conditioning = {list(told)}; "
            f"the nearest legal method.extra_conditioning is {sorted(heard)}"
        )
    trained = config.targets or tuple(targets)
    for module, layer in header.layers.items():
        if layer.a[0] != config.rank:
            raise UserError(
                f"student.start = {config.start!r} has rank {layer.a[0]}, student.rank = {config.rank}; "
                f"the nearest legal rank is {layer.a[0]}"
            )
        if not any(module == target or module.endswith(f".{target}") for target in trained):
            raise UserError(
                f"student.start = {config.start!r} adapts {module}, which student.targets leaves out; "
                "the nearest legal targets are those it was trained with"
            )


def _check_full_start(start: str, folder: PipelineFolder, told: Sequence[str]) -> None:
    other = read_folder(start, "student.start")
    own, found = base_shapes(folder), base_shapes(other)
    inside = "w" in told and folder.network == "unet"  # then the UNet gets a guidance embedding, if it has none
    if inside:
        width = own.get("time_embedding.linear_1.weight", (0, 0))[1]
        found.setdefault(GUIDANCE_KEY, own.setdefault(GUIDANCE_KEY, (width, GUIDANCE_WIDTH)))
    if own != found:
        wrong = sorted(name for name in own.keys() | found.keys() if own.get(name) != found.get(name))[0]
        nearest = (
            "method.extra_conditioning = ['w']" if wrong == GUIDANCE_KEY and not inside else "a student of this teacher"
        )
        raise UserError(
            f"student.start = {start!r} is no network of the teacher's kind: {wrong} is {found.get(wrong)}, "
            f"not {own.get(wrong)}; the nearest is {nearest}"
        )
    file = other.path / CONDITIONING
    keys = read_safetensors_header(file)[1] if file.is_file() else ()
    heard = {key.split(".")[2] for key in keys if key.count(".") > 2}
    beside = [name for name in told if name != "w" or not inside]
    if heard - set(beside):
        raise UserError(
            f"student.start = {start!r} embeds {sorted(heard)} by weights of its {CONDITIONING}, this run {beside}; "
            f"the nearest legal method.extra_conditioning is {sorted(heard)}"
        )
