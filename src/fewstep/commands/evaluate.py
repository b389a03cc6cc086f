"""`fewstep evaluate`: draw one picture for each prompt and measure the set."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fewstep.commands.sample import check_positive, check_seed, sampling_changes
from fewstep.common.arguments import checked
from fewstep.common.errors import UserError
from fewstep.evaluation.limits import FD_ADVISED, KID_FEWEST, find_real

if TYPE_CHECKING:
    from fewstep.evaluation.metric import Figure


@checked
def evaluate(
    *,
    prompt_file: Path | str,
    lora: Path | str | None = "auto",
    teacher: Path | str = "",
    teacher_config: Path | str = "",
    real: Path | str | None = None,
    reference: Path | str | None = None,
    reference_omega: float | None = None,
    steps: int | None = None,
    gamma: float | None = None,
    omega: float | None = None,
    sampler: str | None = None,
    seed: int = 0,
    device: str = "auto",
    precision: str = "fp32",
    compile: bool = False,
    batch: int | None = None,
    out: Path | str = "runs/evaluation",
    settings: Mapping[str, Any] | str | Sequence[str] | None = None,
) -> Mapping[str, Figure]:
    """Measure a student or a teacher: FD, KID, detail, distance to the teacher.

    Draws one picture for each prompt. In the bundled world the prompts are checked too. The processes of a launch
    share the drawing; the main one measures and writes.

    Example: fewstep evaluate --prompt-file prompts.txt --lora runs/tcd/student --steps 4

    Args:
        prompt_file: text file, one prompt a line; FD needs at least 500.
        lora: student: a bundled student by name (tcd), a LoRA file or folder, or none for the teacher itself; auto is
            tcd for the bundled teacher and none for any other.
        teacher: pipeline folder, single-file checkpoint or hub id; if omitted, the bundled teacher.
        teacher_config: pipeline folder with the configs of a single-file teacher.
        real: folder of real pictures; if omitted, the bundled world's training split.
        reference: pipeline folder whose 50-step pictures from the same noise are compared with; if omitted, the teacher
            of a LoRA.
        reference_omega: guidance of the reference; if omitted, the mean that the student was trained with, or the
            reference's own.
        steps: network evaluations of a picture.
        gamma: stochasticity of sampler sss, 0 to 1.
        omega: guidance in the papers' convention, diffusers' guidance_scale less 1; 0 for students.
        sampler: sss, lcm, ddim, euler, heun, dpm_2, dpmpp_2s or sde_dpmpp_2m.
        seed: seed of the first picture, and of the bootstrap; each further picture adds 1.
        device: auto, cpu or cuda.
        precision: precision of the denoisers, the reference's too, auto, fp32, bf16 or fp16.
        compile: compile the denoisers; takes minutes, pays for many pictures.
        batch: pictures drawn at once; if omitted, as in sample.
        out: folder for figures.json.
        settings: other sampling setting, key=value, e.g. jump=second_order. May be repeated; in Python also a mapping.

    Returns:
        The figures by name; empty in all but the main process of a launch.

    Raises:
        UserError: anything wrong, before any long work.
    """
    from fewstep.backbones.checks import check_sampling
    from fewstep.backbones.pipeline_folder import read_folder
    from fewstep.backbones.teachers import read_teacher
    from fewstep.common.choices import check_device
    from fewstep.common.config import validate
    from fewstep.common.defaults import check_world_size
    from fewstep.common.extras import check_installed
    from fewstep.common.files import check_writable
    from fewstep.data.prompts import read_prompts
    from fewstep.diffusion.config import Sampling
    from fewstep.students.resolve import end_point_sampling, resolve_student

    check_device(device)
    check_positive("batch", batch)
    prompts = read_prompts(prompt_file, "prompt_file")
    if len(prompts) < KID_FEWEST:
        raise UserError(
            f"prompt_file holds {len(prompts)} prompts; KID needs at least {KID_FEWEST} pictures", field="prompt_file"
        )
    real_files = None if real is None else find_real(Path(real))
    check_seed(seed, 8 * len(prompts))
    folder = read_teacher(teacher, teacher_config)
    changes = sampling_changes(settings, steps=steps, gamma=gamma, omega=omega, sampler=sampler)
    chosen = resolve_student(folder, lora, changes)
    other = read_folder(reference, "reference") if reference else (folder if chosen.lora else None)
    base = other or folder
    size = chosen.sampling.size
    if size and size[0] != size[1]:
        raise UserError(f"size = {list(size)} must be square in evaluations; use {size[0]}")
    width, seen = size[0] if size else folder.picture_size, size[0] if size else base.picture_size
    if seen != width:
        raise UserError(
            f"reference = {str(base.path)!r} draws {seen} pixels a side, the student {width}; use its teacher"
        )
    if real is None:
        check_world_size(width, "real")
    own = end_point_sampling(base)
    guidance = reference_omega if reference_omega is not None else chosen.omega_seen
    drawn = validate(Sampling, own.model_dump() | {"size": size} | ({} if guidance is None else {"omega": guidance}))
    check_sampling(drawn, base)
    check_writable(Path(out))
    check_installed("evaluate")
    from fewstep.common.device import pick_compute_dtype, pick_device

    place = pick_device(device)
    dtype = pick_compute_dtype(precision, place)
    from fewstep.common.accelerator import make_accelerator
    from fewstep.evaluation.run import evaluate_generator
    from fewstep.inference.generator import load_image_generator

    where = make_accelerator("fp32", place).device
    load = partial(load_image_generator, device=where, precision=dtype, compiled=compile, batch=batch)
    return evaluate_generator(
        load(folder, chosen.lora),
        prompts,
        name=chosen.lora.path.stem if chosen.lora else folder.path.name,
        real=real_files,
        sampling=chosen.sampling,
        reference=(load(other), drawn) if other else None,
        seed=seed,
        out=Path(out),
    )


def figure_lines(figures: Mapping[str, Figure]) -> Iterator[str]:
    """Yield a line for each figure: interval, n and floor (what real pictures get, or the teacher itself)."""
    for name, figure in figures.items():
        interval = f" [{figure.low:.4g}, {figure.high:.4g}]" if figure.low is not None else ""
        whose = "the teacher's own" if figure.is_of("quality", "teacher") else "real pictures"
        floor = f", {whose} {figure.floor:.4g}" if figure.floor is not None else ""
        yield f"{name}: {figure.value:.4g}{interval} (n = {figure.n}{floor})"


def report(figures: Mapping[str, Figure], arguments: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines that `evaluate` prints: the figures, why some are missing, and the file."""
    if not figures:  # another process of this launch has them
        return
    yield from figure_lines(figures)
    fd = figures.get("FD-Lite0")
    if fd is None:
        yield "FD-Lite0: omitted, biased below 500 pictures on either side"
    elif fd.n < FD_ADVISED:
        yield f"FD-Lite0: biased below {FD_ADVISED} pictures; compare it at equal numbers only"
    if arguments["real"] is not None:
        yield "prompt metrics: omitted, they are for the bundled world's pictures"
    if all(figure.floor is None or figure.is_of("quality", "teacher") for figure in figures.values()):
        yield "floors: omitted, they need more than twice as many real pictures as there are prompts"
    yield f"wrote {Path(arguments['out']) / 'figures.json'}"
