"""`fewstep synthesize`: draw a training set from prompts alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fewstep.common.arguments import arguments_of, checked, with_options

if TYPE_CHECKING:
    from fewstep.backbones.pipeline_folder import PipelineFolder
    from fewstep.distillation.synthesis.planning import SynthesisCost
    from fewstep.distillation.synthesis.reader import Synthesis
    from fewstep.distillation.synthesis.settings import SynthesisConfig


@checked
def synthesize(
    prompt_file: Path | str,
    *,
    out: Path | str,
    teacher: Path | str = "",
    teacher_config: Path | str = "",
    kind: str | None = None,
    device: str | None = None,
    precision: str | None = None,
    overrides: Mapping[str, Any] | str | Sequence[str] = (),
) -> Path:
    """Draw latents or trajectories from prompts with a teacher, for training without pictures.

    Writes synthesis.json (the record), prompts.txt, conditions.safetensors and shard-*.safetensors. Under torchrun each
    process draws its share. `fewstep recipes --settings` lists everything that --set can set.

    Example: fewstep synthesize --prompt-file prompts.txt --out runs/trajectories --kind trajectories

    Args:
        prompt_file: text file, one prompt a line.
        out: folder; a stopped synthesis is resumed from it.
        teacher: pipeline folder, single-file checkpoint or hub id; if omitted, the one in the settings, else the
            bundled teacher.
        teacher_config: pipeline folder with the configs of a single-file teacher.
        kind: latents (end points; the default) or trajectories (every point).
        device: auto, cpu or cuda; sets device.
        precision: precision of the network, auto, fp32, bf16 or fp16; sets precision.
        overrides: setting, key=value, e.g. guidance.high=14. May be repeated; in Python also a mapping.

    Returns:
        The folder.

    Raises:
        UserError: anything wrong, before any long work.
    """
    settings, prompts, folder = _settings(
        prompt_file=prompt_file,
        out=out,
        teacher=teacher,
        teacher_config=teacher_config,
        kind=kind,
        device=device,
        precision=precision,
        overrides=overrides,
    )
    from fewstep.distillation.synthesis.synthesize import synthesize as draw

    return draw(settings, prompts, Path(out), teacher=folder)


@checked
@arguments_of(synthesize)
def synthesis_cost(**options: Any) -> SynthesisCost:
    """Estimate samples, network evaluations and disk of `synthesize` with the same arguments; write nothing.

    Raises:
        UserError: as `synthesize`.
    """
    from fewstep.distillation.synthesis.planning import cost_of

    return cost_of(*_settings(**options))


def _settings(
    *,
    prompt_file: Path | str,
    out: Path | str,
    teacher: Path | str,
    teacher_config: Path | str,
    kind: str | None,
    device: str | None,
    precision: str | None,
    overrides: Mapping[str, Any] | str | Sequence[str],
) -> tuple[SynthesisConfig, list[str], PipelineFolder]:
    """Resolve and check a synthesis: its settings, prompts and teacher.

    Raises:
        UserError: a setting, the teacher, the prompts or the folder does not allow it.
    """
    from fewstep.backbones.teachers import named_teacher, read_teacher
    from fewstep.data.prompts import read_prompts
    from fewstep.distillation.synthesis.planning import check_synthesis
    from fewstep.distillation.synthesis.settings import resolve_synthesis

    changes = with_options(overrides, {"device": device, "precision": precision})
    settings = resolve_synthesis(changes, named_teacher(teacher, teacher_config), kind)
    prompts = read_prompts(prompt_file, "prompt_file")
    folder = read_teacher(settings.teacher)
    check_synthesis(settings, prompts, folder, Path(out))
    return settings, prompts, folder


@checked
def read_synthesis(folder: Path | str) -> Synthesis:
    """Open a set that `synthesize` has finished.

    Raises:
        UserError: `folder` is no synthesized set, is unfinished, or a file of it is missing or of another size or
            layout.
    """
    from fewstep.distillation.synthesis.record import open_set

    files = open_set(Path(folder))
    from fewstep.distillation.synthesis.reader import Synthesis

    return Synthesis(files)
