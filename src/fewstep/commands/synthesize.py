"""The verbs that make what distillations use, as functions: synthesised sets, perceptual distances, adapters."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fewstep.backbones.teachers import named_teacher
from fewstep.common.arguments import checked

if TYPE_CHECKING:
    from fewstep.distillation.synthesis.planning import SynthesisCost
    from fewstep.distillation.synthesis.reader import Synthesis
    from fewstep.distillation.synthesis.settings import SynthesisConfig


@checked
def synthesize(
    prompt_file: Path | str,
    *,
    out: Path | str,
    teacher: Path | str = "",
    kind: str | None = None,
    overrides: str | Sequence[str] = (),
    teacher_config: Path | str = "",
) -> Path:
    """Draw a set from prompts alone with a teacher, for training without pictures; returns its folder.

    Args:
        prompt_file: one prompt a line.
        out: folder; a set that was stopped is gone on with.
        teacher: pipeline folder, single-file checkpoint or hub id; empty for the one that overrides name, else the
            bundled one.
        kind: `latents` (end points) or `trajectories` (whole walks); None for what overrides say, else latents.
        overrides: `key=value` for the other settings.
        teacher_config: for a single-file teacher, a pipeline folder of its kind.

    Raises:
        UserError: anything wrong, in one line, before any long work.
    """
    settings, lines, _ = _synthesis(prompt_file, out, named_teacher(teacher, teacher_config), kind, overrides)
    from fewstep.distillation.synthesis.synthesize import synthesize as draw

    return draw(settings, lines, Path(out))


@checked
def synthesis_cost(
    prompt_file: Path | str,
    *,
    out: Path | str,
    teacher: Path | str = "",
    kind: str | None = None,
    overrides: str | Sequence[str] = (),
    teacher_config: Path | str = "",
) -> SynthesisCost:
    """What `synthesize` with the same arguments will take: samples, network evaluations, disk. Nothing is written.

    Raises:
        UserError: what `synthesize` would refuse.
    """
    return _synthesis(prompt_file, out, named_teacher(teacher, teacher_config), kind, overrides)[2]


def _synthesis(
    prompt_file: Path | str, out: Path | str, teacher: Path | str, kind: str | None, overrides: str | Sequence[str]
) -> tuple[SynthesisConfig, list[str], SynthesisCost]:
    """The settings, prompts and cost of a synthesis, refused here if it could not run."""
    from fewstep.backbones.pipeline_folder import read_folder
    from fewstep.backbones.teachers import teacher_path
    from fewstep.data.prompts import read_prompts
    from fewstep.distillation.synthesis.planning import check_synthesis, cost_of
    from fewstep.distillation.synthesis.settings import resolve_synthesis

    settings = resolve_synthesis(overrides, teacher, kind)
    lines = read_prompts(prompt_file)
    folder = read_folder(teacher_path(settings.teacher))
    check_synthesis(settings, lines, folder, Path(out))
    return settings, lines, cost_of(settings, lines, folder)


@checked
def read_synthesis(folder: Path | str) -> Synthesis:
    """Open a set that `synthesize` has finished.

    Raises:
        UserError: it is none, is not finished, or a file of it is missing or of another size or layout.
    """
    from fewstep.distillation.synthesis.record import open_set

    files = open_set(Path(folder))
    from fewstep.distillation.synthesis.reader import Synthesis

    return Synthesis(files)
