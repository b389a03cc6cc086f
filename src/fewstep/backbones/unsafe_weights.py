"""Pickled weights, which are never read: loading one may run any code."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from fewstep.common.safetensors_header import is_safetensors

SUFFIXES = (".ckpt", ".bin", ".pt", ".pth", ".pkl")
ADVICE = (
    "where you trust it, load it and save it with save_pretrained(..., safe_serialization=True), or with "
    "torch.load(..., weights_only=True) and safetensors.torch.save_file"
)
"""How to convert a pickle, for errors."""


def is_pickle(path: Path) -> bool:
    """Return whether a file is a pickle by its name, and no renamed safetensors file."""
    return path.suffix.lower() in SUFFIXES and not is_safetensors(path)


def first_pickle(paths: Iterable[Path]) -> Path | None:
    """Return the first pickle among files, model weights before others; None without any."""
    return min(filter(is_pickle, paths), key=lambda path: ("model" not in path.name, path.name), default=None)
