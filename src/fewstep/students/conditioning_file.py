"""What a student is told by, beside its LoRA or pipeline: `conditioning.safetensors`.

No stock pipeline tells a network where its jump lands (s) or the guidance it stands for (w), and diffusers' LoRA loader
refuses keys that it does not know; so these weights stand in a file of their own, and `fewstep.attach` brings both to a
diffusers pipeline.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import get_args

from torch import Tensor

from fewstep.common.choices import ExtraCondition
from fewstep.common.errors import UserError
from fewstep.common.files import atomic_write
from fewstep.common.tensors import load_tensors, save_tensors
from fewstep.diffusion.time_conditioning import EXTRA_PREFIX, ExtraEmbedding, current_names
from fewstep.students.lora_header import CONDITIONING, of_run


def split_weights(weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A student's weights as (of the network or adapter, of what it is told by)."""
    told = {key: value for key, value in weights.items() if key.startswith(EXTRA_PREFIX)}
    return {key: value for key, value in weights.items() if key not in told}, told


def save_extra_embeddings(folder: Path, told: Mapping[str, Tensor]) -> Path | None:
    """Write what a student is told by into its folder, fp32; nothing for a student that is told nothing.

    Raises:
        UserError: the place cannot be written to.
    """
    if not told:
        return None
    path = folder / CONDITIONING
    with atomic_write(path) as part:
        save_tensors(part, {key: value.float() for key, value in told.items()}, {"format": "pt"})
    return path


def extra_embedding_weights(student: Path) -> dict[str, Tensor]:
    """What lies beside a student (its folder, or its LoRA's file): what it is told by; empty for most.

    Raises:
        UserError: a file that is not whole.
    """
    student = of_run(student)
    path = (student if student.is_dir() else student.parent) / CONDITIONING
    return current_names(load_tensors(path)) if path.is_file() else {}


def read_extra_embeddings(student: Path, names: Sequence[ExtraCondition], width: int) -> ExtraEmbedding | None:
    """What the student in a folder (or beside a LoRA file) is told by; None for one that is told nothing.

    Args:
        names: what its settings say that it is told.
        width: of the network's time embedding.

    Raises:
        UserError: the file is missing, broken, or of another network.
    """
    if not names:
        return None
    path = (student if student.is_dir() else student.parent) / CONDITIONING
    tensors = {key.removeprefix(EXTRA_PREFIX): value for key, value in current_names(load_tensors(path)).items()}
    embedding = ExtraEmbedding([name for name in get_args(ExtraCondition) if name in names], width)
    own = {key: tuple(value.shape) for key, value in embedding.state_dict().items()}
    found = {key: tuple(value.shape) for key, value in tensors.items()}
    if found != own:
        wrong = sorted(key for key in own.keys() | found.keys() if own.get(key) != found.get(key))[0]
        raise UserError(f"{path}: {wrong} is {found.get(wrong)}, this network wants {own.get(wrong)}")
    embedding.load_state_dict(tensors)
    return embedding.requires_grad_(False)
