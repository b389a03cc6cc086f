"""Resolve the name of a student for a teacher to its file and sampling settings; without torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from fewstep.backbones.checks import check_sampling
from fewstep.backbones.pipeline_folder import PipelineFolder
from fewstep.backbones.pipeline_writer import read_record
from fewstep.backbones.teachers import teacher_path
from fewstep.common.config import validate
from fewstep.common.defaults import world
from fewstep.common.errors import UserError, did_you_mean
from fewstep.diffusion.config import TEACHER_SAMPLING, Guidance, Sampling
from fewstep.students.lora_checks import check_lora
from fewstep.students.lora_header import LoraHeader

BUNDLED_STUDENTS = ("tcd",)
AUTO = "auto"
"""The default student: the bundled TCD one for the bundled teacher, none for another teacher."""
NONE = "none"
"""The teacher itself, as None: for the command, whose options are text."""


class ResolvedStudent(NamedTuple):
    """A student and its sampling settings.

    Attributes:
        lora: None for the teacher itself, or a whole pipeline.
        omega_seen: mean guidance of its training; None if not recorded.
    """

    lora: LoraHeader | None
    sampling: Sampling
    omega_seen: float | None


def student_place(name: Path | str) -> Path:
    """Return the folder of a bundled student, or the path itself.

    Raises:
        UserError: neither exists, or both do.
    """
    if str(name) in BUNDLED_STUDENTS:
        if Path(name).exists():
            place = str(Path(name).resolve())
            raise UserError(f"lora = {str(name)!r} is a bundled student and also {place!r}; give that whole path")
        return world("lora").root() / "students" / str(name)
    if not Path(name).exists():
        meant = did_you_mean(str(name), BUNDLED_STUDENTS)
        raise UserError(f"lora = {str(name)!r} is neither a file nor a bundled student{meant}")
    return Path(name)


def named_student(lora: Path | str | None, folder: PipelineFolder) -> Path | str | None:
    """Return the student that `auto` means for a teacher, None for the teacher itself; other names as given."""
    if lora != AUTO:
        return None if lora == NONE else lora
    try:
        bundled = folder.path.resolve() == teacher_path("").resolve()
    except UserError:  # no bundled world is installed
        bundled = False
    return BUNDLED_STUDENTS[0] if bundled else None


def resolve_student(folder: PipelineFolder, lora: Path | str | None, changes: Mapping[str, Any]) -> ResolvedStudent:
    """Find and check a student on a teacher.

    Args:
        lora: a path, a bundled student's name, `auto`, `none` or None.
        changes: sampling settings that replace the student's own; None values are ignored.

    Raises:
        UserError: no such student, one of another teacher, or settings that it cannot be sampled with.
    """
    named = named_student(lora, folder)
    header = check_lora(student_place(named), folder) if named is not None else None
    if header is None:
        own, record = teacher_sampling(folder), read_record(folder.path)
    else:
        own, record = header.sampling or Sampling(), header.record
    sampling = changed_sampling(own, changes, folder)
    seen = record.get("guidance_seen")
    return ResolvedStudent(header, sampling, validate(Guidance, seen).mean_omega if isinstance(seen, dict) else None)


def changed_sampling(own: Sampling, changes: Mapping[str, Any], folder: PipelineFolder) -> Sampling:
    """Return sampling settings with changes, checked against the pipeline.

    Args:
        changes: None values are ignored.

    Raises:
        UserError: settings out of range, or that the pipeline cannot be sampled with.
    """
    given = {key: value for key, value in changes.items() if value is not None}
    sampling = validate(Sampling, own.model_dump() | given)
    if "gamma" in given and sampling.sampler != "sss":
        raise UserError(
            f"gamma has no effect with sampler = {sampling.sampler!r}; remove it, or set sampler = 'sss'", field="gamma"
        )
    check_sampling(sampling, folder)
    return sampling


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


def own_omega(folder: PipelineFolder) -> float | None:
    """Return the guidance that a teacher's folder records for itself; None without a record or without guidance.

    Raises:
        UserError: the record is broken.
    """
    return (teacher_sampling(folder).omega or None) if read_record(folder.path) else None


def end_point_sampling(folder: PipelineFolder) -> Sampling:
    """Return how end points of a teacher are drawn: by `teacher_sampling`, unless those are a student's few steps.

    Raises:
        UserError: the record is broken.
    """
    own = teacher_sampling(folder)
    if own.sampler == "lcm" and folder.consistency:  # no solver follows its trajectories
        return own
    return TEACHER_SAMPLING if own.sampler in ("sss", "lcm") else own


def omega_given(omega: float | None, guidance_scale: float | None) -> float | None:
    """Return omega by either option; None for neither.

    Raises:
        UserError: both are given, or a scale below 0.
    """
    if guidance_scale is None:
        return omega
    if omega is not None:
        raise UserError(f"guidance_scale = {guidance_scale:g} and omega = {omega:g} are one setting; remove one")
    if not guidance_scale >= 0:
        raise UserError(f"guidance_scale = {guidance_scale:g} must be at least 0")
    return max(0.0, guidance_scale - 1)


def check_negative(prompt: str, folder: PipelineFolder, sampling: Sampling, *, compiled: bool) -> None:
    """Refuse a negative prompt that the network cannot be drawn with.

    Raises:
        UserError: naming the reason.
    """
    if prompt and not sampling.omega and compiled:
        raise UserError(
            "negative_prompt without guidance does not go with compile; remove one", field="negative_prompt"
        )
    if prompt and (folder.takes_guidance or not (sampling.omega or folder.family.cross_attention)):
        reason = (
            "a network that takes guidance as an input" if folder.takes_guidance else "no cross-attention, omega = 0"
        )
        raise UserError(f"negative_prompt has no effect with {reason}; remove it", field="negative_prompt")
