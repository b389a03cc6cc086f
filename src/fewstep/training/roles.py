"""Several roles on one set of base weights.

In LoRA mode teacher, student and target are one frozen base with different adapters. The role is an argument of each
call. Switching does not touch `requires_grad`: PEFT's `set_adapter` turns off the gradients of all other adapters, so
that a backward pass after another role's call gives zero gradients and no error. A block under gradient checkpointing,
which runs again in the backward pass, re-enters the role of its first run.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from fewstep.common.sharding import copy_into, resharded
from fewstep.diffusion.denoiser import BASE


class AdapterRoles:
    """One network whose LoRA layers (PEFT) are switched by role."""

    def __init__(self, network: nn.Module) -> None:
        from peft.tuners.tuners_utils import BaseTunerLayer

        from fewstep.training.lora_layers import fuse_lora_layers

        self.network = network
        fuse_lora_layers(network)
        self._layers: list[Any] = [m for m in network.modules() if isinstance(m, BaseTunerLayer)]
        self._active: str = BASE
        self._enter(BASE)  # PEFT leaves the last adapter active

    def _enter(self, role: str) -> None:
        if role != BASE and not any(role in layer.lora_A for layer in self._layers):
            raise KeyError(f"no adapter is named {role!r}")  # PEFT would silently run the base
        self._active = role
        for layer in self._layers:
            layer._disable_adapters = role == BASE
            if role != BASE:
                layer._active_adapter = [role]

    @contextmanager
    def use(self, role: str) -> Iterator[nn.Module]:
        """Yield the network, switched to `role` until the block ends."""
        before = self._active
        self._enter(role)
        try:
            yield self.network
        finally:
            self._enter(before)

    def parameters(self, role: str) -> dict[str, nn.Parameter]:
        """Return the adapter weights of `role` by their names without the role's."""
        tag = f".{role}."
        named = resharded(self.network).named_parameters()
        return {n.replace(tag, "."): p for n, p in named if tag in n and "lora_" in n}

    def recompute(self, block: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a block, and again in the backward pass, in the role of the first call."""
        if torch.compiler.is_compiling():  # a graph is compiled for one role
            return torch.utils.checkpoint.checkpoint(block, *args, use_reentrant=False, **kwargs)
        role = self._active

        def again(*args: Any, **kwargs: Any) -> Any:
            with self.use(role):
                return block(*args, **kwargs)

        return torch.utils.checkpoint.checkpoint(again, *args, use_reentrant=False, **kwargs)

    def checkpointing(self) -> None:
        """Turn on gradient checkpointing that re-enters the role."""
        self.network.enable_gradient_checkpointing(  # type: ignore[operator]
            gradient_checkpointing_func=self.recompute
        )


class SeparateRoles:
    """One network per role, for full fine-tuning."""

    def __init__(self, networks: Mapping[str, nn.Module]) -> None:
        self.networks = dict(networks)

    @contextmanager
    def use(self, role: str) -> Iterator[nn.Module]:
        """Yield the network of `role`."""
        yield self.networks[role]

    def parameters(self, role: str) -> dict[str, nn.Parameter]:
        """Return all weights of the role's network."""
        return dict(resharded(self.networks[role]).named_parameters())

    def recompute(self, block: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a block, and again in the backward pass."""
        return torch.utils.checkpoint.checkpoint(block, *args, use_reentrant=False, **kwargs)

    def checkpointing(self) -> None:
        """Turn on gradient checkpointing in every network."""
        for network in self.networks.values():
            network.enable_gradient_checkpointing()  # type: ignore[operator]


Roles = AdapterRoles | SeparateRoles


def networks_of(roles: Roles) -> list[nn.Module]:
    """Return the networks of all roles: one for adapters, one per role in full fine-tuning."""
    return list(roles.networks.values()) if isinstance(roles, SeparateRoles) else [roles.network]


def add_adapter(network: nn.Module, role: str, rank: int, alpha: float, targets: list[str], seed: int) -> None:
    """Add a LoRA adapter named after the role; its B matrices start at zero.

    The A matrices are drawn from `seed`. Other adapters keep their gradients, and the base stays frozen.
    """
    from peft import LoraConfig, inject_adapter_in_model

    wanted = {n for n, p in network.named_parameters() if p.requires_grad and "lora_" in n}
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets)  # type: ignore[arg-type]
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # one adapter per role is intended
        torch.manual_seed(seed)
        if hasattr(network, "add_adapter"):
            network.add_adapter(config, adapter_name=role)  # type: ignore[operator]
        else:  # not a model of diffusers
            inject_adapter_in_model(config, network, role)
    for name, parameter in network.named_parameters():
        new = f".{role}." in name and "lora_" in name
        if new:
            wide = torch.promote_types(parameter.dtype, torch.float32)
            parameter.data = parameter.data.to(wide)  # PEFT gives it the layer's dtype
        if parameter.is_floating_point():
            parameter.requires_grad_(name in wanted or new)


@torch.no_grad()
def copy_role(source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> None:
    """Copy the weights of the role `source` into those of `target`; either may be sharded."""
    for name, value in source.items():
        copy_into(target[name], value)
