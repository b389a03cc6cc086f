"""How roles are laid out over networks, for LoRA and for full fine-tuning."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from fewstep.denoiser import Call, Condition
from fewstep.roles import BASE, AdapterRoles, Roles, SeparateRoles, add_adapter, copy_role
from fewstep.settings import StudentConfig


class Host(Protocol):
    """What a backbone must offer to host roles."""

    network: nn.Module
    targets: list[str]

    def call(self, network: nn.Module, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """One network call."""
        ...


@dataclass(frozen=True)
class Student:
    """Roles over networks, and the call that a `Denoiser` makes."""

    roles: Roles
    call: Call


def make_student(host: Host, config: StudentConfig, roles: tuple[str, ...], seed: int) -> Student:
    """Lay out the teacher and the given roles; all start equal to the teacher.

    With LoRA, base weights exist once and only the first role has gradients switched on; with full fine-tuning
    every role is a copy of the network. Further roles copy the first one's weights.
    """
    laid: Roles
    if config.kind == "lora":
        targets = list(config.targets or host.targets)
        for role in roles:
            add_adapter(host.network, role, config.rank, config.lora_alpha, targets, seed)
        laid = AdapterRoles(host.network)
    else:
        laid = SeparateRoles({BASE: host.network, **{role: copy.deepcopy(host.network) for role in roles}})
    first = laid.parameters(roles[0])
    for role in roles:
        for parameter in laid.parameters(role).values():
            parameter.requires_grad_(role == roles[0])
        if role != roles[0]:
            copy_role(first, laid.parameters(role))
    if config.checkpointing:
        laid.checkpointing()

    def call(x: Tensor, t: Tensor, condition: Condition, role: str) -> Tensor:
        with laid.use(role) as network:
            return host.call(network, x, t, condition)

    return Student(laid, call)


def unique_bytes(*networks: nn.Module) -> int:
    """Bytes of distinct storage behind all parameters: a base shared by several roles counts once."""
    seen: dict[int, int] = {}
    for network in networks:
        for parameter in network.parameters():
            storage: torch.UntypedStorage = parameter.untyped_storage()
            seen[storage.data_ptr()] = storage.nbytes()
    return sum(seen.values())
