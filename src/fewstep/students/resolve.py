"""Which student is meant beside a teacher, and how it is sampled: found and refused before torch is imported."""

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
from fewstep.common.errors import UserError, nearest
from fewstep.diffusion.config import Guidance, Sampling
from fewstep.students.lora_header import check_lora
from fewstep.students.sampling import teacher_sampling

BUNDLED_STUDENTS = ("tcd",)
AUTO = "auto"
"""The student where none is named: the bundled TCD one for the bundled teacher, none for another teacher."""
NONE = "none"
"""The teacher itself, as None: for the command, whose options are text."""


def student_place(name: Path | str) -> Path:
    """A bundled student by name, or the path itself.

    Raises:
        UserError: neither, or a path that only looks like a bundled student's name.
    """
    if str(name) in BUNDLED_STUDENTS:
        if Path(name).exists():
            place = str(Path(name).resolve())
            raise UserError(f"lora = {str(name)!r} is a bundled student and also {place!r}; give that whole path")
        return world("lora").root() / "students" / str(name)
    if not Path(name).exists():
        best = nearest(str(name), BUNDLED_STUDENTS)
        raise UserError(f"lora = {str(name)!r} is neither a file nor a bundled student; the nearest is {best!r}")
    return Path(name)


class ResolvedStudent(NamedTuple):
    """Who draws, and how."""

    lora: Path | None
    sampling: Sampling
    omega_seen: float | None


def _named_student(lora: Path | str | None, folder: PipelineFolder) -> Path | str | None:
    """The student that `auto` stands for, beside a teacher."""
    if lora != AUTO:
        return None if lora == NONE else lora
    try:
        bundled = folder.path.resolve() == teacher_path("").resolve()
    except UserError:  # no bundled world on this machine
        bundled = False
    return "tcd" if bundled else None


def resolve_student(folder: PipelineFolder, lora: Path | str | None, changes: Mapping[str, Any]) -> ResolvedStudent:
    """The student that is asked for and how to sample it.

    `omega_seen` is the mean guidance it was trained with, None where it does not say.

    Raises:
        UserError: there is no such student, it is another teacher's, or it cannot be sampled so.
    """
    meant = _named_student(lora, folder)
    student = student_place(meant) if meant is not None else None
    if student is None:
        own, notes = teacher_sampling(folder.path), read_record(folder.path)
    else:
        header = check_lora(student, folder)
        own, notes = header.sampling or Sampling(), header.notes
    seen = notes.get("guidance_seen")
    given = {key: value for key, value in changes.items() if value is not None}
    sampling = validate(Sampling, own.model_dump() | given)
    if "gamma" in given and sampling.sampler != "sss":
        raise UserError(
            f"gamma = {sampling.gamma:g} says nothing to sampler = {sampling.sampler!r}; "
            "leave it out, or give sampler = 'sss'"
        )
    check_sampling(sampling, folder)
    return ResolvedStudent(student, sampling, validate(Guidance, seen).mean_omega if isinstance(seen, dict) else None)
