"""The verbs as functions, for scripts and notebooks; the command is a thin layer over them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fewstep.backbones.teachers import named_teacher
from fewstep.common.arguments import checked
from fewstep.common.extras import WATCHING, check_installed

if TYPE_CHECKING:
    from fewstep.distillation.config import DistillConfig
    from fewstep.distillation.estimate import Estimated
    from fewstep.distillation.sources import Source


@checked
def distill(
    recipe: str = "tcd",
    *,
    out: Path | str,
    teacher: Path | str = "",
    config: Path | str | None = None,
    overrides: str | Sequence[str] = (),
    teacher_config: Path | str = "",
) -> Path:
    """Distil a teacher into a few-step student and return its file.

    Args:
        recipe: a bundled recipe or a YAML file.
        out: run folder; a run that was stopped is resumed from it.
        teacher: pipeline folder, single-file checkpoint or hub id; empty for the one that recipe, config or overrides
            name, else the bundled one.
        config: YAML file laid over the recipe.
        overrides: `a.b=value` laid over both.
        teacher_config: for a single file, a pipeline folder of its kind, for its configs.

    Raises:
        UserError: anything wrong, in one line, before any long work.
    """
    settings, source = _distill_config(recipe, out, named_teacher(teacher, teacher_config), config, overrides)
    from fewstep.distillation import distill as distillation

    return distillation.distill(settings, Path(out), source=source)


@checked
def estimate(
    recipe: str = "tcd",
    *,
    out: Path | str,
    teacher: Path | str = "",
    config: Path | str | None = None,
    overrides: str | Sequence[str] = (),
    teacher_config: Path | str = "",
) -> list[Estimated]:
    """What `distill` with the same arguments will take in time and memory, stage by stage; nothing is written.

    Raises:
        UserError: what `distill` would refuse.
    """
    settings, source = _distill_config(recipe, out, named_teacher(teacher, teacher_config), config, overrides)
    from fewstep.distillation.estimate_run import estimate_run

    return estimate_run(settings, source)


def _distill_config(
    recipe: str, out: Path | str, teacher: Path | str, config: Path | str | None, overrides: str | Sequence[str]
) -> tuple[DistillConfig, Source]:
    """Return the settings of a distillation and its data source, checked.

    Raises:
        UserError: it could not run.
    """
    from fewstep.backbones.pipeline_folder import read_folder
    from fewstep.backbones.teachers import teacher_path
    from fewstep.common.files import check_writable
    from fewstep.distillation.checks import check_distillation
    from fewstep.distillation.config import resolve
    from fewstep.training.run_folder import check_same_run

    settings = resolve(recipe, config, overrides, teacher)
    source = check_distillation(settings, read_folder(teacher_path(settings.teacher)))
    check_writable(Path(out))
    check_same_run(Path(out), settings, later=True)
    if any(stage.loop.validate_every for stage in settings.each_stage()):
        check_installed("distill with loop.validate_every", WATCHING)
    narrow: list[str] = [
        stage.student.base for stage in settings.each_stage() if stage.student.base in ("8bit", "4bit")
    ]
    narrow += [stage.optim.kind for stage in settings.each_stage() if stage.optim.kind == "adamw_8bit"]
    if narrow:
        check_installed(f"distill with {narrow[0]}", ["bitsandbytes"], "quantize")
    return settings, source
