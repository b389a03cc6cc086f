"""Frozen networks from safetensors, in transformers' classes, under published key names."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn

from fewstep.common.errors import UserError
from fewstep.common.tensors import load_tensors
from fewstep.methods.rewards.registry import ScorerFiles

Network = TypeVar("Network", bound=nn.Module)
State = Mapping[str, Tensor]


@contextmanager
def loading(what: object) -> Iterator[None]:
    """Report in one line what cannot be loaded."""
    try:
        yield
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RuntimeError, ArithmeticError) as error:
        raise UserError(f"cannot load {what}: {' '.join(str(error).split())[:300]}", field=str(what)) from error


def rename_keys(state: State, rules: Sequence[tuple[str, str]]) -> dict[str, Tensor]:
    """Return the state with regular expressions of its keys replaced, one rule after another."""
    renamed = {}
    for key, tensor in state.items():
        for pattern, new in rules:
            key = re.sub(pattern, new, key)
        renamed[key] = tensor
    return renamed


def load_frozen(
    make: Callable[[], Network],
    files: ScorerFiles,
    dtype: torch.dtype,
    device: torch.device,
    convert: Callable[[State], State] = lambda state: state,
    unused: str = "position_ids$",
) -> Network:
    """Build a network with the weights of a scorer's files, frozen and in eval mode.

    Args:
        make: builds the network; its parameters take no memory until they are loaded.
        convert: state under the files' keys -> state under the network's.
        unused: regular expression of keys in the files that the network lacks, such as buffers.

    Raises:
        UserError: a missing or unknown key, or another shape.
    """
    from accelerate import init_empty_weights

    state = {key: tensor for file in files.weights for key, tensor in load_tensors(file).items()}
    with loading(files.weights[0]):
        with init_empty_weights(include_buffers=False):
            network = make()
        converted = convert({key: tensor for key, tensor in state.items() if not re.search(unused, key)})
        network.load_state_dict({key: tensor.to(dtype).contiguous() for key, tensor in converted.items()}, assign=True)
    return network.to(device).eval().requires_grad_(False)
