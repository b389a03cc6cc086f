"""Devices, precisions and free memory."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Literal, cast, get_args

import psutil
import torch
from torch import Tensor

from fewstep.common.choices import Precision, check_choice, check_device
from fewstep.common.errors import UserError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""A precision's name -> torch's type."""


def pick_device(name: str) -> torch.device:
    """Return the device of a name; auto is cuda where there is one.

    Raises:
        UserError: another name than auto, cpu, cuda, or cuda without a GPU.
    """
    check_device(name)
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device = 'cuda' is not available on this machine; use 'cpu'")
    return torch.device(name)


def pick_precision(name: str, device: torch.device, field: str = "precision") -> Literal["fp32", "bf16", "fp16"]:
    """Return the precision of a name; auto is bf16 on a GPU and on a CPU with bf16 instructions, else fp32.

    Args:
        field: setting that holds the name, for errors.

    Raises:
        UserError: an unknown name, or fp16 on a CPU.
    """
    check_choice(field, name, get_args(Precision))
    if name == "fp16" and device.type == "cpu":
        raise UserError(f"{field} = 'fp16' needs a GPU; use 'bf16'")
    if name != "auto":
        return cast(Literal["fp32", "bf16", "fp16"], name)
    # a CPU without such instructions emulates bf16, slower than fp32
    cpuinfo = Path("/proc/cpuinfo")
    flags = set(cpuinfo.read_text().split()) if cpuinfo.is_file() else set()
    fast = device.type == "cuda" or flags & {"amx_bf16", "avx512_bf16"}
    return "bf16" if fast else "fp32"


def pick_compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return torch's dtype of a precision on `device`, see `pick_precision`."""
    return DTYPES[pick_precision(name, device)]


MOST_FILLED = 0.9
"""Share of the free memory that estimates may use."""


def free_memory(device: torch.device) -> int:
    """Return the free bytes of a GPU, or of the main memory that this process may use."""
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
    """Copy a CPU tensor to `device` asynchronously (pinned memory, non_blocking)."""
    if device.type == "cuda" and not tensor.is_cuda:
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
