"""Draw one picture a prompt and measure the set."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fewstep.backbones.teachers import named_teacher
from fewstep.commands.sample import _check_seed
from fewstep.common.arguments import checked
from fewstep.common.config import validate
from fewstep.common.defaults import check_world_size
from fewstep.common.errors import UserError
from fewstep.common.extras import check_installed

if TYPE_CHECKING:
    from fewstep.evaluation.metric import Figure


@checked
def evaluate(
    *,
    prompt_file: Path | str,
    out: Path | str,
    lora: Path | str | None = "auto",
    teacher: Path | str = "",
    real: Path | str | None = None,
    reference: Path | str | None = None,
    reference_omega: float | None = None,
    seed: int = 0,
    device: str = "auto",
    settings: Mapping[str, Any] | None = None,
    teacher_config: Path | str = "",
    precision: str = "fp32",
    compile: bool = False,
    batch: int | None = None,
) -> Mapping[str, Figure]:
    """Draw one picture a prompt and measure them; returns the figures by name and writes figures.json.

    The processes of a launch share the drawing out; the main one measures and writes, the others return nothing.

    Args:
        prompt_file: one prompt a line; FD needs at least 500.
        out: folder for figures.json.
        lora: a bundled student, a LoRA file or folder, None for the pipeline itself, or `auto` as in `sample`.
        teacher: pipeline folder, single-file checkpoint or hub id; empty for the bundled one.
        real: folder of real pictures; None for Emoji-8's training split.
        reference: pipeline folder whose 50-step pictures from the same noise are compared with; None for the
            teacher that a LoRA stands on.
        reference_omega: its guidance; None for the mean that the student was trained with, or what it brings along.
        seed: seed of the first picture, and of the bootstrap.
        device: auto, cpu or cuda.
        settings: changes to the sampling settings.
        teacher_config: for a single-file teacher, a pipeline folder of its kind.
        precision: fp32, bf16, fp16 or auto; what the denoisers, the reference's too, are kept and compute in.
        compile: compile them.
        batch: pictures drawn at once; None as in `sample`.

    Raises:
        UserError: anything wrong, in one line, before any long work.
    """
    from fewstep.backbones.checks import check_sampling
    from fewstep.backbones.pipeline_folder import read_folder
    from fewstep.backbones.teachers import teacher_path
    from fewstep.common.choices import check_device
    from fewstep.common.files import check_writable
    from fewstep.data.prompts import read_prompts
    from fewstep.diffusion.config import Sampling
    from fewstep.evaluation.limits import KID_FEWEST, find_real
    from fewstep.students.resolve import resolve_student
    from fewstep.students.sampling import end_point_sampling

    check_device(device)
    if batch is not None and batch < 1:
        raise UserError(f"batch = {batch} must be at least 1; the nearest legal one is 1")
    prompts = read_prompts(prompt_file, "prompt_file")
    if len(prompts) < KID_FEWEST:
        raise UserError(f"prompt_file holds {len(prompts)} prompts; KID needs at least {KID_FEWEST} pictures")
    files = find_real(Path(real)) if real is not None else None
    _check_seed(seed, 8 * len(prompts))
    folder = read_folder(teacher_path(named_teacher(teacher, teacher_config)))
    chosen = resolve_student(folder, lora, settings or {})
    other = Path(reference) if reference else (folder.path if chosen.lora else None)
    base = read_folder(other, "reference") if other else folder
    asked = chosen.sampling.size
    if asked and asked[0] != asked[1]:
        raise UserError(f"size = {list(asked)} is no square, as measured pictures are; the nearest is {[asked[0]] * 2}")
    size, seen = asked[0] if asked else folder.picture_size, asked[0] if asked else base.picture_size
    if seen != size:
        raise UserError(
            f"reference = {str(other)!r} draws {seen} pixels a side, not {size}; the nearest is the student's teacher"
        )
    if real is None:
        check_world_size(size, "real")
    own = end_point_sampling(base.path)
    omega = reference_omega if reference_omega is not None else chosen.omega_seen
    drawn = validate(Sampling, own.model_dump() | {"size": asked} | ({} if omega is None else {"omega": omega}))
    check_sampling(drawn, base)
    check_writable(Path(out))
    check_installed("evaluate")
    from fewstep.common.device import pick_compute_dtype, pick_device

    place = pick_device(device)
    computes = pick_compute_dtype(precision, place)
    from fewstep.common.accelerator import make_accelerator
    from fewstep.evaluation import run as measuring

    return measuring.evaluate_folder(
        folder.path,
        prompts,
        lora=chosen.lora,
        real=files,
        sampling=chosen.sampling,
        reference=other,
        reference_sampling=drawn,
        seed=seed,
        device=make_accelerator("fp32", place).device,
        precision=computes,
        compiled=compile,
        batch=batch,
        out=Path(out),
    )
