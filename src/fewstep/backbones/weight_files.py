"""The weight files that a component is loaded from: found, checked by their headers, hashed."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

from fewstep.common.errors import UserError
from fewstep.common.files import read_mapping, sha256
from fewstep.common.safetensors_header import is_safetensors, read_safetensors_header

ADAPTER = re.compile(r"(^|\.)(base_layer|lora_[A-Za-z_]+)\.")
"""In the names of weights that were saved with an adapter on (PEFT's, and diffusers' own before it)."""
PICKLES = (".ckpt", ".bin", ".pt", ".pth", ".pkl")
ADVICE = (
    "where you trust it, load it and save it with save_pretrained(..., safe_serialization=True), or with "
    "torch.load(..., weights_only=True) and safetensors.torch.save_file"
)
"""How to convert pickled weights, which are never read (loading one may run any code), for errors."""
VARIANTS = ("", "fp16", "bf16")
"""Variants of weight files that are read, the plain names first: "fp16" is that of `model.fp16.safetensors`."""


def weight_files(component: Path) -> list[Path]:
    """Return the files that a component's weights are loaded from, in name order; empty if there are none.

    Other files beside them (`.non_ema`, or `.fp16` beside plain ones) are not read.

    Raises:
        UserError: a broken index of shards.
    """
    return next((files for variant in VARIANTS if (files := _files_of(component, variant))), [])


def weight_variant(component: Path) -> str | None:
    """Return the variant that a component's weights are saved as ("fp16"), as `from_pretrained` takes it; None for
    plain file names.

    Raises:
        UserError: a broken index of shards.
    """
    return next((variant or None for variant in VARIANTS if _files_of(component, variant)), None)


def _files_of(component: Path, variant: str) -> list[Path]:
    """Return the weight files of one variant ("" for the plain names); empty if there are none."""
    dotted = f".{variant}" if variant else ""
    # where a whole file and shards lie side by side, diffusers takes the shards and transformers the file
    for name, shards_first in (("diffusion_pytorch_model", True), ("model", False)):
        whole, index = component / f"{name}{dotted}.safetensors", component / f"{name}.safetensors.index{dotted}.json"
        if whole.is_file() and not (shards_first and index.is_file()):
            return [whole]
        if index.is_file():
            listed = read_mapping(index).get("weight_map")
            if not isinstance(listed, dict) or not all(isinstance(file, str) for file in listed.values()):
                raise UserError(f"{index} holds no weight_map of files")
            return [component / file for file in sorted(set(listed.values()))]
    return []


def check_weights(component: Path) -> None:
    """Refuse a component without safetensors weights, or whose files are broken or were saved with an adapter.

    Raises:
        UserError: naming the file, with what lies in its place.
    """
    files = weight_files(component)
    if not files:
        others = sorted(component.glob("*.safetensors"))
        dangling = next((file for file in others if not file.exists()), None)
        if dangling:
            raise UserError(f"{dangling} is a link to {dangling.readlink()}, which does not exist; fetch it again")
        pickled = first_pickle(component.iterdir())
        remedy = f": {ADVICE} ({pickled.name})" if pickled else ""
        if others:
            remedy = f"; it holds {others[0].name}, which must have the plain name"
        raise UserError(
            f"{component} holds no safetensors weights under the name that diffusers reads; pickled weights are never "
            f"read{remedy}"
        )
    for file in files:
        _, entries = read_safetensors_header(file)  # a missing, truncated or foreign file is refused here
        adapter = next((key for key in entries if ADAPTER.search(key)), None)
        if adapter:
            raise UserError(
                f"{file} was saved with an adapter: it holds {adapter}; load it, merge the adapter (fuse_lora and "
                "unload_lora_weights, or merge_and_unload), and save it again"
            )


def digest_of(files: Iterable[Path]) -> str:
    """Return the sha256 over the bytes of files."""
    return _digest(tuple((file, file.stat().st_size, file.stat().st_mtime_ns) for file in files))


@lru_cache(maxsize=32)
def _digest(files: tuple[tuple[Path, int, int], ...]) -> str:
    """Hash files once for each size and time of change: weights are gigabytes."""
    return sha256(*(file for file, _, _ in files))


def is_pickle(path: Path) -> bool:
    """Return whether a file is a pickle by its name, and no renamed safetensors file."""
    return path.suffix.lower() in PICKLES and not is_safetensors(path)


def first_pickle(paths: Iterable[Path]) -> Path | None:
    """Return the first pickle among files, model weights before others; None without any."""
    return min(filter(is_pickle, paths), key=lambda path: ("model" not in path.name, path.name), default=None)
