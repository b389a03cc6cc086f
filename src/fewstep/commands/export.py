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
    base_model: str = "",
    license: str = "",
    push: str | None = None,
    private: bool = False,
) -> tuple[Path, Checked | None]:
    """Write a student in the form that another tool reads, with a model card, and verify that it is read back.

    Example: fewstep export runs/tcd/student --form kohya --out exports/octopus-tcd

    Example: fewstep export runs/sd/student --teacher owner/base --out exports/fast --push me/fast --license openrail++

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
        base_model: owner/name of the base on a hub, for the card; if omitted, the teacher's, where it has one.
        license: licence of the export, as a hub names it; if omitted, that in the base's own card, else other.
        push: owner/name of a model repository on the Hugging Face hub that the folder is uploaded to; needs a token.
        private: make the repository private, if there is none yet.

    Returns:
        The file, or the folder of a whole pipeline; the result of reading it back.

    Raises:
        UserError: no such student or form, a form that cannot hold it, a folder that is not empty, a hub that refuses
            the upload; or the file that was read back differs from the student.
    """
    from fewstep.backbones.pipeline_folder import index_file, read_folder
    from fewstep.backbones.teachers import HUB_ID, read_teacher
    from fewstep.common.choices import check_choice, check_device
    from fewstep.common.files import check_writable
    from fewstep.export.formats import ADAPTERS, check_form
    from fewstep.export.push import check_push
    from fewstep.export.push import push as upload
    from fewstep.students.resolve import resolve_student

    check_device(device)
    if precision is not None:
        check_choice("precision", precision, ("fp32", "fp16", "bf16"))
    whole = index_file(Path(student)).is_file()
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
    if base_model and not HUB_ID.fullmatch(base_model):
        raise UserError(f"base_model = {base_model!r} is not owner/name of a hub; give that, or remove it")
    if private and push is None:
        raise UserError("private = True has no effect without push; remove it")
    if push is not None:
        check_push(push)
    from fewstep.common.device import pick_device
    from fewstep.export.export import Student, export

    made = export(
        Student(folder, chosen.lora),
        kind,
        reader,
        place,
        precision=precision,
        prompts=[prompts] if isinstance(prompts, str) else list(prompts) or CARD_PROMPTS,
        seed=seed,
        check=check,
        device=pick_device(device),
        base_model=base_model,
        licence=license,
        repo=push or "",
    )
    if push is not None:
        upload(place, push, private=private)
    return made


def report(result: tuple[Path, Checked | None], arguments: Mapping[str, Any]) -> list[str]:
    """Return the lines that `export` prints: the result of reading back, and the file."""
    path, verified = result
    pushed = [f"uploaded to {arguments['push']}"] if arguments["push"] else []
    return [*([] if verified is None else [verified.line]), f"wrote {path}", *pushed]
