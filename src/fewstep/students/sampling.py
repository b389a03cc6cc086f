"""Sampling settings of a pipeline folder's own record, and of teachers without one. Light: no torch."""

from __future__ import annotations

from fewstep.backbones.pipeline_folder import PipelineFolder
from fewstep.backbones.pipeline_writer import read_record
from fewstep.common.config import validate
from fewstep.diffusion.config import TEACHER_SAMPLING, Sampling


def teacher_sampling(folder: PipelineFolder) -> Sampling:
    """Return how a teacher is sampled: by its folder's record, else by `TEACHER_SAMPLING`.

    A consistency model without a record is sampled as diffusers' LatentConsistencyModelPipeline does by default.

    Raises:
        UserError: the record is broken.
    """
    if record := read_record(folder.path):
        return validate(Sampling, record.get("sampling", {}))
    if not folder.consistency:
        return TEACHER_SAMPLING
    grid = folder.config("scheduler").get("original_inference_steps", 50)
    return validate(Sampling, {"sampler": "lcm", "steps": 4, "omega": 7.5, "grid": grid})


def end_point_sampling(folder: PipelineFolder) -> Sampling:
    """Return how end points of a teacher are drawn: by `teacher_sampling`, unless those are a student's few steps.

    Raises:
        UserError: the record is broken.
    """
    own = teacher_sampling(folder)
    if own.sampler == "lcm" and folder.consistency:  # no solver follows its trajectories
        return own
    return TEACHER_SAMPLING if own.sampler in ("sss", "lcm") else own
