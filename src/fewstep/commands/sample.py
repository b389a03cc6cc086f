"""`fewstep sample`: draw pictures from prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fewstep.common.arguments import checked
from fewstep.common.errors import UserError


@checked
def sample(
    prompts: str | Sequence[str] = (),
    *,
    prompt_file: Path | str | None = None,
    lora: Path | str | None = "auto",
    style: Path | str | None = None,
    style_scale: float | None = None,
    teacher: Path | str = "",
    teacher_config: Path | str = "",
    steps: int | None = None,
    gamma: float | None = None,
    omega: float | None = None,
    guidance_scale: float | None = None,
    negative_prompt: str = "",
    width: int | None = None,
    height: int | None = None,
    sampler: str | None = None,
    seed: int = 0,
    count: int = 1,
    out: Path | str = "sample.png",
    format: str = "png",
    scale: int | None = None,
    device: str = "auto",
    precision: str = "fp32",
    compile: bool = False,
    batch: int | None = None,
    adapter: Path | str | None = None,
    image: Path | str | None = None,
    strength: float | None = None,
    settings: Mapping[str, Any] | str | Sequence[str] | None = None,
) -> Path:
    """Draw pictures from prompts, with the sampling settings stored in the student.

    Writes one picture, a grid of them with a row for each prompt, or a folder of numbered pictures. A PNG holds prompt,
    seed and settings; a folder's numbers go on after those that it holds.

    Example: fewstep sample "three frogs on yellow" --steps 4 --out frogs.png

    Example: fewstep sample "three frogs on yellow" --count 100 --out frogs/

    Example: fewstep sample "three frogs, noto style" --image frogs.png --strength 0.7 --out noto.png

    Args:
        prompts: text to draw, one or several.
        prompt_file: text file of further prompts, one a line.
        lora: student: a bundled student by name (tcd), a LoRA file or folder, or none for the teacher itself; auto is
            tcd for the bundled teacher and none for any other.
        style: LoRA beside the student's, such as train-style or another trainer wrote for the same teacher.
        style_scale: factor of the style; 1 if omitted.
        teacher: pipeline folder, single-file checkpoint or hub id; if omitted, the bundled teacher.
        teacher_config: pipeline folder with the configs of a single-file teacher.
        steps: network evaluations of a picture.
        gamma: stochasticity of sampler sss, 0 to 1.
        omega: guidance in the papers' convention, diffusers' guidance_scale less 1; 0 for students.
        guidance_scale: the same as diffusers counts it, omega + 1; up to 1 for none.
        negative_prompt: text to lead away from: by guidance, or without it in the network's cross-attention.
        width: pixels; if omitted, the student's or the trained size. A multiple of 8, or of 16 in some families.
        height: pixels, likewise.
        sampler: sss, lcm, ddim, euler, heun, dpm_2, dpmpp_2s or sde_dpmpp_2m.
        seed: seed of the first picture; each further picture adds 1.
        count: pictures of each prompt.
        out: picture file to write, .png, .jpg or .webp; any other name without a suffix, or a folder that exists, for
            numbered pictures.
        format: of numbered pictures, png, jpg or webp.
        scale: integer factor of enlargement; if omitted, small pictures are enlarged to 256 pixels, but not in
            folders.
        device: auto, cpu or cuda.
        precision: precision of the denoiser, auto, fp32, bf16 or fp16.
        compile: compile the denoiser; takes minutes, pays for many pictures.
        batch: pictures drawn at once; if omitted, 16 of 512 x 512 pixels, more of smaller ones, at most 64.
        adapter: folder that train-adapter wrote, for prompts in any of its languages.
        image: picture to start from, cropped and scaled, instead of noise.
        strength: share of the noisiest time that `image` is noised to, in (0, 1]; .5 if omitted. All steps are made
            below it.
        settings: other sampling setting, key=value, e.g. jump=second_order or size=256x192. May be repeated; in Python
            also a mapping.

    Returns:
        The picture file or folder.

    Raises:
        UserError: no prompt, a setting out of range, a LoRA, style or adapter of another base, an unwritable place, an
            unreadable picture, or a strength below which the grid has fewer times than steps.
    """
    from fewstep.backbones.teachers import read_teacher
    from fewstep.common.choices import check_choice, check_device
    from fewstep.common.files import check_writable
    from fewstep.data.images import read_picture
    from fewstep.data.prompts import read_prompts
    from fewstep.inference.image_grid import check_grid_size, check_picture_file, image_grid, save_image
    from fewstep.inference.picture_files import FORMATS, next_number, numbered, picture_settings, student_name
    from fewstep.students.lora_checks import check_lora
    from fewstep.students.resolve import check_negative, omega_given, resolve_student

    named = [prompts] if isinstance(prompts, str) else prompts
    texts = [*named, *(read_prompts(prompt_file, "prompt_file") if prompt_file else [])]
    if not texts or any(not prompt.strip() for prompt in texts):
        raise UserError('prompts is empty; give at least one, e.g. "three frogs on yellow"', field="prompts")
    path = Path(out)
    in_folder = path.is_dir() or not path.suffix or str(out).endswith("/")
    if not in_folder:
        check_picture_file(path)
    check_choice("format", format, FORMATS)
    for name, value in (("count", count), ("scale", scale), ("batch", batch)):
        check_positive(name, value)
    check_seed(seed, count * len(texts))
    omega = omega_given(omega, guidance_scale)
    if strength is not None and image is None:
        raise UserError(f"strength = {strength} has no effect without an image; give --image")
    check_device(device)
    folder = read_teacher(teacher, teacher_config)
    for name, side in (("width", width), ("height", height)):
        if side is not None:
            folder.check_size(name, (side, side))
    changes = sampling_changes(settings, steps=steps, gamma=gamma, omega=omega, sampler=sampler)
    student, sampling, _ = resolve_student(folder, lora, changes)
    beside = None if style is None else check_lora(style, folder)
    if style_scale is not None and beside is None:
        raise UserError(f"style_scale = {style_scale:g} has no effect without a style; give --style")
    size = sampling.size or (folder.picture_size, folder.picture_size)
    if width or height:
        size = (width or size[0], height or size[1])
        sampling = sampling.model_copy(update={"size": size})
    check_negative(negative_prompt, folder, sampling, compiled=compile)
    factor = scale or (1 if in_folder else max(1, 256 // size[0]))
    columns = count if len(texts) > 1 else min(count, 8)
    if not in_folder:
        check_grid_size(count * len(texts), size, columns, factor, path)
    begun = None if image is None else read_picture(Path(image), *size)
    if adapter is not None:
        from fewstep.inference.multilingual.record import read_adapter

        read_adapter(adapter, folder)
    check_writable(path if in_folder else path.parent)
    from fewstep.common import light_imports

    light_imports.import_libraries()
    from fewstep.common.device import pick_compute_dtype, pick_device

    place = pick_device(device)
    dtype = pick_compute_dtype(precision, place)
    import numpy as np

    from fewstep.backbones.lengths import print_cut_prompts
    from fewstep.backbones.scheduler_config import path_of
    from fewstep.backbones.teachers import teacher_name
    from fewstep.diffusion.draw_latents import Source, call_times
    from fewstep.inference.generator import load_image_generator

    share = 0.5 if strength is None else strength
    if begun is not None:  # refused before weights are loaded
        call_times(sampling, path_of(folder.noise), share)
    generator = load_image_generator(
        folder,
        student,
        place,
        adapter,
        dtype,
        compiled=compile,
        batch=batch,
        style=beside,
        style_scale=1.0 if style_scale is None else style_scale,
    )
    generator = replace(generator, negative=negative_prompt)
    if generator.adapter is None:
        print_cut_prompts(generator.backbone, texts)
    source = None if begun is None else Source(generator.backbone.to_latents(begun[None]), share)
    repeated = [prompt for prompt in texts for _ in range(count)]
    names = {"student": student_name(student.path) if student else "", "teacher": teacher_name(folder.path)}

    def text_of(number: int) -> Mapping[str, str]:
        return picture_settings(repeated[number], seed + number, sampling, size, negative=negative_prompt, **names)

    def drawn(numbers: range) -> np.ndarray:
        prompts = [repeated[number] for number in numbers]
        pictures: np.ndarray = generator.draw(prompts, [seed + number for number in numbers], sampling, source)
        return pictures

    if not in_folder:
        text = text_of(0) if len(repeated) == 1 else {}
        return save_image(image_grid(drawn(range(len(repeated))), columns, factor), path, text)
    first = next_number(path)
    at_once = len(repeated) if compile else AT_ONCE  # a compiled network has one batch size
    for start in range(0, len(repeated), at_once):  # written as they are drawn: a stopped command keeps them
        numbers = range(start, min(start + at_once, len(repeated)))
        for number, picture in zip(numbers, drawn(numbers)):
            save_image(image_grid(picture[None], 1, factor), numbered(path, first + number, format), text_of(number))
    return path


AT_ONCE = 64
"""Pictures of a folder that are drawn before they are written."""


def sampling_changes(settings: Mapping[str, Any] | str | Sequence[str] | None, **options: object) -> Mapping[str, Any]:
    """Return changes to the sampling settings: the options that are given, then `settings` over them."""
    from fewstep.common.config import parse_overrides
    from fewstep.diffusion.config import Sampling

    given = {key: value for key, value in options.items() if value is not None}
    return given | (dict(settings) if isinstance(settings, Mapping) else parse_overrides(settings or (), Sampling))


def check_positive(field: str, value: int | None) -> None:
    """Raise where a count is below 1; None is allowed."""
    if value is not None and value < 1:
        raise UserError(f"{field} = {value} must be at least 1")


def check_seed(seed: int, count: int) -> None:
    """Raise where the seeds of `count` pictures do not fit into 63 bits."""
    most = 2**63 - 1 - count
    if not 0 <= seed <= most:
        raise UserError(f"seed = {seed} must be {'at least 0' if seed < 0 else f'at most {most}'}")
