"""`fewstep train-style`: train a style on a teacher, to draw with beside its student."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fewstep.commands.distill import distill, estimate
from fewstep.common.arguments import arguments_of, checked, with_options
from fewstep.common.errors import UserError

if TYPE_CHECKING:
    from fewstep.distillation.estimate import Estimated


@checked
def train_style(
    pictures: Path | str,
    *,
    lora: Path | str | None = "auto",
    out: Path | str = "runs/style",
    teacher: Path | str = "",
    teacher_config: Path | str = "",
    config: Path | str | None = None,
    device: str | None = None,
    precision: str | None = None,
    overrides: Mapping[str, Any] | str | Sequence[str] = (),
) -> Path:
    """Train a style on a teacher, as a LoRA to draw with beside a student's, in the student's few steps.

    The loss is the teacher's denoising loss, so the style is used with any student of this teacher and with the teacher
    itself. Validation draws with the student beside. The run folder is as of `distill`.

    Example: fewstep train-style pictures/ --lora runs/tcd/student --teacher PIPELINE --out runs/style

    Example: fewstep sample "a house" --lora runs/tcd/student --style runs/style/student --teacher PIPELINE

    Args:
        pictures: folder or shards of captioned pictures; sets data.source.
        lora: student to validate beside: a bundled student by name (tcd), a LoRA file or folder, or none; auto is tcd
            for the bundled teacher and none for any other. Sets validation.beside.
        out: run folder; a stopped run is resumed from it.
        teacher: pipeline folder, single-file checkpoint or hub id; if omitted, the one in the settings, else the
            bundled teacher.
        teacher_config: pipeline folder with the configs of a single-file teacher.
        config: YAML file laid over the recipe `style`.
        device: auto, cpu or cuda; sets device.
        precision: precision of training, auto, fp32, bf16 or fp16; sets loop.precision.
        overrides: setting laid over recipe and config, key=value, e.g. student.rank=32. May be repeated; in
            Python also a mapping.

    Returns:
        The style's LoRA file.

    Raises:
        UserError: anything wrong, before any long work.
    """
    return distill(
        "style",
        out=out,
        teacher=teacher,
        teacher_config=teacher_config,
        config=config,
        device=device,
        precision=precision,
        overrides=_overrides(pictures, lora, overrides, teacher, teacher_config, config),
    )


@checked
@arguments_of(train_style)
def style_cost(**options: Any) -> list[Estimated]:
    """Estimate time and memory of `train_style` with the same arguments; write nothing.

    Raises:
        UserError: as `train_style`.
    """
    own = [options.pop(name) for name in ("pictures", "lora", "overrides")]
    named = [options[name] for name in ("teacher", "teacher_config", "config")]
    return estimate("style", overrides=_overrides(*own, *named), **options)


def _overrides(
    pictures: Path | str,
    lora: Path | str | None,
    overrides: Mapping[str, Any] | str | Sequence[str],
    teacher: Path | str,
    teacher_config: Path | str,
    config: Path | str | None,
) -> list[str]:
    """Return the overrides of a distillation that trains a style.

    Raises:
        UserError: no such teacher or student; or a student that is a whole pipeline.
    """
    from fewstep.backbones.teachers import read_teacher
    from fewstep.students.lora_file import student_of_run
    from fewstep.students.resolve import AUTO, named_student, student_place

    unknown = lora == AUTO and config is not None  # the file may name another teacher than the bundled one
    named = None if unknown else named_student(lora, read_teacher(teacher, teacher_config))
    beside = None if named is None else student_of_run(student_place(named))
    if beside and (beside / "model_index.json").is_file():
        raise UserError(f"lora = {str(lora)!r} is a whole pipeline; give it as the teacher, and lora = 'none'")
    return with_options(overrides, {"data.source": pictures, "validation.beside": beside})
