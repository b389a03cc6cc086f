"""Students in plain diffusers pipelines: scheduler and call settings, read from the student's file.

pipe.load_lora_weights("runs/tcd/student")
pipe.scheduler = fewstep.scheduler_for("runs/tcd/student", pipe.scheduler.config)
picture = pipe("an octopus", **fewstep.call_settings("runs/tcd/student")).images[0]
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fewstep.backbones.families import FAMILIES
from fewstep.backbones.pipeline_folder import index_file
from fewstep.backbones.pipeline_writer import read_record
from fewstep.backbones.scheduler_config import noise_difference
from fewstep.common.arguments import checked
from fewstep.common.config import validate
from fewstep.common.errors import UserError
from fewstep.diffusion.config import Sampling
from fewstep.inference.schedulers.base import FewStepScheduler
from fewstep.inference.schedulers.few_step import ConsistencyScheduler, SSSScheduler
from fewstep.students.inference_settings import beside_flow_map
from fewstep.students.lora_file import read_lora_record, student_of_run

TIME_TOLERANCE = 0.01
"""Largest difference of a time to the one in a student's file, on the network's scale (0 to 1000): rounding."""


def read_student(student: Path | str) -> tuple[dict[str, Any], Sampling]:
    """Return the record and sampling settings of a student: a LoRA file, its folder, or a whole pipeline folder.

    Raises:
        UserError: no such file, or one without settings.
    """
    place = student_of_run(Path(student))
    record = read_record(place) if index_file(place).is_file() else read_lora_record(place)
    if not isinstance(record.get("sampling"), dict):
        raise UserError(f"student = {str(student)!r} has no settings in its metadata; use a student that fewstep wrote")
    return record, validate(Sampling, record["sampling"])


@checked
def scheduler_for(student: Path | str, config: Mapping[str, Any], gamma: float | None = None) -> FewStepScheduler:
    """Return the scheduler of a student, with the student's times, for a pipeline's scheduler config.

    A flow's shift is the one of training at every size; the pipeline's size-dependent shift (`mu`) is not used.

    Args:
        config: of the pipeline's own scheduler.
        gamma: stochasticity; the student's own by default.

    Raises:
        UserError: no settings, or those of a solver, whose scheduler is diffusers' own; a gamma for a sampler without
            one; or a config of another noise than the student was trained on.
    """
    record, sampling = read_student(student)
    embedded = bool((record.get("guidance") or {}).get("embedded"))  # as the pipeline's guidance_scale
    extra = [name for name in sampling.extra_conditioning if name != "w" or not embedded]
    if extra:
        raise UserError(
            f"student = {str(student)!r} is conditioned on {', '.join(extra)}; call fewstep.attach(pipe, student)"
        )
    return make_scheduler(record, sampling, config, gamma, str(student))


@checked
def flow_map_scheduler_for(student: Path | str) -> Any:
    """Return diffusers' FlowMapEulerDiscreteScheduler for a flow student that is conditioned on its landing s.

    Set it after `fewstep.attach(pipe, student)`, which gives the network the scheduler's next sigma as s. Its times are
    the student's where the number of steps divides the training grid.

    Raises:
        UserError: a student of another path, without s, or that is sampled otherwise than by deterministic first-order
            jumps down to clean data.
    """
    from diffusers import FlowMapEulerDiscreteScheduler

    record, _ = read_student(student)
    if beside := beside_flow_map(record):
        name, value = beside
        raise UserError(
            f"student = {str(student)!r} has {name} = {value!r}, which a flow map's Euler scheduler cannot sample; use "
            "the scheduler that fewstep.attach sets"
        )
    return FlowMapEulerDiscreteScheduler(shift=float(record.get("shift", 1.0)))


def make_scheduler(
    record: Mapping[str, Any],
    sampling: Sampling,
    config: Mapping[str, Any],
    gamma: float | None,
    student: str,
    sss: type[SSSScheduler] = SSSScheduler,
) -> FewStepScheduler:
    """Return the scheduler of a student's record, see `scheduler_for`.

    Args:
        student: its name in messages.
        sss: class of a scheduler with gamma.
    """
    shared: dict[str, Any] = {
        "grid": sampling.grid,
        "spacing": sampling.spacing,
        "end": sampling.end,
        "jump": sampling.step_jump,
        "r": sampling.r,
        "form": sampling.form,
    }
    if record.get("path") == "flow" and "shift" in record:
        shared |= {"shift": float(record["shift"]), "use_dynamic_shifting": False}
    if gamma is not None and sampling.sampler != "sss":
        raise UserError(
            f"gamma = {gamma} has no effect with sampler = {sampling.sampler!r} of student = {student!r}; remove it"
        )
    made: FewStepScheduler
    if sampling.sampler == "sss":
        strength = sampling.gamma if gamma is None else gamma
        made = sss.from_config(config, gamma=strength, gamma_law=sampling.gamma_law, **shared)
    elif sampling.sampler == "lcm":
        made = ConsistencyScheduler.from_config(config, **shared)
    else:
        raise UserError(
            f"student = {student!r} is sampled with {sampling.sampler!r}, a solver; use diffusers' scheduler of it"
        )
    for difference in _differences(made, record, sampling.steps // sampling.calls_a_step):
        raise UserError(f"student = {student!r} has {difference}; use the scheduler of the student's own base")
    return made


def _differences(scheduler: FewStepScheduler, record: Mapping[str, Any], count: int) -> Iterator[str]:
    """Yield how prediction, path, times and noise levels differ from those in a student's file, with both values."""
    for field, value in (("prediction", scheduler.prediction), ("path", scheduler.config["path"])):
        if record.get(field, value) != value:
            yield f"{field} = {record[field]!r}, the pipeline's scheduler {value!r}"
    if "times" in record:
        scheduler.set_timesteps(count)
        times, own = [float(t) for t in scheduler.timesteps[:: scheduler.order]], record["times"]
        if len(own) != len(times) or max(abs(a - b) for a, b in zip(own, times)) > TIME_TOLERANCE:
            listed, theirs = (", ".join(f"{t:g}" for t in some) for some in (own, times))
            yield f"times {listed}, the pipeline's scheduler {theirs}"
        yield from filter(None, [noise_difference(record, scheduler.config)])


@checked
def call_settings(student: Path | str) -> dict[str, Any]:
    """Return the arguments of a pipeline call: number of steps, guidance scale (1 for none), and the student's size.

    Raises:
        UserError: no settings.
    """
    record, sampling = read_student(student)
    scale = (record.get("guidance") or {}).get("scale", 1.0 + sampling.omega)
    sized = {"width": sampling.size[0], "height": sampling.size[1]} if sampling.size else {}
    family = FAMILIES.get(str((record.get("base_model") or {}).get("pipeline")))
    guided = family.guided if family else "guidance_scale"
    return {"num_inference_steps": sampling.steps // sampling.calls_a_step, guided: float(scale), **sized}
