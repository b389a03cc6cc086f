"""`fewstep init`: write the settings of a known model for a GPU's memory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fewstep.common.arguments import checked
from fewstep.common.errors import UserError


@checked
def init(
    *,
    model: str,
    memory: int = 24,
    pictures: Path | str | None = None,
    prompt_file: Path | str | None = None,
    teacher: Path | str = "",
    out: Path | str = "distill.yaml",
) -> Path:
    """Write a commented YAML file for `distill --config`: from a checkpoint to a LoRA for 4 steps.

    The settings are those that fit into the GPU's memory, on paper. The file's head has the commands to run.

    Example: fewstep init --model sdxl --memory 24 --teacher PIPELINE --pictures pictures/

    Args:
        model: kind of the checkpoint, sd15, sdxl, sd3 or flux.
        memory: of the GPU in GB, such as 8, 12, 16, 24, 48 or 80.
        pictures: folder of captioned pictures, or webdataset shards, to learn from.
        prompt_file: text file, one prompt a line, in their place.
        teacher: your checkpoint: pipeline folder, single-file checkpoint or hub id; if omitted, the model's own.
        out: new file.

    Returns:
        The file.

    Raises:
        UserError: an unknown model, a memory that no settings fit into, pictures and prompts together, or a file that
            exists.
    """
    from fewstep.common.choices import check_choice
    from fewstep.common.files import atomic_write
    from fewstep.distillation.preset_file import Names, preset_yaml
    from fewstep.distillation.presets import MEMORY, MODELS, choose

    check_choice("model", model.lower(), list(MODELS))
    known, place = MODELS[model.lower()], Path(out)
    if pictures is not None and prompt_file is not None:
        raise UserError(f"prompt_file = {str(prompt_file)!r} is for learning without pictures; remove one of them")
    if place.exists():
        raise UserError(f"out = {str(place)!r} exists and would be lost; give a new file")
    learned = prompt_file is None
    plan = choose(known, memory, learned)
    if plan is None:
        least = next((size for size in MEMORY if size > memory and choose(known, size, learned)), None)
        remedy = f"use memory = {least}" if least else "no listed memory does"
        raise UserError(f"memory = {memory} GB does not hold {known.name}, on paper; {remedy}", field="memory")
    data = str(pictures or "path/to/pictures") if learned else str(prompt_file)
    names = Names(model.lower(), str(teacher) or known.teacher, data, str(place))
    with atomic_write(place) as part:
        part.write_text(preset_yaml(known, plan, names, memory), encoding="utf-8")
    return place


def next_steps(path: Path, arguments: Mapping[str, Any]) -> list[str]:
    """Return the lines that `init` prints: the file, and its own head."""
    head = [line[4:] for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#   ")]
    return [f"wrote {path}; next:", *(f"  {line}" for line in head)]
