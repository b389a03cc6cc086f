"""The files of a student: its LoRA, the weights of its extra conditioning, the run folder that they lie in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fewstep.backbones.pipeline_folder import index_file
from fewstep.backbones.weight_files import ADVICE, first_pickle, is_pickle
from fewstep.common.errors import UserError
from fewstep.common.safetensors_header import is_safetensors, metadata_record, read_safetensors_header

FILE = "pytorch_lora_weights.safetensors"
"""File name that diffusers loads from a folder."""
CONDITIONING = "conditioning.safetensors"
"""The extra embedding of a student with extra conditioning (`conditioning_file`), beside its weights."""
METADATA = "lora_adapter_metadata"
"""The entry of a file's metadata in which diffusers keeps rank, alpha and targets."""
PEFT_FILE = "adapter_model.safetensors"
PEFT_CONFIG = "adapter_config.json"


def student_of_run(path: Path) -> Path:
    """Return the student of a run folder that `fewstep distill` wrote; any other path unchanged.

    Raises:
        UserError: a run folder without a student, which the end of a run writes.
    """
    if index_file(path).is_file() or any(path.glob("*.safetensors")) or not (path / "config.yaml").is_file():
        return path
    if not (path / "student").is_dir():
        raise UserError(f"{str(path)!r} is a run folder without a finished student; let the run finish, or give a LoRA")
    return path / "student"


def find_lora(path: Path) -> Path:
    """Return a LoRA's file: the file itself, or the one in a folder or run folder.

    Raises:
        UserError: no such file, a whole pipeline, or a pickle.
    """
    path = student_of_run(path)
    what = f"lora = {str(path)!r}"
    if index_file(path).is_file():
        raise UserError(f"{what} is a whole pipeline; give it as the teacher, with lora = 'none'")
    file = path
    if path.is_dir():
        file = path / (PEFT_FILE if (path / PEFT_FILE).is_file() and not (path / FILE).is_file() else FILE)
    if not file.is_file():
        pickled = first_pickle(path.iterdir()) if path.is_dir() else None
        others = sorted(str(other) for other in path.glob("*.safetensors"))
        more = f"; give the file itself, such as {others[0]!r}" if others else ""
        if pickled:
            more = f"; it holds {pickled.name}, a pickle, which is never read: {ADVICE}"
        reason = f"holds no {FILE}" if path.is_dir() else "does not exist"
        raise UserError(f"{what} {reason}{more}")
    if is_pickle(file):
        raise UserError(f"{what} is a pickle, which is never read; {ADVICE}")
    if file.suffix.lower() not in (".safetensors", ".sft") and not is_safetensors(file):
        raise UserError(f"{what} is not a .safetensors file; pickled weights are never read")
    return file


def read_lora_record(path: Path) -> dict[str, Any]:
    """Return the `fewstep` record of a LoRA (a file or its folder) or a single-file checkpoint; empty without one.

    Raises:
        UserError: no such file, or broken metadata.
    """
    file = find_lora(path)
    return metadata_record(read_safetensors_header(file)[0], "fewstep", file)
