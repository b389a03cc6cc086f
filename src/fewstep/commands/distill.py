"""`fewstep distill`: distil a teacher into a few-step student."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fewstep.commands.summary import table
from fewstep.common.arguments import arguments_of, checked, with_options

if TYPE_CHECKING:
    from fewstep.distillation.checks import Inputs
    from fewstep.distillation.config import DistillConfig
    from fewstep.distillation.estimate import Estimated


@checked
def distill(
    recipe: str = "tcd",
    *,
    out: Path | str | None = None,
    teacher: Path | str = "",
    teacher_config: Path | str = "",
    config: Path | str | None = None,
    prompt_file: Path | str | None = None,
    device: str | None = None,
    precision: str | None = None,
    overrides: Mapping[str, Any] | str | Sequence[str] = (),
    quiet: bool = False,
    callback: Callable[[int, Mapping[str, float]], object] | None = None,
) -> Path:
    """Distil a teacher into a few-step student.

    Writes into the run folder: config.yaml (resolved), log.jsonl, tensorboard/, checkpoints/, grids/, best/ and
    student/ (the LoRA to use). `fewstep recipes --settings` lists everything that --set can set.

    Example: fewstep distill --recipe tcd --config world/distill.yaml --out runs/tcd -s loop.steps=300 -s optim.lr=1e-3

    Args:
        recipe: bundled recipe (see `fewstep recipes`) or a YAML file; several, comma-separated, follow each other in
            stages, e.g. tcd,dmd2.
        out: run folder, runs/<recipe> if omitted; a stopped run is resumed from it.
        teacher: pipeline folder, single-file checkpoint or hub id; if omitted, the one in the settings, else the
            bundled teacher. Where its folder records a guidance (fewstep.json), that replaces the recipe's.
        teacher_config: pipeline folder with the configs of a single-file teacher.
        config: YAML file laid over the recipe.
        prompt_file: text file, one prompt a line, for recipes that need no pictures (smd, dmd2, tlcm, ...);
            sets data.source.
        device: auto, cpu or cuda; sets device.
        precision: precision of training, auto, fp32, bf16 or fp16; sets loop.precision.
        overrides: setting laid over recipe and config, key=value, e.g. optim.lr=3e-4. May be repeated; in
            Python also a mapping.
        quiet: no estimate and no progress bar; errors are raised as ever.
        callback: function of a step and its figures, called at each log line and validation; what it raises ends the
            run.

    Returns:
        The student's LoRA file, or its folder where the whole network is trained.

    Raises:
        UserError: anything wrong, before any long work.
    """
    settings, inputs, place = _settings(
        recipe=recipe,
        out=out,
        teacher=teacher,
        teacher_config=teacher_config,
        config=config,
        prompt_file=prompt_file,
        device=device,
        precision=precision,
        overrides=overrides,
    )
    from fewstep.distillation import distill as distillation

    return distillation.distill(settings, place, inputs=inputs, quiet=quiet, callback=callback)


@checked
@arguments_of(distill)
def estimate(*, quiet: bool, callback: object, **options: Any) -> list[Estimated]:
    """Estimate time and memory of `distill` with the same arguments, stage by stage; write nothing.

    Raises:
        UserError: as `distill`.
    """
    settings, inputs, _ = _settings(**options)
    from fewstep.distillation.estimate_run import estimate_run

    return estimate_run(settings, inputs)


def ending(student: Path, arguments: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines that `distill` ends with: figures, the student, the best one, and the next command."""
    from fewstep.common.errors import UserError
    from fewstep.common.run_log import read_run

    out = next(place for place in (student, *student.parents) if place.name == "student").parent
    own = max((out / "stages").glob("*"), default=out, key=lambda place: int(place.name.partition("-")[0]))
    if arguments["quiet"]:
        return
    teacher = ""
    with suppress(UserError):
        run = read_run(own)
        teacher = run.teacher
        last = {name: f"{value:.4g}" for _, name, value in [*run.losses, *run.quality]}
        best = {name: f"{value:.4g}" for name, value in run.best.items() if isinstance(value, int | float)}
        if last:
            rows = [(name, last[name], best.get(name, "")) for name in last]
            yield table(("", f"step {run.step}", f"best, step {best['step']}" if best else ""), rows)
        yield from (f"alarm    {text}" for text in run.alarms)
        yield f"student  {student}"
        if best:
            yield f"best     {own / 'best'}"
    words = ["fewstep", "sample", "PROMPT", "--lora", str(student)]
    yield f"next     {shlex.join([*words, *(['--teacher', teacher] if teacher else []), '--out', 'picture.png'])}"


def _settings(
    *,
    recipe: str,
    out: Path | str | None,
    teacher: Path | str,
    teacher_config: Path | str,
    config: Path | str | None,
    prompt_file: Path | str | None,
    device: str | None,
    precision: str | None,
    overrides: Mapping[str, Any] | str | Sequence[str],
) -> tuple[DistillConfig, Inputs, Path]:
    """Resolve and check the settings of a distillation, what they name, and its run folder.

    Raises:
        UserError: a setting, the teacher, the data, the run folder or the installation does not allow it.
    """
    from fewstep.backbones.teachers import named_teacher, read_teacher
    from fewstep.common.extras import check_installed
    from fewstep.common.files import check_writable
    from fewstep.distillation.checks import check_distillation
    from fewstep.distillation.config import resolve
    from fewstep.students.resolve import own_omega
    from fewstep.training.run_folder import check_same_run
    from fewstep.training.tracker import check_tracker

    changes = with_options(overrides, {"data.source": prompt_file, "device": device, "loop.precision": precision})
    named = named_teacher(teacher, teacher_config)
    settings = resolve(recipe, config, changes, named)
    folder = read_teacher(settings.teacher)
    settings = resolve(recipe, config, changes, named, own_omega(folder), folder.picture_size)
    inputs = check_distillation(settings, folder)
    place = Path(out) if out else Path("runs") / Path(settings.recipe).stem.replace(",", "-")
    check_writable(place)
    check_same_run(place, settings, later=True)
    stages = settings.each_stage()
    quantized = [word for stage in stages for word in (stage.student.base, stage.optim.kind) if word.endswith("bit")]
    for stage in stages:
        check_tracker(stage.loop.tracker)
    if quantized:
        check_installed(f"distill with {quantized[0]}", ["bitsandbytes"], "quantize")
    return settings, inputs, place
