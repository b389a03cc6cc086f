"""Write a student in the form that another tool reads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fewstep.backbones.teachers import named_teacher
from fewstep.common.arguments import checked
from fewstep.common.errors import UserError

if TYPE_CHECKING:
    from fewstep.export.verify import Checked


CARD_PROMPTS = ("an octopus", "a red apple", "a house", "a cat")
"""What a model card shows where no prompts are named."""


@checked
def export_as(
    student: Path | str,
    form: str = "diffusers",
    *,
    out: Path | str,
    teacher: Path | str = "",
    precision: str | None = None,
    prompts: Sequence[str] = (),
    seed: int = 0,
    check: bool = True,
    device: str = "auto",
    teacher_config: Path | str = "",
) -> tuple[Path, Checked | None]:
    """Write a student in the form that another tool reads, with a model card; see `export.forms`.

    Args:
        student: a LoRA file or folder, a bundled student by name, or the folder of a whole pipeline.
        form: diffusers, peft, kohya, merged or single-file.
        out: folder to write; there must be none yet, or an empty one.
        teacher: the LoRA's base: pipeline folder, single-file checkpoint or hub id; empty for the bundled one.
        precision: of whole networks, fp32, fp16 or bf16; None for the base's own. `merged` rounds the denoiser alone,
            `single-file` all that it holds.
        prompts: of the card's pictures.
        seed: of the first picture.
        check: read it back as its users will, and compare.
        device: auto, cpu or cuda.
        teacher_config: for a single-file teacher, a pipeline folder of its kind.

    Returns:
        the file, or the folder of a whole pipeline; what reading it back has shown.

    Raises:
        UserError: no such student or form, a form that cannot hold it, a place that is taken; or what was read back is
            not the student.
    """
    from fewstep.backbones.pipeline_folder import read_folder
    from fewstep.backbones.teachers import teacher_path
    from fewstep.common.choices import check_device
    from fewstep.common.files import check_writable
    from fewstep.export.formats import ADAPTERS, check_form
    from fewstep.students.resolve import resolve_student

    check_device(device)
    if precision not in (None, "fp32", "fp16", "bf16"):
        raise UserError(f"precision = {precision!r} is unknown; the nearest legal one is 'fp16'")
    whole = (Path(student) / "model_index.json").is_file()
    folder = read_folder(student if whole else teacher_path(named_teacher(teacher, teacher_config)))
    if whole and (teacher or teacher_config):
        raise UserError(
            f"teacher = {str(teacher)!r} says nothing beside student = {str(student)!r}, a whole pipeline; the nearest "
            "is to leave it out"
        )
    chosen = resolve_student(folder, None if whole else student, {})
    if not whole and chosen.lora is None:
        raise UserError(
            f"student = {str(student)!r} is the teacher itself; the nearest is a LoRA, or a whole student's folder"
        )
    classes = {name: folder.components[name][1] for name in folder.family.encoders}
    told = folder.extra_inputs(chosen.sampling.extra_conditioning)
    found = check_form(
        form, folder.family.kind, lora=not whole, extra_conditioning=told, encoders=classes, vae=folder.config("vae")
    )
    if precision and found.form in ADAPTERS:
        raise UserError(
            f"precision = {precision!r} is of whole networks, and a LoRA is written as it was; the nearest is to leave "
            "it out"
        )
    place = Path(out)
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        held = next(iter(sorted(item.name for item in place.iterdir())), "") if place.is_dir() else "a file"
        raise UserError(f"out = {str(place)!r} holds {held}, which would be lost; the nearest is a new folder")
    check_writable(place.parent)
    from fewstep.common.device import pick_device

    where = pick_device(device)
    from fewstep.export.export import Student
    from fewstep.export.export import export as write

    return write(
        Student(folder, chosen.lora),
        found.form,
        found.reader,
        place,
        precision=precision,
        prompts=list(prompts) or CARD_PROMPTS,
        seed=seed,
        check=check,
        device=where,
    )
