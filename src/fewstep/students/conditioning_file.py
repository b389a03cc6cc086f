"""The extra embedding of a student with extra conditioning (s or w): `conditioning.safetensors` beside its weights.

No stock pipeline passes the landing s or the guidance w to a network, and diffusers' LoRA loader refuses unknown keys.
So these weights have a file of their own; `fewstep.attach` adds both files to a diffusers pipeline.
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
from fewstep.students.lora_file import CONDITIONING


def split_weights(weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Split a student's weights into (network's or adapter's, extra embedding's)."""
    extra = {key: value for key, value in weights.items() if key.startswith(EXTRA_PREFIX)}
    return {key: value for key, value in weights.items() if key not in extra}, extra


def save_extra_embeddings(folder: Path, weights: Mapping[str, Tensor]) -> None:
    """Write a student's extra embedding into its folder, fp32; no file for an empty one."""
    if weights:
        with atomic_write(folder / CONDITIONING) as part:
            save_tensors(part, {key: value.float() for key, value in weights.items()}, {"format": "pt"})


def extra_embedding_weights(student: Path) -> dict[str, Tensor]:
    """Return the extra embedding's weights beside a student (its folder, or its LoRA's file); empty without any.

    Raises:
        UserError: a broken file.
    """
    path = _beside(student)
    return current_names(load_tensors(path)) if path.is_file() else {}


def _beside(student: Path) -> Path:
    return (student if student.is_dir() else student.parent) / CONDITIONING


def read_extra_embeddings(student: Path, names: Sequence[ExtraCondition], width: int) -> ExtraEmbedding | None:
    """Return the extra embedding of a student (its folder, or its LoRA's file); None without extra conditioning.

    Args:
        names: of its extra conditioning, by its settings.
        width: of the network's time embedding.

    Raises:
        UserError: the file is missing, broken, or of another network.
    """
    if not names:
        return None
    path = _beside(student)
    tensors = {key.removeprefix(EXTRA_PREFIX): value for key, value in current_names(load_tensors(path)).items()}
    embedding = ExtraEmbedding([name for name in get_args(ExtraCondition) if name in names], width)
    own = {key: tuple(value.shape) for key, value in embedding.state_dict().items()}
    found = {key: tuple(value.shape) for key, value in tensors.items()}
    if found != own:
        wrong = sorted(key for key in own.keys() | found.keys() if own.get(key) != found.get(key))[0]
        raise UserError(f"{path}: {wrong} is {found.get(wrong)}, this network needs {own.get(wrong)}")
    embedding.load_state_dict(tensors)
    return embedding.requires_grad_(False)
