"""Pickled weights are never read: what is said where a user has them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

SUFFIXES = (".ckpt", ".bin", ".pt", ".pth", ".pkl")


def is_pickle(path: Path) -> bool:
    """Whether a file's name says so."""
    return path.suffix.lower() in SUFFIXES


def first_pickle(paths: Iterable[Path]) -> Path | None:
    """The first pickle among files, by name."""
    return next((path for path in sorted(paths) if is_pickle(path)), None)


def advice(path: Path) -> str:
    """The command that converts one, which runs from anywhere."""
    source, target = str(path.resolve()), str(path.resolve().with_suffix(".safetensors"))
    return (
        f'convert it where you trust it: python -c "import torch, safetensors.torch as s; '
        f"w = torch.load({source!r}, map_location='cpu', weights_only=True); "
        f"s.save_file({{k: v.contiguous().clone() for k, v in w.get('state_dict', w).items() if hasattr(v, 'shape')}}, "
        f'{target!r})"'
    )
