"""Search folders for teachers, students and run folders, by file names and headers."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Literal, NamedTuple

from fewstep.backbones.pipeline_folder import INDEX, MODULAR_INDEX
from fewstep.backbones.teachers import ONE_FILE
from fewstep.common.errors import UserError
from fewstep.common.safetensors_header import metadata_record, read_safetensors_header
from fewstep.students.lora_file import CONDITIONING, FILE

DEPTH = 6
"""Levels of folders that are searched."""
SKIPPED = ("checkpoints", "tensorboard", "grids", "node_modules")
CHECKPOINT = ("model.diffusion_model.", "diffusion_model.", "input_blocks.", "joint_blocks.", "double_blocks.")
"""Beginnings of the keys of single-file checkpoints."""


class Found(NamedTuple):
    """A teacher (pipeline folder or single file), a student (LoRA) or a run folder.

    Attributes:
        base: sha256 of the network that a LoRA names as its base; empty if it names none.
    """

    kind: Literal["teacher", "lora", "run"]
    path: Path
    base: str = ""


def find_models(places: Iterable[Path]) -> Iterator[Found]:
    """Yield what lies below some folders, in the order of the names; links to folders are not followed."""
    for place in places:
        for name, inner, files in os.walk(place):
            path, pipeline = Path(name), bool({INDEX, MODULAR_INDEX} & set(files))
            inner[:] = sorted(each for each in inner if not each.startswith(".") and each not in SKIPPED)
            if "log.jsonl" in files and "config.yaml" in files:
                yield Found("run", path)
            if pipeline:
                yield Found("teacher", path)
            if pipeline or len(path.relative_to(place).parts) >= DEPTH:
                inner.clear()
            for file in [] if pipeline else sorted(files):
                if file.endswith(ONE_FILE) and file != CONDITIONING:
                    yield from _model_of(path / file)


def _model_of(file: Path) -> Iterator[Found]:
    """Yield what a safetensors file is, if it is a LoRA or a checkpoint; a LoRA of diffusers by its folder."""
    with suppress(UserError):
        metadata, entries = read_safetensors_header(file)
        if any("lora" in key for key in entries):
            base = str(metadata_record(metadata, "fewstep", file).get("base") or "")
            yield Found("lora", file.parent if file.name == FILE else file, base)
        elif any(key.startswith(CHECKPOINT) for key in entries):
            yield Found("teacher", file)
