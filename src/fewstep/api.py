"""The verbs as functions, for scripts and notebooks; the command is a thin layer over them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fewstep.config import merge, parse_overrides, read_yaml, validate
from fewstep.errors import UserError, nearest

if TYPE_CHECKING:
    from fewstep.estimate import Estimated

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
    from fewstep.settings import resolve, teacher_path

    settings = resolve(recipe, config, overrides)
    read_folder(teacher_path(settings.teacher))
    check_writable(Path(out))
    from fewstep import distillation

    if dry_run:
        estimated = distillation.estimate_run(settings, Path(out) / "cache")
        print("\n".join(estimated.lines()))
        return estimated
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
        lora: `tcd` or `lcm` for the bundled students, a LoRA file or folder, or None for the teacher itself.
        settings: changes to the sampling settings that the student brings along (None values are ignored).

    Raises:
        UserError: no prompt, a setting out of range, a LoRA of another base, an unwritable place.
    """
    from fewstep.backbones.folder import read_folder
    from fewstep.data.prompts import read_prompts
    from fewstep.settings import Sampling, teacher_path

    wanted = [*prompts, *(read_prompts(prompt_file) if prompt_file else [])]
    if not wanted or any(not prompt.strip() for prompt in wanted):
        raise UserError('prompts is empty; give at least one, e.g. "a doggy, fluent 3d style"')
    changes = {key: value for key, value in (settings or {}).items() if value is not None}
    validate(Sampling, changes)
    path = Path(out)
    if path.suffix.lower() not in (".png", ".webp"):
        raise UserError(f"out = {str(path)!r} must end in .png or .webp; the nearest is {path.stem + '.png'!r}")
    if count < 1 or scale < 1:
        raise UserError(f"count = {count} and scale = {scale} must be at least 1")
    check_writable(path.parent)
    folder = read_folder(teacher_path(teacher)).path
    student = find_student(lora) if lora is not None else None
    import numpy as np

    from fewstep.drawing import load_artist, save_picture, sheet

    artist = load_artist(folder, student)
    sampling = validate(Sampling, artist.sampling.model_dump() | changes)
    every = [prompt for prompt in wanted for _ in range(count)]
    pictures: np.ndarray = artist.draw(every, [seed + i for i in range(len(every))], sampling)
    return save_picture(sheet(pictures, count if len(wanted) > 1 else min(count, 8), scale), path)


def train_teacher(
    *, out: Path | str, target: Path | str, config: Path | str | None = None, overrides: Sequence[str] = ()
) -> Path:
    """Train the bundled world's teacher and write it as a pipeline folder.

    Raises:
        UserError: anything wrong with the settings or the place.
    """
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


def check_writable(folder: Path) -> None:
    """Refuse a place that cannot be written to, before any work.

    Raises:
        UserError: no such place can be made, or it takes no files.
    """
    from fewstep.files import atomic_write

    probe = folder / ".fewstep-probe"
    with atomic_write(probe) as part:
        part.write_bytes(b"0")
    probe.unlink()
