"""Networks whose weights are split over the processes of a launch (FSDP2), and their weights as whole tensors.

Each process holds a part of every weight, of its gradient and of what the optimiser keeps of it (a DTensor); a block's
weights are gathered when the block runs, and let go after it. Files hold whole tensors: they do not know how many
processes wrote them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from fewstep.common import distributed as processes


def shard(network: nn.Module, device: torch.device, precision: torch.dtype = torch.float32) -> None:
    """Split all weights of `network` over the processes, in place; every process must ask.

    Blocks that its class names as not to be torn apart are gathered one at a time. A network in main memory is brought
    to the device so, block by block: no device ever holds more of it whole. Alone, it is brought there as it is.

    Args:
        precision: type that weights are gathered and computed in; the parts that a process holds keep theirs, and
            gradients are summed in fp32.
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
    network.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]  # no other one can be split
    blocks = set(getattr(network, "_no_split_modules", None) or ())
    for module in reversed(list(network.modules())):  # inner ones first: what they hold is theirs
        if module is network or type(module).__name__ in blocks:
            fully_shard(module, mesh=mesh, mp_policy=policy)


def resharded(network: nn.Module) -> nn.Module:
    """The network with its parts as its parameters: a call without a backward pass leaves some gathered.

    Not between a call and its backward pass, which needs them.
    """
    from torch.distributed.fsdp import FSDPModule

    for module in network.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    return network


def is_sharded(tensors: Iterable[Tensor]) -> bool:
    """Whether a process holds but a part of these."""
    return any(isinstance(tensor, DTensor) for tensor in tensors)


def local_part(tensor: Tensor) -> Tensor:
    """Return what this process holds of a split tensor; a tensor that is not split as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be split; every process must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def full_on_main(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors: split ones on the main process's CPU, one after another, and nothing of them elsewhere.

    Every process must ask.
    """
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
    """Overwrite a tensor, split or not, with a whole one or one that is split alike."""
    if isinstance(target, DTensor) and not isinstance(value, DTensor):
        local = value.to(device=target.device, dtype=target.dtype)
        value = distribute_tensor(local, target.device_mesh, target.placements, src_data_rank=None)
    target.copy_(value)
