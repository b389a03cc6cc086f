"""`fewstep report`: several runs beside each other and their teacher, on one page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fewstep.commands.sample import check_positive, check_seed
from fewstep.common.arguments import checked
from fewstep.common.errors import UserError

if TYPE_CHECKING:
    from fewstep.evaluation.run_report import Shown


@checked
def report(
    runs: str | Sequence[str],
    *,
    prompt_file: Path | str,
    steps: int | None = None,
    gamma: float | None = None,
    seed: int = 0,
    out: Path | str = "report.html",
    device: str = "auto",
    precision: str = "fp32",
    batch: int | None = None,
) -> Path:
    """Compare runs on one page: the same prompts and noise by each student and by the teacher, and the runs' figures.

    The teacher is drawn twice: at the students' network evaluations, and at its own. All runs must have one teacher.

    Example: fewstep report runs/tcd runs/lcm --prompt-file prompts.txt --out report.html

    Args:
        runs: run folders, one or several.
        prompt_file: text file, one prompt a line; each is a row of pictures.
        steps: network evaluations of the students' pictures; if omitted, each student's own.
        gamma: stochasticity of the students with sampler sss, 0 to 1; if omitted, each student's own.
        seed: seed of the first row; each further row adds 1.
        out: page to write; it needs no other file.
        device: auto, cpu or cuda.
        precision: precision of the denoisers, auto, fp32, bf16 or fp16.
        batch: pictures drawn at once; if omitted, as in sample.

    Returns:
        The page.

    Raises:
        UserError: no run folder, a run without a student or with another teacher, or an unwritable place.
    """
    from fewstep.common.choices import check_device
    from fewstep.common.files import check_writable
    from fewstep.data.prompts import read_prompts

    check_device(device)
    check_positive("batch", batch)
    prompts = read_prompts(prompt_file, "prompt_file")
    check_seed(seed, len(prompts))
    page = Path(out)
    if page.suffix != ".html":
        raise UserError(f"out = {str(out)!r} must end in .html", field="out")
    named = [runs] if isinstance(runs, str) else runs
    if not named:
        raise UserError("runs is empty; give at least one run folder", field="runs")
    shown = [find_run(Path(run), steps, gamma) for run in named]
    for one in shown[1:]:
        if one.teacher.path != shown[0].teacher.path:
            own, first = str(one.teacher.path), str(shown[0].teacher.path)
            raise UserError(
                f"runs: the teacher of {one.name} is {own!r}, that of {shown[0].name} {first!r}; give runs of one",
                field="runs",
            )
    check_writable(page.absolute().parent)
    from fewstep.common.device import pick_compute_dtype, pick_device
    from fewstep.evaluation.run_report import write_run_report

    place = pick_device(device)
    dtype = pick_compute_dtype(precision, place)
    return write_run_report(page, shown, prompts, seed, device=place, precision=dtype, batch=batch)


def find_run(folder: Path, steps: int | None, gamma: float | None) -> Shown:
    """Return a run with its student and how that is drawn.

    Raises:
        UserError: no run folder, no student in it, or settings that the student cannot be sampled with.
    """
    from fewstep.backbones.pipeline_folder import read_folder
    from fewstep.backbones.teachers import read_teacher
    from fewstep.common.run_log import read_run
    from fewstep.evaluation.run_report import Shown
    from fewstep.students.resolve import resolve_student

    run = read_run(folder)
    if not run.students:
        raise UserError(f"runs: {str(folder)!r} has no student yet; wait for its first validation", field="runs")
    student, teacher = run.students[-1], read_teacher(run.teacher)
    whole = (student / "model_index.json").is_file()
    base = read_folder(student) if whole else teacher
    changes = {"steps": steps, "gamma": gamma}
    own = resolve_student(base, None if whole else student, {})
    changes = changes if own.sampling.sampler == "sss" else {"steps": steps}
    found = resolve_student(base, None if whole else student, changes)
    return Shown(run, teacher, base, found.lora, found.sampling, found.omega_seen)
