"""Where networks run, and in what precision."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Literal, cast, get_args

import psutil
import torch
from torch import Tensor

from fewstep.common.choices import Precision, check_device
from fewstep.common.errors import UserError, nearest

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""A precision's name -> torch's type."""


def pick_device(name: str) -> torch.device:
    """auto -> cuda where there is one.

    Raises:
        UserError: another name than auto, cpu, cuda, or cuda asked for and absent.
    """
    check_device(name)
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device = 'cuda' is not there on this machine; the nearest legal one is 'cpu'")
    return torch.device(name)


def pick_precision(name: Precision, device: torch.device) -> Literal["fp32", "bf16", "fp16"]:
    """auto -> bf16 on a GPU and on a CPU with matrix units for it, else fp32."""
    if name != "auto":
        return name
    return "bf16" if device.type == "cuda" or _has_bf16_units() else "fp32"


def pick_compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """The type that a network draws in on `device`.

    Raises:
        UserError: an unknown precision, or fp16 on a CPU.
    """
    legal = get_args(Precision)
    if name not in legal:
        raise UserError(
            f"precision = {name!r} is not one of {', '.join(legal)}; the nearest is {nearest(name, legal)!r}"
        )
    if name == "fp16" and device.type == "cpu":
        raise UserError("precision = 'fp16' needs a GPU; the nearest legal one is 'bf16'")
    return DTYPES[pick_precision(cast(Precision, name), device)]


MOST_FILLED = 0.9
"""Share of the free memory that may be planned with."""


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a GPU, or in the main memory that this process may use."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    free = int(psutil.virtual_memory().available)
    group = Path("/sys/fs/cgroup")  # of a container
    with suppress(OSError, ValueError):
        most, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
        free = min(free, most - used)
    return free


def copy_async(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU's, on its way to `device`: nobody waits until it is there.

    A GPU fetches page-locked memory alone by itself; of other memory the CPU would hand over every byte.
    """
    if device.type == "cuda" and not tensor.is_cuda:
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def _has_bf16_units() -> bool:
    """Whether the CPU multiplies bf16 matrices in hardware; others emulate it, slower than fp32."""
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.is_file() and "amx_bf16" in cpuinfo.read_text()
