"""Networks of diffusers that a training goes on from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fewstep.common.errors import UserError


def load_network(kind: Any, folder: Path, field: str) -> Any:
    """Return a network of a diffusers class from its folder, fp32, in evaluation mode.

    Args:
        field: setting that named the folder.

    Raises:
        UserError: the folder holds none of that class.
    """
    if not (folder / "config.json").is_file():
        reason = f"holds no config.json; give the folder of a diffusers {kind.__name__}"
        raise UserError(f"{field} = {str(folder)!r} {reason}", field=field)
    try:
        network = kind.from_pretrained(folder, use_safetensors=True, local_files_only=True, torch_dtype=torch.float32)
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{field} = {str(folder)!r} cannot be loaded: {reason}", field=field) from error
    return network.eval()


def copy_weights(source: Any, target: Any, field: str) -> None:
    """Copy the weights of a network into one of the same shape.

    Args:
        field: setting that named the folder of `source`.

    Raises:
        UserError: they differ in shape.
    """
    try:
        target.load_state_dict(source.state_dict())
    except RuntimeError as error:
        reason = "holds a network of another shape; give channels, layers and groups as it was trained with"
        raise UserError(f"{field} {reason}", field=field) from error
