"""Frozen blocks in main memory: the device holds two of them at a time, the running one and the next.

Diffusers' group offloading moves a block away after its forward pass, adapters included. A backward pass reads the
weights again: of a linear layer autograd keeps a view, which holds the device's copy, so that no memory is saved; of a
convolution or norm it keeps the parameter, whose data are in main memory by then. Here each block is computed again in
the backward pass (`student.checkpointing`), which makes it resident a second time, and adapters stay on the device.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Container, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.common.errors import UserError
from fewstep.training.quantization import quantized_parts

ALIGNED = 256
"""Bytes that the place of a tensor in a block's memory is a multiple of."""


def swapped_blocks(network: nn.Module) -> list[nn.Module]:
    """Return the innermost blocks of a network: list entries of the classes that its own class does not split."""
    kinds = set(getattr(network, "_no_split_modules", None) or ())
    lists = [part for part in network.modules() if isinstance(part, nn.ModuleList)]
    found = {block: None for part in lists for block in part if type(block).__name__ in kinds}
    return [block for block in found if not any(inner in found for inner in block.modules() if inner is not block)]


def frozen_tensors(block: nn.Module) -> Iterator[tuple[Any, str]]:
    """Yield (owner, attribute) of the frozen tensors of a block: all but adapters."""
    for name, parameter in block.named_parameters():
        if "lora_" not in name:
            yield parameter, "data"
            yield from quantized_parts(parameter)


def view(memory: Tensor, start: int, like: Tensor) -> Tensor:
    """Return the bytes from `start` on as a tensor of the type, shape and strides of another, which is dense."""
    return memory[start : start + like.nbytes].view(like.dtype).as_strided(like.shape, like.stride())


def size_of(block: nn.Module) -> int:
    """Return the bytes that the frozen tensors of a block take in its memory."""
    return sum(-(-getattr(owner, name).nbytes // ALIGNED) * ALIGNED for owner, name in frozen_tensors(block))


class BlockMemory:
    """The frozen tensors of a block, moved to a piece of main memory.

    Args:
        memory: that piece, uint8 [`size_of(block)`].
    """

    def __init__(self, block: nn.Module, memory: Tensor) -> None:
        self.memory = memory
        self._places: list[tuple[Any, str, int, Tensor]] = []
        start = 0
        for owner, name in frozen_tensors(block):
            tensor: Tensor = getattr(owner, name)
            own = view(memory, start, tensor).copy_(tensor)
            self._places.append((owner, name, start, own))
            start += -(-tensor.nbytes // ALIGNED) * ALIGNED
        self.point_into(memory)

    def point_into(self, memory: Tensor) -> None:
        """Make the tensors views of a copy of the memory."""
        for owner, name, start, own in self._places:
            setattr(owner, name, view(memory, start, own))


def pin(memory: Tensor) -> None:
    """Pin main memory in place until its storage is freed; `pin_memory` would take the next power of two."""
    cuda: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    torch.cuda.check_error(int(cuda.cudaHostRegister(memory.data_ptr(), memory.nbytes, 0)))
    weakref.finalize(memory.untyped_storage(), cuda.cudaHostUnregister, memory.data_ptr()).atexit = False


class Slot:
    """Memory on the device for one block.

    Attributes:
        block: the one that it holds.
        copied: on a GPU, the event after the block's copy.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self.memory = torch.empty(size, dtype=torch.uint8, device=device)
        self.block: nn.Module | None = None
        self.copied: torch.cuda.Event | None = None


class OffloadedBlocks:
    """Blocks of a network whose frozen weights are in main memory, pinned beside a GPU.

    A block is copied to the device when it is called, or before: while a block runs, the one that followed it last time
    is copied by a stream of its own. Two slots of the largest block's size hold both. With gradient each block is
    recomputed in the backward pass. Autograd ends the backward pass of a block before it begins that of an earlier one,
    so the block's slot is free then.

    Args:
        network: in main memory; all but its blocks' frozen weights moves to `device`.
        recompute: calls a function on arguments, and again in the backward pass: `torch.utils.checkpoint.checkpoint`,
            or one that restores the role of the first call.

    Attributes:
        host_bytes: of the blocks, in main memory.
        device_bytes: of both slots.
        storages: addresses of the blocks' storages, in main memory and on the device.

    Raises:
        UserError: the network has no blocks.
    """

    def __init__(self, network: nn.Module, device: torch.device, recompute: Callable[..., Any]) -> None:
        blocks, gpu = swapped_blocks(network), device.type == "cuda"
        if not blocks:
            raise UserError(f"student.offload = True finds no blocks in a {type(network).__name__}; use False")
        sizes = [size_of(block) for block in blocks]
        memory = torch.empty(sum(sizes), dtype=torch.uint8)
        if gpu:
            pin(memory)
        self._device, self._recompute = device, recompute
        self._held = {b: BlockMemory(b, part) for b, part in zip(blocks, torch.split(memory, sizes), strict=True)}
        self._slots = [Slot(max(sizes), device) for _ in range(2)]
        self._stream = torch.cuda.Stream(device) if gpu else None  # type: ignore[no-untyped-call]
        self._last: tuple[nn.Module, bool] | None = None
        self._next: dict[tuple[nn.Module, bool], nn.Module] = {}
        self.host_bytes, self.device_bytes = sum(sizes), 2 * max(sizes)
        parts = (memory, *(slot.memory for slot in self._slots))
        self.storages = {part.untyped_storage().data_ptr() for part in parts}
        move_rest(network, device, self.storages)
        for block in self._held:
            block.forward = partial(self._run, block, block.forward)

    @property
    def resident(self) -> list[nn.Module]:
        """The blocks that are on the device, two at most."""
        return [slot.block for slot in self._slots if slot.block is not None]

    def _run(self, block: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call the own forward of a block with its weights on the device."""

        def resident(*args: Any, **kwargs: Any) -> Any:
            self._enter(block)
            return forward(*args, **kwargs)

        if torch.is_grad_enabled():
            return self._recompute(resident, *args, **kwargs)
        return resident(*args, **kwargs)

    def _enter(self, block: nn.Module) -> None:
        """Make a block resident, and begin to copy the one that followed it last time in the same direction."""
        here = block, torch._C._current_graph_task_id() >= 0  # whether it is recomputed in a backward pass
        if self._last is not None:
            self._next[self._last] = block
        slot = self._load(block)
        if slot.copied is not None:
            torch.cuda.current_stream(self._device).wait_event(slot.copied)
        self._last = here
        if here in self._next:
            self._load(self._next[here])

    @torch.no_grad()
    def _load(self, block: nn.Module) -> Slot:
        """Copy a block into the slot that the last block does not use, and return the slot that holds it."""
        for slot in self._slots:
            if slot.block is block:
                return slot
        slot = next(slot for slot in self._slots if self._last is None or slot.block is not self._last[0])
        if slot.block is not None:
            left = self._held[slot.block]
            left.point_into(left.memory)
        held = self._held[block]
        part = slot.memory[: held.memory.nbytes]
        if self._stream is None:
            part.copy_(held.memory)
        else:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))  # there the slot's last block is read
            with torch.cuda.stream(self._stream):
                part.copy_(held.memory, non_blocking=True)
            slot.copied = self._stream.record_event()
        held.point_into(part)
        slot.block = block
        return slot


@torch.no_grad()
def move_rest(network: nn.Module, device: torch.device, apart: Container[int]) -> None:
    """Move the tensors of a network to a device, but those in the storages `apart`."""
    for parameter in network.parameters():
        for owner, name in ((parameter, "data"), *quantized_parts(parameter)):
            tensor: Tensor = getattr(owner, name)
            if tensor.untyped_storage().data_ptr() not in apart:
                setattr(owner, name, tensor.to(device))
    for module in network.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
