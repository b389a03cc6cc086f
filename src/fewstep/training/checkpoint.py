"""Checkpoints: safetensors and JSON only, whole or absent, exact.

A checkpoint is a folder `checkpoints/step-00000400/` with, for each update of the plan,
`<name>.safetensors` (trainable weights, fp32), `<name>.optimizer.safetensors` and, where there are any,
`<name>.ema.safetensors` (average that is saved as the student) and `<name>.follower.safetensors` (EMA target), beside
`state.json`: step, counters, sums of the next log line, the caller's notes, and the digests of all files.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.common.errors import UserError
from fewstep.common.files import atomic_folder, read_mapping, remove_folder, sha256, write_json
from fewstep.common.sharding import copy_into
from fewstep.common.tensors import save_tensors
from fewstep.training.run_folder import checkpoints

STATE = "state.json"
DIGESTS = "sha256"
"""Entry of state.json: file -> digest of its bytes; of state.json itself, the digest of its other entries."""


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: list[str]) -> dict[str, Tensor]:
    """Flatten an optimiser's per-parameter state into {"<parameter>|<key>": tensor}."""
    result = {}
    for name, parameter in zip(names, _parameters(optimizer), strict=True):
        for key, value in optimizer.state[parameter].items() if parameter in optimizer.state else ():
            tensor = torch.as_tensor(value)
            own = tensor.shape == parameter.shape  # others may be shared by several parameters, such as code books
            result[f"{name}|{key}"] = tensor if own else tensor.clone()
    return result


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def restore_optimizer(optimizer: torch.optim.Optimizer, names: list[str], tensors: Mapping[str, Tensor]) -> None:
    """Restore the result of `optimizer_tensors`.

    Moments get the memory layout of their parameter, as a fused kernel needs, and are sharded like it.
    """
    by_name = dict(zip(names, _parameters(optimizer), strict=True))
    optimizer.state.clear()
    for flat, value in tensors.items():
        name, _, key = flat.rpartition("|")
        parameter = by_name[name]
        if value.shape == parameter.shape and value.dim():
            moments = torch.empty_like(parameter, dtype=value.dtype, requires_grad=False)
            copy_into(moments, value)
            optimizer.state[parameter][key] = moments
        elif value.dtype == torch.int64:  # a count that the optimiser keeps as an int
            optimizer.state[parameter][key] = int(value)
        else:
            # a fused optimiser keeps its step count on the parameters' device
            fused = optimizer.param_groups[0].get("fused")
            optimizer.state[parameter][key] = value.to(parameter.device if value.dim() or fused else "cpu")


@torch.no_grad()
def restore_parameters(parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor], path: Path) -> None:
    """Copy tensors into parameters of the same names and shapes.

    Raises:
        UserError: names or shapes differ.
    """
    missing = sorted(set(parameters) ^ set(tensors))
    if missing:
        raise UserError(f"{path} belongs to another network: {missing[0]} is in only one of them")
    for name, parameter in parameters.items():
        if parameter.shape != tensors[name].shape:
            raise UserError(f"{path}: {name} is {tuple(tensors[name].shape)}, not {tuple(parameter.shape)}")
        copy_into(parameter, tensors[name])


def save(
    folder: Path, step: int, files: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any], keep: int
) -> Path:
    """Write one checkpoint, then remove the oldest ones beyond `keep`."""
    target = folder / f"step-{step:08d}"
    with atomic_folder(target) as part:
        digests = {}
        for name, tensors in files.items():
            file = part / f"{name}.safetensors"
            save_tensors(file, tensors)
            digests[file.name] = sha256(file)
        held = {"step": step, **state}
        write_json(part / STATE, held | {DIGESTS: {**digests, STATE: _digest(held)}})
    for old in checkpoints(folder)[:-keep]:
        remove_folder(old)
    return target


def _digest(state: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def read_state(checkpoint: Path, *, whole: bool = False) -> dict[str, Any]:
    """Return the JSON part of a checkpoint.

    Args:
        whole: check the digests of the other files, too.

    Raises:
        UserError: a file has changed since it was saved. Checkpoints of older versions have no digests.
    """
    state = read_mapping(checkpoint / STATE)
    digests = state.pop(DIGESTS, None)
    if not isinstance(digests, dict):
        if not isinstance(state.get("step"), int):
            raise UserError(f"{checkpoint / STATE} has step = {state.get('step')!r}; it must be a whole number")
        return state
    for name, digest in digests.items():
        if name == STATE:
            found = _digest(state)
        elif not whole:
            continue
        else:
            file = checkpoint / name
            found = sha256(file) if file.is_file() else "missing"
        if found != digest:
            wrong = "is missing" if found == "missing" else "has changed since it was saved"
            raise UserError(
                f"{checkpoint / name} {wrong}; remove the folder {checkpoint.name} to resume from the one before it, "
                "or give another --out"
            )
    return state
