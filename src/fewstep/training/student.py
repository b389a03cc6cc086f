"""How roles are laid out over networks, for LoRA and for full fine-tuning."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from fewstep.common.choices import ExtraCondition
from fewstep.common.sharding import local_part
from fewstep.diffusion.denoiser import BASE, FAKE, Call, Condition
from fewstep.diffusion.time_conditioning import EXTRA_PREFIX, ExtraEmbedding, ExtraEmbeddingHook, split_extra
from fewstep.training.config import StudentConfig
from fewstep.training.quantization import quantize
from fewstep.training.roles import AdapterRoles, Roles, SeparateRoles, add_adapter, copy_role


class Host(Protocol):
    """What a backbone must offer to host roles."""

    network: nn.Module

    @property
    def targets(self) -> Sequence[str]:
        """Layers that a LoRA adapts, by the ends of their names."""
        ...

    @property
    def outlets(self) -> Sequence[str]:
        """The network's last layers, by the beginnings of their names, the very last one first."""
        ...

    def call(self, network: nn.Module, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """One network call."""
        ...

    def time_embedding(self, network: nn.Module) -> nn.Module:
        """The part of a network whose output [B, width] stands for the time."""
        ...

    @property
    def time_width(self) -> int:
        """Width of that output."""
        ...

    def embeds_guidance(self, network: nn.Module) -> bool:
        """Whether a network embeds w, the guidance omega in its condition, by a layer of its own."""
        ...

    def add_guidance_embedding(self, network: nn.Module) -> None:
        """Give a network such a layer, of zeros, where its kind has a place for one and it has none."""
        ...


@dataclass(frozen=True)
class Student:
    """Roles over networks, and the call that a `Denoiser` makes.

    Attributes:
        told: extra embedding of each role but the teacher, if any.
        outlets: the network's last layers, as its host names them.
    """

    roles: Roles
    call: Call
    extra_conditioning: Mapping[str, ExtraEmbedding]
    outlets: Sequence[str] = ()

    def outlet(self, role: str) -> nn.Parameter:
        """The last matrix that is trained of a role: of a LoRA the last adapter, wherever that is."""
        matrices = {name: p for name, p in self.roles.parameters(role).items() if p.dim() > 1}
        for start in self.outlets:
            found = [p for name, p in matrices.items() if name.startswith(start)]
            if found:
                return found[-1]
        return list(matrices.values())[-1]

    def parameters(self, role: str) -> dict[str, nn.Parameter]:
        """Return a role's trained weights: of its network or adapter, and of its extra embedding (`EXTRA_PREFIX`)."""
        own = self.extra_conditioning[role].named_parameters() if role in self.extra_conditioning else ()
        return {**self.roles.parameters(role), **{f"{EXTRA_PREFIX}{name}": p for name, p in own}}


def make_student(
    host: Host,
    config: StudentConfig,
    roles: tuple[str, ...],
    seed: int,
    extra_conditioning: Sequence[ExtraCondition] = (),
    compute: torch.dtype = torch.float32,
    device: torch.device | None = None,
) -> Student:
    """Lay out the teacher and the given roles; all start equal to the teacher, whose own weights are kept as asked.

    With LoRA, base weights exist once; with full fine-tuning every role is a copy of the network. The first role and a
    fake score have gradients switched on. Further roles copy the first one's weights.

    Args:
        extra_conditioning: extra inputs (s, w) of every role but the fake score. The condition of a call must then
            hold them, [B] each. A UNet that is trained in full embeds w itself, other networks by an extra embedding.
        compute: type that frozen weights in 4 bits are computed with.
        device: where frozen weights in 8 and 4 bits go as they are made; all else stays where the host's network is.
    """
    laid: Roles
    conditioned = [role for role in roles if role != FAKE]
    if config.kind == "full":
        networks = {role: copy.deepcopy(host.network) for role in roles}
        for role in conditioned if "w" in extra_conditioning else ():
            host.add_guidance_embedding(networks[role])
    if config.base != "fp32":
        outlet = host.network.get_submodule(host.outlets[0])
        quantize(host.network, config.base, compute, [host.time_embedding(host.network), outlet], device)
    if config.kind == "lora":
        targets = list(config.targets or host.targets)
        for role in roles:
            add_adapter(host.network, role, config.rank, config.lora_alpha, targets, seed)
        laid = AdapterRoles(host.network)
        networks = dict.fromkeys(roles, host.network)
    else:
        laid = SeparateRoles({BASE: host.network, **networks})
    place = next(host.network.parameters()).device
    beside = [name for name in extra_conditioning if name != "w" or not host.embeds_guidance(networks[roles[0]])]
    embeddings = {role: ExtraEmbedding(beside, host.time_width, seed).to(place) for role in conditioned if beside}
    student = Student(laid, _call(host, laid, networks, embeddings), embeddings, host.outlets)
    first = student.parameters(roles[0])
    for role in roles:
        for parameter in student.parameters(role).values():
            parameter.requires_grad_(role in (roles[0], FAKE))
        if role not in (roles[0], FAKE):
            copy_role(first, student.parameters(role))
    if config.checkpointing:
        laid.checkpointing()
    return student


def _call(host: Host, laid: Roles, networks: Mapping[str, nn.Module], embeddings: Mapping[str, ExtraEmbedding]) -> Call:
    """The call by role; one ear a network, which several roles may share."""
    ears = (
        {id(network): ExtraEmbeddingHook(host.time_embedding(network)) for network in networks.values()}
        if embeddings
        else {}
    )

    def call(x: Tensor, t: Tensor, condition: Condition, role: str) -> Tensor:
        with laid.use(role) as network:
            if role not in embeddings:
                return host.call(network, x, t, condition)
            told, rest = split_extra(condition, embeddings[role].parts)
            with ears[id(network)].adding(embeddings[role](told)):
                return host.call(network, x, t, rest)

    return call


def unique_bytes(*networks: nn.Module) -> int:
    """Bytes of distinct storage behind all parameters: a base shared by several roles counts once.

    Of split weights only this process's part counts.
    """
    seen: dict[int, int] = {}
    for network in networks:
        for parameter in network.parameters():
            storage: torch.UntypedStorage = local_part(parameter).untyped_storage()
            seen[storage.data_ptr()] = storage.nbytes()
    return sum(seen.values())
