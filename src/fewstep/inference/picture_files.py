"""Picture files with their settings inside, and folders of numbered pictures."""

from __future__ import annotations

import json
import re
from importlib import metadata
from pathlib import Path
from typing import Any

from PIL import Image

from fewstep.common.errors import UserError
from fewstep.diffusion.config import Sampling
from fewstep.students.lora_file import FILE

FORMATS = ("png", "jpg", "webp")
"""Suffixes of pictures that are written."""
SAMPLER_NAMES = {"sss": "TCD", "lcm": "LCM", "ddim": "DDIM", "euler": "Euler", "heun": "Heun", "dpm_2": "DPM2"}
"""Names of samplers in web interfaces of Stable Diffusion; others as they are."""


def student_name(path: Path) -> str:
    """Return a student's name without its location: of the file, or of the run that a folder `student` is of."""
    place = path.absolute()
    named = place.parent if place.name in ("student", "best", FILE) else place
    named = named.parent if named.name in ("student", "best") else named
    return named.stem if named.suffix == ".safetensors" else named.name


def picture_settings(
    prompt: str,
    seed: int,
    sampling: Sampling,
    size: tuple[int, int],
    *,
    negative: str = "",
    student: str = "",
    teacher: str = "",
) -> dict[str, str]:
    """Return the text entries of a picture's PNG.

    Args:
        size: (width, height) in pixels, before enlargement.
        negative: prompt of the unconditional branch.
        student, teacher: names, without their folders.

    Returns:
        fewstep: JSON with all of it, the sampling settings whole. parameters: as Stable Diffusion's web interfaces
            (A1111, Forge) write and read it.
    """
    record: dict[str, Any] = {"prompt": prompt, **({"negative_prompt": negative} if negative else {}), "seed": seed}
    record |= {"student": student, "teacher": teacher, "size": list(size), "version": metadata.version("fewstep")}
    pairs = {
        "Steps": sampling.steps,
        "Sampler": SAMPLER_NAMES.get(sampling.sampler, sampling.sampler),
        "CFG scale": f"{1 + sampling.omega:g}",
        "Seed": seed,
        "Size": f"{size[0]}x{size[1]}",
        **({"Gamma": f"{sampling.gamma:g}"} if sampling.sampler == "sss" else {}),
        **({"Model": teacher} if teacher else {}),
        **({"Lora": student} if student else {}),
    }
    lines = [prompt, *([f"Negative prompt: {negative}"] if negative else [])]
    lines.append(", ".join(f"{name}: {value}" for name, value in pairs.items()))
    whole = json.dumps(record | {"sampling": sampling.model_dump(mode="json")}, ensure_ascii=False)
    return {"parameters": "\n".join(lines), "fewstep": whole}


def read_settings(path: Path) -> dict[str, Any]:
    """Return the settings inside a PNG that `picture_settings` are in.

    Raises:
        UserError: it has none.
    """
    with Image.open(path) as picture:
        text = getattr(picture, "text", {}).get("fewstep")
    if text is None:
        raise UserError(f"{path} has no settings inside; choose a PNG that fewstep wrote")
    return dict(json.loads(text))


def next_number(folder: Path) -> int:
    """Return the number of the next picture of a folder: 1 more than the largest there."""
    names = [path.stem for path in folder.iterdir()] if folder.is_dir() else []
    return 1 + max((int(name) for name in names if re.fullmatch(r"\d{5,}", name)), default=0)


def numbered(folder: Path, number: int, kind: str) -> Path:
    """Return the file of a picture in a folder: 00001.png, 00002.png, ..."""
    return folder / f"{number:05d}.{kind}"
