"""Networks sharded over the processes of a launch (FSDP2), and their full tensors.

Each process holds a part of every weight, gradient and optimiser state (a DTensor). A block's weights are gathered
while the block runs. Files hold full tensors, independent of the number of processes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from fewstep.common import distributed as processes


def shard(network: nn.Module, device: torch.device, precision: torch.dtype = torch.float32) -> None:
    """Shard all weights of `network` over the processes, in place (a collective); with one, move it to the device.

    The network moves block by block (`_no_split_modules` of its class), so that no device holds all of it.

    Args:
        precision: dtype that weights are gathered and computed in. Parts keep theirs; gradients are summed in fp32.
    """
    if processes.world_size() == 1:
        network.to(device)
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(device.type, (processes.world_size(),))
    narrow = None if precision == torch.float32 else precision
    # inputs stay as they are: a time of 999 is 1000 in bf16
    policy = MixedPrecisionPolicy(narrow, torch.float32 if narrow else None, cast_forward_inputs=False)
    network.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]  # the only one that can be sharded
    blocks = set(getattr(network, "_no_split_modules", None) or ())
    for module in reversed(list(network.modules())):  # inner modules first
        if module is network or type(module).__name__ in blocks:
            fully_shard(module, mesh=mesh, mp_policy=policy)


def resharded(network: nn.Module) -> nn.Module:
    """Free gathered weights, which a call without a backward pass leaves, and return the network.

    Do not call it between a call and its backward pass.
    """
    from torch.distributed.fsdp import FSDPModule

    for module in network.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    return network


def is_sharded(tensors: Iterable[Tensor]) -> bool:
    """Return whether any of these is sharded."""
    return any(isinstance(tensor, DTensor) for tensor in tensors)


def local_part(tensor: Tensor) -> Tensor:
    """Return this process's part of a sharded tensor; other tensors unchanged."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """Return the full tensor (a collective); tensors that are not sharded unchanged."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def full_on_main(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gather sharded tensors on the main process's CPU, one after another (a collective); others lack them."""
    result = {}
    for name, tensor in tensors.items():
        gathered = full_tensor(tensor.detach())
        if gathered is tensor or not isinstance(tensor, DTensor):
            result[name] = gathered
        elif processes.is_main():
            result[name] = gathered.cpu()
    return result


@torch.no_grad()
def copy_into(target: Tensor, value: Tensor) -> None:
    """Overwrite a tensor, sharded or not, with a full one or one that is sharded alike."""
    if isinstance(target, DTensor) and not isinstance(value, DTensor):
        local = value.to(device=target.device, dtype=target.dtype)
        value = distribute_tensor(local, target.device_mesh, target.placements, src_data_rank=None)
    target.copy_(value)
