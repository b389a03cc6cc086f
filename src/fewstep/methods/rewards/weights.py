"""Frozen networks from safetensors: every key accounted for, by its name in the file."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fewstep.common.errors import UserError
from fewstep.common.files import sha256
from fewstep.common.tensors import load_tensors
from fewstep.methods.rewards.folder_layout import ScorerFiles

Network = TypeVar("Network", bound=nn.Module)


@dataclass(frozen=True)
class Source:
    """Where a parameter comes from: a key of the file, and what of its tensor."""

    key: str
    take: Callable[[Tensor], Tensor] = lambda tensor: tensor


def same(name: str) -> Source:
    """The file's key is the parameter's name."""
    return Source(name)


@contextmanager
def loading(what: object) -> Iterator[None]:
    """Say in one line what cannot be loaded."""
    try:
        yield
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RuntimeError, ArithmeticError) as error:
        raise UserError(f"cannot load {what}: {' '.join(str(error).split())[:300]}") from error


def build(
    make: Callable[[], Network],
    files: ScorerFiles,
    source: Callable[[str], Source],
    unread: Callable[[str], bool],
    dtype: torch.dtype,
    device: torch.device,
) -> Network:
    """A network with the weights of files, frozen and in eval mode.

    Args:
        make: makes it; its parameters take no memory until they are read.
        source: parameter -> where it comes from.
        unread: whether a key of the file may lie there without being read.

    Raises:
        UserError: a missing or foreign key, by the file's own name of it, or another shape.
    """
    from accelerate import init_empty_weights

    place = files.weights[0]
    with loading(place), init_empty_weights(include_buffers=False):
        network = make()
    found: dict[str, Tensor] = {}
    for file in files.weights:
        found |= load_tensors(file)
    ours = {name: source(name) for name, _ in network.named_parameters()}
    _check_keys(ours, found, unread, str(place))
    state: dict[str, Tensor] = {}
    for name, parameter in network.named_parameters():
        with loading(f"{ours[name].key!r} of {place}"):
            taken = ours[name].take(found[ours[name].key])
        if taken.shape != parameter.shape and taken.numel() == parameter.numel() == 1:
            taken = taken.reshape(parameter.shape)  # a scale is a number in one file and a list of one in another
        if taken.shape != parameter.shape:
            raise UserError(
                f"{place}: {ours[name].key!r} gives {list(taken.shape)} where the network has {list(parameter.shape)}"
            )
        state[name] = taken.to(dtype).contiguous()
    network.load_state_dict(state, strict=False, assign=True)
    return network.to(device).eval().requires_grad_(False)


def _check_keys(
    ours: Mapping[str, Source], found: Mapping[str, Any], unread: Callable[[str], bool], place: str
) -> None:
    wanted = {source.key for source in ours.values()}
    missing = sorted(wanted - found.keys())
    if missing:
        raise UserError(f"{place} holds no {missing[0]!r}{_more(missing)}")
    foreign = sorted(key for key in found.keys() - wanted if not unread(key))
    if foreign:
        raise UserError(f"{place} holds {foreign[0]!r}{_more(foreign)}, which this scorer does not know")


def _more(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if names[1:] else ""


def fingerprint(files: ScorerFiles) -> str:
    """sha256 of the weights files."""
    return sha256(*files.weights)
