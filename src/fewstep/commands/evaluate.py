"""`fewstep evaluate`: draw one picture for each prompt and measure the set."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from fewstep.commands.sample import check_positive, check_seed, sampling_changes
from fewstep.commands.summary import table
from fewstep.common.arguments import checked
from fewstep.common.errors import UserError
from fewstep.evaluation.limits import FD_ADVISED, KID_FEWEST, find_real

if TYPE_CHECKING:
    from fewstep.evaluation.metric import Figure
    from fewstep.evaluation.standard.registry import Chosen

T = TypeVar("T")


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
    suite: str | None = None,
    metrics: str | Sequence[str] = (),
    weights: Path | str | None = None,
    skip_unavailable: bool = False,
    split: str = "",
    steps: int | Sequence[int] | None = None,
    gamma: float | Sequence[float] | None = None,
    omega: float | None = None,
    guidance_scale: float | None = None,
    sampler: str | None = None,
    seed: int = 0,
    device: str = "auto",
    precision: str = "fp32",
    compile: bool = False,
    batch: int | None = None,
    out: Path | str = "runs/evaluation",
    settings: Mapping[str, Any] | str | Sequence[str] | None = None,
) -> Mapping[str, Figure] | Mapping[str, Mapping[str, Figure]]:
    """Measure a student or a teacher: FD, KID, detail, distance to the teacher, or the metrics that papers print.

    Draws one picture for each prompt. In the bundled world the prompts are checked too. The processes of a launch
    share the drawing; the main one measures and writes. Several steps or gammas give a table and curves.

    Example: fewstep evaluate --prompt-file prompts.txt --lora runs/tcd/student --steps 4

    Example: fewstep evaluate --prompt-file coco.txt --real coco --suite tcd --lora student --teacher sdxl --steps 2 4 8

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
        suite: columns of a paper's table, tcd, tlcm or sdxl, in place of the usual metrics.
        metrics: further standard metrics, such as fid, fid_teacher or clip:FOLDER; docs/guide/metrics.md lists them.
        weights: folder of the networks' folders; if omitted, weights in the cache, then the hub.
        skip_unavailable: leave metrics out whose weights are missing, or for which pictures are too few or too small;
            name each and its remedy, in place of refusing.
        split: name of the prompts and real pictures for the record, such as coco2017-val; if omitted, the files' names.
        steps: network evaluations of a picture, one or several.
        gamma: stochasticity of sampler sss, 0 to 1, one or several.
        omega: guidance in the papers' convention, diffusers' guidance_scale less 1; 0 for students.
        guidance_scale: the same as diffusers counts it, omega + 1; up to 1 for none.
        sampler: sss, lcm, ddim, euler, heun, dpm_2, dpmpp_2s or sde_dpmpp_2m.
        seed: seed of the first picture, and of the bootstrap; each further picture adds 1.
        device: auto, cpu or cuda.
        precision: precision of the denoisers, the reference's too, auto, fp32, bf16 or fp16.
        compile: compile the denoisers; takes minutes, pays for many pictures.
        batch: pictures drawn at once; if omitted, as in sample.
        out: folder for figures.json, and for table.md and curves.png.
        settings: other sampling setting, key=value, e.g. jump=second_order. May be repeated; in Python also a mapping.

    Returns:
        The figures by name, of several settings by setting and name; empty in all but the main process of a launch.

    Raises:
        UserError: anything wrong, before any long work.
    """
    from fewstep.backbones.checks import check_sampling
    from fewstep.backbones.pipeline_folder import read_folder
    from fewstep.backbones.teachers import read_teacher
    from fewstep.common.choices import check_device
    from fewstep.common.config import validate
    from fewstep.common.defaults import check_world_size
    from fewstep.common.files import check_writable
    from fewstep.data.prompts import read_prompts
    from fewstep.diffusion.config import Sampling
    from fewstep.evaluation.standard.registry import choose
    from fewstep.students.resolve import end_point_sampling, omega_given, resolve_student

    check_device(device)
    check_positive("batch", batch)
    omega = omega_given(omega, guidance_scale)
    prompts = read_prompts(prompt_file, "prompt_file")
    names, folders = [metrics] if isinstance(metrics, str) else metrics, Path(weights) if weights else None
    chosen = choose(suite, names, folders, skip_unavailable=skip_unavailable)
    real_files = None if real is None else find_real(Path(real))
    if not chosen:
        check_count(len(prompts), KID_FEWEST, "KID")
    check_seed(seed, 8 * len(prompts))
    folder = read_teacher(teacher, teacher_config)
    students = [
        resolve_student(folder, lora, sampling_changes(settings, steps=n, gamma=g, omega=omega, sampler=sampler))
        for n, g in product(several(steps), several(gamma))
    ]
    student = students[0]
    other = read_folder(reference, "reference") if reference else (folder if student.lora else None)
    base = other or folder
    size = student.sampling.size
    if size and size[0] != size[1]:
        raise UserError(f"size = {list(size)} must be square in evaluations; use {size[0]}")
    width, seen = size[0] if size else folder.picture_size, size[0] if size else base.picture_size
    if seen != width:
        raise UserError(
            f"reference = {str(base.path)!r} draws {seen} pixels a side, the student {width}; use its teacher"
        )
    many = len(prompts), None if real_files is None else len(real_files)
    fits = partial(check_chosen, many=many, side=width, teacher=other is not None)
    chosen = available(chosen, fits, skip_unavailable)
    if real is None and (not chosen or any(each.to_real for each in chosen)):
        check_world_size(width, "real")
    own = end_point_sampling(base)
    guidance = reference_omega if reference_omega is not None else student.omega_seen
    drawn = validate(Sampling, own.model_dump() | {"size": size} | ({} if guidance is None else {"omega": guidance}))
    check_sampling(drawn, base)
    check_writable(Path(out))
    check_packages(chosen, real is None, len(students) > 1)
    from fewstep.common import light_imports

    light_imports.import_libraries()
    from fewstep.common.device import pick_compute_dtype, pick_device

    place = pick_device(device)
    dtype = pick_compute_dtype(precision, place)
    from fewstep.common.accelerator import make_accelerator
    from fewstep.evaluation.run import evaluate_generator
    from fewstep.inference.generator import load_image_generator

    where = make_accelerator("fp32", place).device
    load = partial(load_image_generator, device=where, precision=dtype, compiled=compile, batch=batch)
    drawn_too = other is not None and (not chosen or any(each.to_teacher for each in chosen))
    rows = evaluate_generator(
        load(folder, student.lora),
        prompts,
        name=student.lora.path.stem if student.lora else folder.path.name,
        real=real_files,
        samplings=[each.sampling for each in students],
        reference=(load(other), drawn) if other and drawn_too else None,
        seed=seed,
        out=Path(out),
        chosen=chosen,
        split=split or " and ".join([Path(prompt_file).name, *([Path(real).name] if real else [])]),
    )
    return rows if len(students) > 1 else next(iter(rows.values()), {})


def several(value: T | Sequence[T] | None) -> Sequence[T | None]:
    """Return one setting, or several, as a sequence; None for the student's own."""
    return value if isinstance(value, Sequence) and not isinstance(value, str) and value else [value]  # type: ignore[list-item]


def check_count(prompts: int, fewest: int, name: str) -> None:
    """Refuse fewer prompts than a metric needs pictures."""
    if prompts < fewest:
        raise UserError(
            f"prompt_file holds {prompts} prompts; {name} needs at least {fewest} pictures", field="prompt_file"
        )


def check_chosen(each: Chosen, *, many: tuple[int, int | None], side: int, teacher: bool) -> None:
    """Refuse a metric of too few or too small pictures, of a teacher where there is none, or without its packages.

    Args:
        many: prompts, and real pictures of a folder.
        side: of the pictures, in pixels.
    """
    from fewstep.common.extras import INCEPTION_PACKAGES, check_installed
    from fewstep.evaluation.standard.registry import TEACHER

    prompts, real = many
    check_count(prompts, each.metric.fewest, each.name)
    if real is not None and each.to_real and real < each.metric.fewest:
        raise UserError(f"real holds {real} pictures; {each.name} needs at least {each.metric.fewest}", field="real")
    if side < each.metric.smallest:
        raise UserError(
            f"metrics = {each.name!r} needs pictures of {each.metric.smallest} pixels a side, not {side}; use 'fid'"
        )
    if each.to_teacher and not teacher:
        raise UserError(f"metrics = {each.name + TEACHER!r} compares with a teacher; give --lora or --reference")
    if "inception" in each.models:
        check_installed("FID", INCEPTION_PACKAGES, "fidelity")


def available(chosen: Sequence[Chosen], check: Callable[[Chosen], None], skip: bool) -> list[Chosen]:
    """Return the metrics that pass a check; print a line for each other one, or raise its error if none is skipped."""
    from fewstep.common.messages import logger

    kept = []
    for place, each in enumerate(chosen, 1):
        try:
            check(each)
            kept.append(each)
        except UserError as error:
            if not skip or (place == len(chosen) and not kept):
                raise
            logger.info("left out %s: %s", each.column.metric, error)
    return kept


def check_packages(chosen: Sequence[Chosen], bundled: bool, sweep: bool) -> None:
    """Refuse metrics, and curves, whose packages are not installed."""
    from fewstep.common.extras import check_installed

    if not chosen or (bundled and any(each.to_real for each in chosen)):
        check_installed("evaluate")
    elif sweep:
        check_installed("curves", ("matplotlib",))


def figure_table(figures: Mapping[str, Figure]) -> str:
    """Return a table of figures: interval, n and floor (what real pictures get, or the teacher itself)."""
    rows = []
    for name, figure in figures.items():
        interval = f"{figure.low:.4g} to {figure.high:.4g}" if figure.low is not None else ""
        whose = "the teacher's own" if figure.is_of("quality", "teacher") else "real pictures"
        floor = f"{whose} {figure.floor:.4g}" if figure.floor is not None else ""
        rows.append((name, f"{figure.value:.4g}", interval, f"{figure.n}", floor))
    return table(("figure", "value", "95 % interval", "n", "floor"), rows)


def report(found: Mapping[str, Any], arguments: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines that `evaluate` prints: the figures, why some are missing, and the file."""
    if not found:  # another process of this launch has them
        return
    out = Path(arguments["out"])
    several_settings = any(isinstance(value, Mapping) for value in found.values())
    if several_settings or arguments["suite"] or arguments["metrics"]:
        from fewstep.evaluation.sweep import TABLE

        yield (out / TABLE).read_text(encoding="utf-8").rstrip()
    else:
        yield from usual_report(found, arguments)
    yield f"wrote {out / 'figures.json'}"


def usual_report(figures: Mapping[str, Figure], arguments: Mapping[str, Any]) -> Iterator[str]:
    """Yield the figures of the usual metrics in one setting, and why some are missing."""
    yield figure_table(figures)
    fd = figures.get("FD-Lite0")
    if fd is None:
        yield "FD-Lite0: omitted, biased below 500 pictures on either side"
    elif fd.n < FD_ADVISED:
        yield f"FD-Lite0: biased below {FD_ADVISED} pictures; compare it at equal numbers only"
    if arguments["real"] is not None:
        yield "prompt metrics: omitted, they are for the bundled world's pictures"
    if all(figure.floor is None or figure.is_of("quality", "teacher") for figure in figures.values()):
        yield "floors: omitted, they need more than twice as many real pictures as there are prompts"
