"""Draw pictures from prompts."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fewstep.backbones.teachers import named_teacher
from fewstep.common.arguments import checked
from fewstep.common.errors import UserError


@checked
def sample(
    prompts: str | Sequence[str],
    *,
    out: Path | str,
    prompt_file: Path | str | None = None,
    lora: Path | str | None = "auto",
    teacher: Path | str = "",
    seed: int = 0,
    count: int = 1,
    scale: int | None = None,
    device: str = "auto",
    settings: Mapping[str, Any] | None = None,
    adapter: Path | str | None = None,
    teacher_config: Path | str = "",
    image: Path | str | None = None,
    strength: float | None = None,
    precision: str = "fp32",
    compile: bool = False,
    batch: int | None = None,
) -> Path:
    """Draw `count` pictures a prompt into one file: a picture, or a sheet with a row a prompt.

    Args:
        prompts: what to draw, one prompt or several.
        out: picture file to write, .png or .webp.
        prompt_file: further prompts, one a line.
        lora: `tcd` for the bundled student, a LoRA file or folder, None for the teacher itself; `auto` is
            `tcd` for the bundled teacher and None for another.
        teacher: pipeline folder, single-file checkpoint or hub id; empty for the bundled one.
        seed: of the first picture; the others count up.
        count: pictures a prompt.
        scale: whole factor by which pictures are enlarged; None for the one that makes them 256 pixels wide, 1 for
            larger ones.
        device: auto, cpu or cuda.
        settings: changes to the sampling settings that the student brings along (None values are ignored).
        adapter: folder that `train_adapter` wrote: prompts may then be of any of its languages.
        teacher_config: for a single-file teacher, a pipeline folder of its kind.
        image: picture to begin from, cropped and scaled to what is drawn.
        strength: share of the noisiest time that it is noised to, in (0, 1]; None for .5. All steps are made below it.
        precision: fp32, bf16, fp16 or auto; what the denoiser is kept and computes in.
        compile: compile the denoiser; worth its minutes where many pictures are drawn.
        batch: pictures drawn at once; None for 16 of 512 x 512 pixels, as many more or fewer of others, at most 64.

    Raises:
        UserError: no prompt, a setting out of range, a LoRA or adapter of another base, an unwritable place, a
            picture that cannot be read, a strength below which the grid has fewer times than steps.
    """
    from fewstep.backbones.pipeline_folder import read_folder
    from fewstep.backbones.teachers import teacher_path
    from fewstep.common.choices import check_device
    from fewstep.common.files import check_writable
    from fewstep.data.images import read_cropped
    from fewstep.data.prompts import read_prompts
    from fewstep.inference.image_grid import check_grid_size, image_grid, save_image
    from fewstep.students.resolve import resolve_student

    named = [prompts] if isinstance(prompts, str) else prompts
    wanted = [*named, *(read_prompts(prompt_file, "prompt_file") if prompt_file else [])]
    if not wanted or any(not prompt.strip() for prompt in wanted):
        raise UserError('prompts is empty; give at least one, e.g. "a doggy, fluent 3d style"')
    path = Path(out)
    if path.suffix.lower() not in (".png", ".webp"):
        raise UserError(f"out = {str(path)!r} must end in .png or .webp; the nearest is {path.stem + '.png'!r}")
    if path.is_dir():
        raise UserError(f"out = {str(path)!r} is a folder; the nearest file is {str(path / 'sample.png')!r}")
    for name, value in (("count", count), ("scale", scale), ("batch", batch)):
        if value is not None and value < 1:
            raise UserError(f"{name} = {value} must be at least 1; the nearest legal one is 1")
    _check_seed(seed, count * len(wanted))
    if strength is not None and image is None:
        raise UserError(f"strength = {strength} says nothing without an image; name one, or leave it out")
    check_device(device)
    folder = read_folder(teacher_path(named_teacher(teacher, teacher_config)))
    student, sampling, _ = resolve_student(folder, lora, settings or {})
    width, height = sampling.size or (folder.picture_size, folder.picture_size)
    enlarged = scale or max(1, 256 // width)
    columns = count if len(wanted) > 1 else min(count, 8)
    check_grid_size(count * len(wanted), (width, height), columns, enlarged, path)
    begun = None if image is None else read_cropped(Path(image), width, height)
    if adapter is not None:
        from fewstep.inference.multilingual.record import read_adapter

        read_adapter(adapter, folder)
    check_writable(path.parent)
    from fewstep.common.device import pick_compute_dtype, pick_device

    place = pick_device(device)
    computes = pick_compute_dtype(precision, place)
    import numpy as np

    from fewstep.backbones.lengths import tell_cut
    from fewstep.backbones.scheduler_config import path_of
    from fewstep.diffusion.draw_latents import Source, call_times
    from fewstep.inference.generator import load_image_generator

    share = 0.5 if strength is None else strength
    if begun is not None:  # refused before weights are loaded
        call_times(sampling, path_of(folder.noise), share)
    image_generator = load_image_generator(
        folder.path, student, place, adapter, computes, compiled=compile, batch=batch
    )
    if image_generator.adapter is not None:
        for prompt, (caption, likeness) in zip(wanted, image_generator.adapter.readings(wanted), strict=True):
            print(f"{prompt!r} is read as {caption!r}, likeness {likeness:.2f}", file=sys.stderr)
    else:
        tell_cut(image_generator.backbone, wanted)
    source = None if begun is None else Source(image_generator.backbone.to_latents(begun[None]), share)
    every = [prompt for prompt in wanted for _ in range(count)]
    pictures: np.ndarray = image_generator.draw(every, range(seed, seed + len(every)), sampling, source)
    return save_image(image_grid(pictures, columns, enlarged), path)


def _check_seed(seed: int, count: int) -> None:
    if not 0 <= seed <= 2**63 - 1 - count:
        legal = 0 if seed < 0 else 2**63 - 1 - count
        raise UserError(f"seed = {seed} is out of range; the nearest legal one is {legal}")
