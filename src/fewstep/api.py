"""The verbs as functions, for scripts and notebooks; the command is a thin layer over them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fewstep.config import merge, parse_overrides, read_yaml, validate
from fewstep.errors import UserError, nearest

if TYPE_CHECKING:
    from fewstep.backbones.folder import PipelineFolder
    from fewstep.estimate import Estimated
    from fewstep.evaluation.metric import Figure
    from fewstep.settings import Sampling

BUNDLED_STUDENTS = ("tcd", "lcm")


def distill(
    recipe: str = "tcd",
    *,
    out: Path | str,
    config: Path | str | None = None,
    overrides: Sequence[str] = (),
    dry_run: bool = False,
) -> Path | Estimated:
    """Distil a teacher into a few-step student and return its file.

    Args:
        recipe: a bundled recipe or a YAML file.
        out: run folder; a run that was stopped is resumed from it.
        config: YAML file laid over the recipe.
        overrides: `a.b=value` laid over both.
        dry_run: return the time and memory estimate instead.

    Raises:
        UserError: anything wrong, in one line, before any long work.
    """
    from fewstep.backbones.folder import read_folder
    from fewstep.data.prompts import read_prompts
    from fewstep.files import check_writable
    from fewstep.settings import resolve, teacher_path
    from fewstep.training.run import check_same_run

    settings = resolve(recipe, config, overrides)
    read_folder(teacher_path(settings.teacher))
    source = settings.data.source
    if source != "emoji8" and not Path(source).is_dir():
        raise UserError(f"data.source = {source!r} is not a folder; give a folder of pictures or 'emoji8'")
    if settings.loop.watch_every and settings.watch.prompts.endswith(".txt"):
        read_prompts(settings.watch.prompts)
    check_writable(Path(out))
    check_same_run(Path(out), settings)
    from fewstep import distillation

    if dry_run:
        return distillation.estimate_run(settings, Path(out) / "cache")
    return distillation.distill(settings, Path(out))


def sample(
    prompts: Sequence[str],
    *,
    out: Path | str,
    prompt_file: Path | str | None = None,
    lora: Path | str | None = "tcd",
    teacher: str = "",
    seed: int = 0,
    count: int = 1,
    scale: int = 4,
    settings: Mapping[str, Any] | None = None,
) -> Path:
    """Draw `count` pictures a prompt into one file: a picture, or a sheet with a row a prompt.

    Args:
        prompts: what to draw.
        out: picture file to write, .png or .webp.
        prompt_file: further prompts, one a line.
        lora: `tcd` or `lcm` for the bundled students, a LoRA file or folder, or None for the teacher itself.
        teacher: pipeline folder; empty for the bundled one.
        seed: of the first picture; the others count up.
        count: pictures a prompt.
        scale: whole factor by which pictures are enlarged.
        settings: changes to the sampling settings that the student brings along (None values are ignored).

    Raises:
        UserError: no prompt, a setting out of range, a LoRA of another base, an unwritable place.
    """
    from fewstep.backbones.folder import read_folder
    from fewstep.data.prompts import read_prompts
    from fewstep.files import check_writable
    from fewstep.settings import teacher_path

    wanted = [*prompts, *(read_prompts(prompt_file) if prompt_file else [])]
    if not wanted or any(not prompt.strip() for prompt in wanted):
        raise UserError('prompts is empty; give at least one, e.g. "a doggy, fluent 3d style"')
    changes = {key: value for key, value in (settings or {}).items() if value is not None}
    path = Path(out)
    if path.suffix.lower() not in (".png", ".webp"):
        raise UserError(f"out = {str(path)!r} must end in .png or .webp; the nearest is {path.stem + '.png'!r}")
    if path.is_dir():
        raise UserError(f"out = {str(path)!r} is a folder; the nearest file is {str(path / 'sample.png')!r}")
    for name, value in (("count", count), ("scale", scale)):
        if value < 1:
            raise UserError(f"{name} = {value} must be at least 1; the nearest legal one is 1")
    _check_seed(seed, count * len(wanted))
    folder = read_folder(teacher_path(teacher))
    student, sampling = _student_of(folder, lora, changes)
    check_writable(path.parent)
    import numpy as np

    from fewstep.drawing import load_artist, save_picture, sheet

    artist = load_artist(folder.path, student)
    every = [prompt for prompt in wanted for _ in range(count)]
    pictures: np.ndarray = artist.draw(every, [seed + i for i in range(len(every))], sampling)
    return save_picture(sheet(pictures, count if len(wanted) > 1 else min(count, 8), scale), path)


def evaluate(
    *,
    prompt_file: Path | str,
    out: Path | str,
    lora: Path | str | None = "tcd",
    teacher: str = "",
    real: Path | str | None = None,
    reference_omega: float = 3.0,
    seed: int = 0,
    settings: Mapping[str, Any] | None = None,
) -> dict[str, Figure]:
    """Draw one picture a prompt and measure them; returns the figures by name and writes figures.json.

    Args:
        prompt_file: one prompt a line; FD needs at least 500.
        out: folder for figures.json.
        lora: a bundled student, a LoRA file or folder, or None for the teacher itself.
        teacher: pipeline folder; empty for the bundled one.
        real: folder of real pictures; None for Emoji-8's training split.
        reference_omega: guidance of the teacher's end points that a student is compared with.
        seed: seed of the first picture, and of the bootstrap.
        settings: changes to the sampling settings.

    Raises:
        UserError: anything wrong, in one line, before any long work.
    """
    from fewstep.backbones.folder import read_folder
    from fewstep.data.prompts import read_prompts
    from fewstep.files import check_writable
    from fewstep.settings import teacher_path

    prompts = read_prompts(prompt_file)
    changes = {key: value for key, value in (settings or {}).items() if value is not None}
    if real is not None and not Path(real).is_dir():
        raise UserError(f"real = {str(real)!r} is not a folder; leave it out for Emoji-8")
    _check_seed(seed, len(prompts))
    folder = read_folder(teacher_path(teacher))
    student, sampling = _student_of(folder, lora, changes)
    check_writable(Path(out))
    from fewstep import measuring

    return measuring.evaluate(
        folder.path,
        prompts,
        lora=student,
        real=Path(real) if real else None,
        sampling=sampling,
        reference_omega=reference_omega,
        seed=seed,
        out=Path(out),
    )


def demo(*, out: Path | str = "demo", overrides: Sequence[str] = ()) -> Path:
    """Distil LCM and TCD from the bundled teacher, measure and show them; returns the report's path.

    Raises:
        UserError: anything wrong with the settings or the place.
    """
    from fewstep.files import check_writable

    check_writable(Path(out))
    from fewstep.world.demo import DemoConfig, demo

    return demo(validate(DemoConfig, parse_overrides(overrides)), Path(out))


def benchmark(*, out: Path | str = "runs/benchmark", overrides: Sequence[str] = ()) -> Path:
    """Run the full benchmark on the bundled world; returns the report's path.

    Raises:
        UserError: anything wrong with the settings or the place.
    """
    from fewstep.files import check_writable

    check_writable(Path(out))
    from fewstep.world.benchmark import BenchmarkConfig, benchmark

    return benchmark(validate(BenchmarkConfig, parse_overrides(overrides)), Path(out))


def train_teacher(
    *, out: Path | str, target: Path | str, config: Path | str | None = None, overrides: Sequence[str] = ()
) -> Path:
    """Train the bundled world's teacher and write it as a pipeline folder.

    Raises:
        UserError: anything wrong with the settings or the place.
    """
    from fewstep.files import check_writable

    check_writable(Path(out))
    check_writable(Path(target).parent)
    from fewstep.world.teacher import TeacherConfig, train_teacher

    data = merge(read_yaml(config) if config else {}, parse_overrides(overrides))
    train_teacher(validate(TeacherConfig, data), Path(out), Path(target))
    return Path(target)


def find_student(name: Path | str) -> Path:
    """A bundled student by name, or the path itself.

    Raises:
        UserError: neither.
    """
    if str(name) in BUNDLED_STUDENTS:
        from fewstep.world.location import root

        return root() / "students" / str(name)
    if not Path(name).exists():
        best = nearest(str(name), BUNDLED_STUDENTS)
        raise UserError(f"lora = {str(name)!r} is neither a file nor a bundled student; the nearest is {best!r}")
    return Path(name)


def _student_of(
    folder: PipelineFolder, lora: Path | str | None, changes: Mapping[str, Any]
) -> tuple[Path | None, Sampling]:
    """The student that is asked for and how to sample it, refused here if it does not belong to the teacher."""
    from fewstep.export.header import check_lora
    from fewstep.export.pipeline import sampling_of
    from fewstep.settings import TEACHER_SAMPLING, Sampling

    student = find_student(lora) if lora is not None else None
    if student is None:
        own = sampling_of(folder.path) or TEACHER_SAMPLING
    else:
        own = check_lora(student, folder).sampling or Sampling()
    return student, validate(Sampling, own.model_dump() | dict(changes))


def _check_seed(seed: int, count: int) -> None:
    if not 0 <= seed <= 2**63 - 1 - count:
        legal = 0 if seed < 0 else 2**63 - 1 - count
        raise UserError(f"seed = {seed} is out of range; the nearest legal one is {legal}")
