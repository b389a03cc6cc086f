"""Students: roles over networks, for LoRA and full fine-tuning."""

from __future__ import annotations

import copy
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from fewstep.common.choices import ExtraCondition
from fewstep.common.sharding import local_part
from fewstep.diffusion.denoiser import BASE, FAKE, Call, Condition
from fewstep.diffusion.time_conditioning import EXTRA_PREFIX, ExtraEmbedding, ExtraEmbeddingHook, split_extra
from fewstep.training.config import StudentConfig
from fewstep.training.quantization import quantize, quantized_parts
from fewstep.training.roles import AdapterRoles, Roles, SeparateRoles, add_adapter, copy_role


class Host(Protocol):
    """Interface of a backbone whose network holds roles."""

    network: nn.Module

    @property
    def targets(self) -> Sequence[str]:
        """Suffixes of the names of the layers that a LoRA adapts."""

    @property
    def outlets(self) -> Sequence[str]:
        """Prefixes of the names of the network's last layers, the very last one first."""

    def call(self, network: nn.Module, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Call the network."""

    def time_embedding(self, network: nn.Module) -> nn.Module:
        """Return the time embedding of a network, whose output is [B, width]."""

    @property
    def time_width(self) -> int:
        """Width of the time embedding's output."""

    def embeds_guidance(self, network: nn.Module) -> bool:
        """Return whether a network embeds the guidance w by a layer of its own."""

    def add_guidance_embedding(self, network: nn.Module) -> None:
        """Add such a layer, of zeros, to a network whose class supports one and that has none."""


@dataclass(frozen=True)
class Student:
    """Roles over networks, and the call that a `Denoiser` makes.

    Attributes:
        extra_conditioning: extra embedding of each role but the teacher, if any.
        outlets: prefixes of the names of the network's last layers.
    """

    roles: Roles
    call: Call
    extra_conditioning: Mapping[str, ExtraEmbedding]
    outlets: Sequence[str] = ()

    def outlet(self, role: str) -> nn.Parameter:
        """Return the last trained matrix of a role; of a LoRA the last adapter's."""
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
    """Make the teacher and the given roles; all start equal to the teacher, whose weights get the format `config.base`.

    With LoRA, base weights exist once; with full fine-tuning every role is a copy of the network. The first role and a
    fake score have gradients. Further roles copy the first one's weights.

    Args:
        extra_conditioning: extra inputs (s, w) of every role but the fake score. The condition of a call must then
            hold them, [B] each. A UNet that is trained in full embeds w itself, other networks by an extra embedding.
        compute: dtype that frozen weights in 4 bits are computed in.
        device: where frozen weights are quantized to 8 and 4 bits; all else stays where the host's network is.
    """
    made: Roles
    conditioned = [role for role in roles if role != FAKE]
    if config.kind == "full":
        networks = {role: copy.deepcopy(host.network) for role in roles}
        for role in conditioned if "w" in extra_conditioning else ():
            host.add_guidance_embedding(networks[role])
    if config.base != "fp32":
        outlet = host.network.get_submodule(host.outlets[0])
        wide = [host.time_embedding(host.network), outlet]
        quantize(host.network, config.base, compute, wide, device, stay=not config.offload)
    if config.kind == "lora":
        targets = list(config.targets or host.targets)
        for role in roles:
            add_adapter(host.network, role, config.rank, config.lora_alpha, targets, seed)
        made = AdapterRoles(host.network)
        networks = dict.fromkeys(roles, host.network)
    else:
        made = SeparateRoles({BASE: host.network, **networks})
    place = next(host.network.parameters()).device
    beside = [name for name in extra_conditioning if name != "w" or not host.embeds_guidance(networks[roles[0]])]
    embeddings = {role: ExtraEmbedding(beside, host.time_width, seed).to(place) for role in conditioned if beside}
    student = Student(made, _call(host, made, networks, embeddings), embeddings, host.outlets)
    first = student.parameters(roles[0])
    for role in roles:
        for parameter in student.parameters(role).values():
            parameter.requires_grad_(role in (roles[0], FAKE))
        if role not in (roles[0], FAKE):
            copy_role(first, student.parameters(role))
    if config.checkpointing and not (config.offload and config.kind == "lora"):  # whose blocks recompute themselves
        made.checkpointing()
    return student


def _call(host: Host, made: Roles, networks: Mapping[str, nn.Module], embeddings: Mapping[str, ExtraEmbedding]) -> Call:
    """Return the call by role. Roles that share a network share its hook."""
    hooks = (
        {id(network): ExtraEmbeddingHook(host.time_embedding(network)) for network in networks.values()}
        if embeddings
        else {}
    )

    def call(x: Tensor, t: Tensor, condition: Condition, role: str) -> Tensor:
        with made.use(role) as network:
            if role not in embeddings:
                return host.call(network, x, t, condition)
            extra, rest = split_extra(condition, embeddings[role].parts)
            with hooks[id(network)].adding(embeddings[role](extra)):
                return host.call(network, x, t, rest)

    return call


def unique_bytes(*networks: nn.Module, apart: Container[int] = ()) -> int:
    """Return the bytes of distinct storage of all parameters of this process: a shared base counts once.

    Args:
        apart: addresses of storages that do not count.
    """
    seen: dict[int, int] = {}
    for parameter in (p for network in networks for p in network.parameters()):
        scales = (getattr(owner, name) for owner, name in quantized_parts(parameter))
        for tensor in (parameter, *scales):
            storage: torch.UntypedStorage = local_part(tensor).untyped_storage()
            seen[storage.data_ptr()] = storage.nbytes()
    return sum(size for address, size in seen.items() if address not in apart)
