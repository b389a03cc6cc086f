"""`fewstep export`: write a student in the form that another tool reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fewstep.common.arguments import checked
from fewstep.common.errors import UserError

if TYPE_CHECKING:
    from fewstep.export.verify import Checked


CARD_PROMPTS = ("an octopus", "a red apple", "a house", "a cat")
"""Prompts of a model card's pictures where none are given."""


@checked
def export_as(
    student: Path | str,
    form: str = "diffusers",
    *,
    out: Path | str,
    teacher: Path | str = "",
    teacher_config: Path | str = "",
    precision: str | None = None,
    prompts: str | Sequence[str] = (),
    seed: int = 0,
    check: bool = True,
    device: str = "auto",
) -> tuple[Path, Checked | None]:
    """Write a student in the form that another tool reads, with a model card, and verify that it is read back.

    Example: fewstep export runs/tcd/student --form kohya --out exports/octopus-tcd

    Args:
        student: LoRA file or folder, a bundled student by name (tcd), or the folder of a whole pipeline.
        form: diffusers, peft, kohya (ComfyUI too), merged (a pipeline folder) or single-file.
        out: new folder for the file, its model card and pictures.
        teacher: base of the LoRA: pipeline folder, single-file checkpoint or hub id; if omitted, the bundled teacher.
        teacher_config: pipeline folder with the configs of a single-file teacher.
        precision: storage of whole networks, fp32, fp16 or bf16; the base's own if omitted. merged rounds the denoiser
            alone, single-file all networks.
        prompts: prompt of a picture of the card. May be repeated.
        seed: seed of the first picture; each further picture adds 1.
        check: read the file back as its users will, draw, and compare.
        device: auto, cpu or cuda.

    Returns:
        The file, or the folder of a whole pipeline; the result of reading it back.

    Raises:
        UserError: no such student or form, a form that cannot hold it, a folder that is not empty; or the file that was
            read back differs from the student.
    """
    from fewstep.backbones.pipeline_folder import read_folder
    from fewstep.backbones.teachers import read_teacher
    from fewstep.common.choices import check_choice, check_device
    from fewstep.common.files import check_writable
    from fewstep.export.formats import ADAPTERS, check_form
    from fewstep.students.resolve import resolve_student

    check_device(device)
    if precision is not None:
        check_choice("precision", precision, ("fp32", "fp16", "bf16"))
    whole = (Path(student) / "model_index.json").is_file()
    if whole and (teacher or teacher_config):
        field = "teacher" if teacher else "teacher_config"
        raise UserError(
            f"{field} = {str(teacher or teacher_config)!r} has no effect: student = {str(student)!r} is a whole "
            "pipeline; remove it"
        )
    folder = read_folder(student, "student") if whole else read_teacher(teacher, teacher_config)
    chosen = resolve_student(folder, None if whole else student, {})
    if not whole and chosen.lora is None:
        raise UserError(f"student = {str(student)!r} is the teacher itself; give a LoRA, or a whole student's folder")
    extra = folder.extra_inputs(chosen.sampling.extra_conditioning)
    kind, reader = check_form(form, folder, lora=not whole, extra_conditioning=extra)
    if precision and kind in ADAPTERS:
        raise UserError(
            f"precision = {precision!r} has no effect with form = {kind!r}: a LoRA keeps its own; remove it"
        )
    place = Path(out)
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        held = min(item.name for item in place.iterdir()) if place.is_dir() else "a file"
        raise UserError(f"out = {str(place)!r} holds {held}, which would be lost; give a new folder")
    check_writable(place.parent)
    from fewstep.common.device import pick_device
    from fewstep.export.export import Student, export

    return export(
        Student(folder, chosen.lora),
        kind,
        reader,
        place,
        precision=precision,
        prompts=[prompts] if isinstance(prompts, str) else list(prompts) or CARD_PROMPTS,
        seed=seed,
        check=check,
        device=pick_device(device),
    )


def report(result: tuple[Path, Checked | None], arguments: Mapping[str, Any]) -> list[str]:
    """Return the lines that `export` prints: the result of reading back, and the file."""
    path, verified = result
    return [*([] if verified is None else [verified.line]), f"wrote {path}"]
