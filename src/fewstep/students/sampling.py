"""Sampling settings that a pipeline folder brings along. Light: no torch."""

from __future__ import annotations

from pathlib import Path

from fewstep.backbones.pipeline_folder import read_folder
from fewstep.backbones.pipeline_writer import read_record
from fewstep.common.config import validate
from fewstep.diffusion.config import TEACHER_SAMPLING, Sampling


def sampling_of(pipeline: Path) -> Sampling | None:
    """The settings that a pipeline folder brings along; None for one that has no record.

    Raises:
        UserError: the record is broken.
    """
    record = read_record(pipeline)
    return validate(Sampling, record.get("sampling", {})) if record else None


def teacher_sampling(pipeline: Path) -> Sampling:
    """How a teacher's folder is sampled: as its own record says, else by `TEACHER_SAMPLING`.

    A consistency model without a record is sampled as diffusers' LatentConsistencyModelPipeline does by default.

    Raises:
        UserError: the record is broken.
    """
    own = sampling_of(pipeline)
    folder = read_folder(pipeline) if own is None else None
    if folder is None or not folder.consistency:
        return own or TEACHER_SAMPLING
    grid = folder.config("scheduler").get("original_inference_steps", 50)
    return validate(Sampling, {"sampler": "lcm", "steps": 4, "omega": 7.5, "grid": grid})


def end_point_sampling(pipeline: Path) -> Sampling:
    """How the end points of a teacher are drawn: as `teacher_sampling`, unless that is a student's few steps.

    Raises:
        UserError: the record is broken.
    """
    own = teacher_sampling(pipeline)
    if own.sampler == "lcm" and read_folder(pipeline).consistency:  # no solver follows its trajectories
        return own
    return TEACHER_SAMPLING if own.sampler in ("sss", "lcm") else own
