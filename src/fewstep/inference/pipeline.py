"""A student in a plain diffusers pipeline: its scheduler and its call settings, read back from its own file.

pipe.load_lora_weights("runs/tcd/student")
pipe.scheduler = fewstep.scheduler_for("runs/tcd/student", pipe.scheduler.config)
picture = pipe("an octopus", **fewstep.call_settings("runs/tcd/student")).images[0]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fewstep.backbones.pipeline_writer import read_record
from fewstep.backbones.scheduler_config import noise_difference
from fewstep.common.arguments import checked
from fewstep.common.config import validate
from fewstep.common.errors import UserError
from fewstep.diffusion.config import Sampling
from fewstep.inference.schedulers.base import FewStepScheduler
from fewstep.inference.schedulers.few_step import ConsistencyScheduler, SSSScheduler
from fewstep.students.lora_file import read_lora_record, student_of_run

TIME_APART = 0.01
"""How far a time may lie from the one in a student's file, as networks are told it (0 to 1000): rounding, no more."""


def student_record(student: Path | str) -> dict[str, Any]:
    """What a student says of itself: a LoRA file, the folder that holds it, or a whole pipeline folder.

    Raises:
        UserError: no such file, or one that brings no settings.
    """
    place = student_of_run(Path(student))
    record = read_record(place) if (place / "model_index.json").is_file() else read_lora_record(place)
    if not isinstance(record.get("sampling"), dict):
        raise UserError(
            f"student = {str(student)!r} brings no settings; the nearest that does is one that fewstep wrote"
        )
    return record


def sampling_of_student(student: Path | str) -> Sampling:
    """The settings that a student brings along.

    Raises:
        UserError: as `student_record`.
    """
    return validate(Sampling, student_record(student)["sampling"])


@checked
def scheduler_for(student: Path | str, config: Mapping[str, Any], gamma: float | None = None) -> FewStepScheduler:
    """The scheduler that a student is sampled with, for a pipeline whose scheduler has this config.

    Its times are those of the student's file. A flow's shift is the one that the student was trained with, at every
    size: what a pipeline works out from the picture's size (`mu`) is not asked for.

    Args:
        gamma: stochasticity, where it shall not be the student's own.

    Raises:
        UserError: no settings, or those of a solver, whose scheduler is diffusers' own; a gamma for a sampler that has
            none; or a config of another noise than the student was trained on.
    """
    record = student_record(student)
    sampling = validate(Sampling, record["sampling"])
    embedded = bool((record.get("guidance") or {}).get("embedded"))  # as the pipeline's guidance_scale
    beside = [name for name in sampling.extra_conditioning if name != "w" or not embedded]
    if beside:
        raise UserError(
            f"student = {str(student)!r} is told {', '.join(beside)}; the nearest way into a pipeline is "
            "fewstep.attach(pipe, student)"
        )
    shared: dict[str, Any] = {
        "grid": sampling.grid,
        "spacing": sampling.spacing,
        "end": sampling.end,
        "jump": sampling.step_jump,
    }
    shared |= {"r": sampling.r, "form": sampling.form}
    if record.get("path") == "flow" and "shift" in record:
        shared |= {"shift": float(record["shift"]), "use_dynamic_shifting": False}
    if gamma is not None and sampling.sampler != "sss":
        raise UserError(
            f"gamma = {gamma} says nothing to {sampling.sampler!r}, the sampler of student = {str(student)!r}; the "
            "nearest is to leave it out"
        )
    made: FewStepScheduler
    if sampling.sampler == "sss":
        strength = sampling.gamma if gamma is None else gamma
        made = SSSScheduler.from_config(config, gamma=strength, gamma_law=sampling.gamma_law, **shared)
    elif sampling.sampler == "lcm":
        made = ConsistencyScheduler.from_config(config, **shared)
    else:
        raise UserError(
            f"student = {str(student)!r} is sampled with {sampling.sampler!r}, a solver; the nearest scheduler is "
            "diffusers' own of that name"
        )
    _check_noise(made, record, sampling.steps // sampling.calls_a_step, str(student))
    return made


def _check_noise(scheduler: FewStepScheduler, record: Mapping[str, Any], count: int, student: str) -> None:
    """Refuse a scheduler of another prediction, path, other times or noise levels than a student's file names."""
    for field, own in (("prediction", scheduler.prediction), ("path", scheduler.config["path"])):
        if record.get(field, own) != own:
            raise UserError(
                f"student = {student!r} has {field} = {record[field]!r}, the pipeline's scheduler {own!r}; the nearest "
                "is the scheduler of the student's own base"
            )
    if "times" not in record:
        return
    scheduler.set_timesteps(count)
    times = [float(t) for t in scheduler.timesteps[:: scheduler.order]]
    if len(times) != len(record["times"]) or max(abs(a - b) for a, b in zip(times, record["times"])) > TIME_APART:
        raise UserError(
            f"student = {student!r} has times {_listed(record['times'])}, this scheduler's config makes them "
            f"{_listed(times)}; the nearest is the scheduler of the student's own base"
        )
    if other := noise_difference(record, scheduler.config):
        raise UserError(
            f"student = {student!r} has {other} in the pipeline; the nearest is the scheduler of the student's own base"
        )


def _listed(times: Sequence[float]) -> str:
    return ", ".join(f"{t:g}" for t in times)


@checked
def call_settings(student: Path | str) -> dict[str, Any]:
    """What a pipeline is called with: its number of steps, its guidance scale, 1 for none, and a size that is its own.

    Raises:
        UserError: no settings.
    """
    record = student_record(student)
    sampling = validate(Sampling, record["sampling"])
    scale = (record.get("guidance") or {}).get("scale", 1.0 + sampling.omega)
    sized = {"width": sampling.size[0], "height": sampling.size[1]} if sampling.size else {}
    return {"num_inference_steps": sampling.steps // sampling.calls_a_step, "guidance_scale": float(scale), **sized}
