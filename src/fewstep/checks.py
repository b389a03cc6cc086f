"""What can be refused from settings and the teacher's JSON and headers alone: fast, without torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from fewstep.data.prompts import is_prompt_file, read_prompts
from fewstep.errors import UserError, nearest, nearest_divisor
from fewstep.export.header import base_shapes
from fewstep.folder import PipelineFolder
from fewstep.names import CALLS, DeviceName
from fewstep.settings import DistillConfig, Sampling


def check_distillation(config: DistillConfig, folder: PipelineFolder) -> None:
    """Refuse what could not be trained, or not be watched.

    Raises:
        UserError: no such pictures or watched prompts, a grid off the teacher's schedule, no such layers.
    """
    source = config.data.source
    if source != "emoji8" and not Path(source).is_dir():
        raise UserError(f"data.source = {source!r} is not a folder; give a folder of pictures or 'emoji8'")
    _check_watched(config)
    _check_grid("method.grid", config.method.grid, folder)
    if config.student.kind == "lora" and config.student.targets:
        _check_targets(config.student.targets, folder)


def check_sampling(sampling: Sampling, folder: PipelineFolder) -> None:
    """Refuse settings that the pipeline's schedule has no times for.

    Raises:
        UserError: a grid off the schedule, or more steps than it has indices.
    """
    if sampling.spacing == "grid":
        _check_grid("grid", sampling.grid, folder)
        return
    calls = CALLS[sampling.sampler]
    most = _indices(folder) * calls
    if sampling.steps > most:
        raise UserError(f"steps = {sampling.steps} is out of range; the nearest legal one is {most}")


def check_device(name: str) -> None:
    """Refuse a device that is none, without looking for it.

    Raises:
        UserError: another name than auto, cpu, cuda.
    """
    legal = get_args(DeviceName)
    if name not in legal:
        raise UserError(f"device = {name!r} is not one of {', '.join(legal)}; the nearest is {nearest(name, legal)!r}")


def _indices(folder: PipelineFolder) -> int:
    return int(folder.config("scheduler").get("num_train_timesteps", 1000))


def _check_grid(field: str, grid: int, folder: PipelineFolder) -> None:
    indices = _indices(folder)
    if indices % grid:
        raise UserError(
            f"{field} = {grid} does not divide the teacher's {indices} training indices; "
            f"the nearest legal one is {nearest_divisor(grid, indices)}"
        )


def _check_watched(config: DistillConfig) -> None:
    named = config.watch.prompts
    if not config.loop.watch_every or not named:
        return
    if is_prompt_file(named):
        read_prompts(named, "watch.prompts")
        return
    from fewstep.world import emoji8

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
