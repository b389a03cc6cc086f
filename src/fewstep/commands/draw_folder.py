"""`fewstep draw-folder`: the pictures of GenEval, GenEval 2 or DPG-Bench, in the folder that its program reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fewstep.commands.sample import check_positive, check_seed, sampling_changes
from fewstep.common.arguments import checked

AT_ONCE = 16
"""Prompts whose pictures are drawn before they are written."""


@checked
def draw_folder(
    layout: str,
    prompts: Path | str,
    *,
    lora: Path | str | None = "auto",
    teacher: Path | str = "",
    teacher_config: Path | str = "",
    steps: int | None = None,
    gamma: float | None = None,
    omega: float | None = None,
    guidance_scale: float | None = None,
    sampler: str | None = None,
    seed: int = 0,
    out: Path | str = "",
    device: str = "auto",
    precision: str = "fp32",
    compile: bool = False,
    batch: int | None = None,
    settings: Mapping[str, Any] | str | Sequence[str] | None = None,
) -> Path:
    """Draw the pictures of GenEval, GenEval 2 or DPG-Bench, in the folder that its own program reads.

    Pictures that are there are kept, so that the same command goes on after a stop. settings.json beside the pictures
    records teacher, student and sampling.

    Example: fewstep draw-folder geneval evaluation_metadata.jsonl --lora runs/tcd/student --teacher sdxl

    Args:
        layout: geneval, geneval2 or dpg.
        prompts: the benchmark's own file or folder of prompts.
        lora: student: a bundled student by name (tcd), a LoRA file or folder, or none for the teacher itself; auto is
            tcd for the bundled teacher and none for any other.
        teacher: pipeline folder, single-file checkpoint or hub id; if omitted, the bundled teacher.
        teacher_config: pipeline folder with the configs of a single-file teacher.
        steps: network evaluations of a picture.
        gamma: stochasticity of sampler sss, 0 to 1.
        omega: guidance in the papers' convention, diffusers' guidance_scale less 1; 0 for students.
        guidance_scale: the same as diffusers counts it, omega + 1; up to 1 for none.
        sampler: sss, lcm, ddim, euler, heun, dpm_2, dpmpp_2s or sde_dpmpp_2m.
        seed: seed of the first picture; each further picture adds 1.
        out: folder; if omitted, runs/ and the layout's name.
        device: auto, cpu or cuda.
        precision: precision of the denoiser, auto, fp32, bf16 or fp16.
        compile: compile the denoiser; takes minutes, pays for many pictures.
        batch: pictures drawn at once; if omitted, as in sample.
        settings: other sampling setting, key=value, e.g. size=512. May be repeated; in Python also a mapping.

    Returns:
        The folder of pictures.

    Raises:
        UserError: an unknown layout, prompts of another one, anything wrong with the student, or pictures in `out` that
            were drawn with other settings.
    """
    from fewstep.backbones.teachers import read_teacher
    from fewstep.common.choices import check_choice, check_device
    from fewstep.common.files import check_writable
    from fewstep.evaluation.layouts import LAYOUTS
    from fewstep.students.resolve import omega_given, resolve_student

    check_choice("layout", layout, LAYOUTS)
    check_device(device)
    check_positive("batch", batch)
    scale = omega_given(omega, guidance_scale)
    kind = LAYOUTS[layout]
    items = kind.read(Path(prompts))
    check_seed(seed, kind.count * len(items))
    base = read_teacher(teacher, teacher_config)
    changes = sampling_changes(settings, steps=steps, gamma=gamma, omega=scale, sampler=sampler)
    student, sampling, _ = resolve_student(base, lora, changes)
    folder = Path(out or f"runs/{layout}") / "pictures"
    check_writable(folder)
    record = {
        "layout": layout,
        "teacher": str(base.path),
        "student": str(student.file) if student else None,
        "sampling": sampling.model_dump(mode="json"),
        "seed": seed,
        "prompts": len(items),
    }
    check_record(folder.parent / "settings.json", record)
    left = [number for number, item in enumerate(items) if not kind.is_written(folder, item)]
    from fewstep.common.accelerator import make_accelerator
    from fewstep.common.device import pick_compute_dtype, pick_device
    from fewstep.common.distributed import is_main
    from fewstep.inference.generator import load_image_generator

    place = pick_device(device)
    dtype = pick_compute_dtype(precision, place)
    where = make_accelerator("fp32", place).device
    generator = load_image_generator(base, student, where, precision=dtype, compiled=compile, batch=batch)
    for start in range(0, len(left), AT_ONCE):
        some = left[start : start + AT_ONCE]
        seeds = [seed + number * kind.count + k for number in some for k in range(kind.count)]
        pictures = generator.draw([items[n].prompt for n in some for _ in range(kind.count)], seeds, sampling)
        for row, number in enumerate(some if is_main() else ()):
            kind.write(folder, items[number], pictures[row * kind.count : (row + 1) * kind.count])
    if is_main():
        kind.finish(folder, items)
    return folder


def check_record(file: Path, record: Mapping[str, Any]) -> None:
    """Write what the pictures are drawn with, or compare it with that of pictures that are there.

    Raises:
        UserError: they were drawn with other settings.
    """
    from fewstep.common.errors import UserError
    from fewstep.common.files import read_mapping, write_json

    if not file.is_file():
        write_json(file, record)
        return
    own = read_mapping(file)
    other = next((key for key, value in record.items() if own.get(key) != value), None)
    if other:
        raise UserError(
            f"out = {str(file.parent)!r} holds pictures with {other} = {own.get(other)}, not {record[other]}; "
            "give another folder"
        )
