"""One way to get an Accelerator, for every training in a process."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Literal

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import InitProcessGroupKwargs

from fewstep.errors import UserError, nearest
from fewstep.names import Precision

DEVICES = ("auto", "cpu", "cuda")

PATIENCE = timedelta(hours=6)
"""How long processes wait for each other. The main one encodes a data set and judges students while the others wait;
the usual 10 minutes would end the run. A process that dies ends its launch at once all the same."""


def make_accelerator(precision: Precision, device: torch.device) -> Accelerator:
    """Return an Accelerator for loop.precision on `device`.

    Accelerate keeps its first settings for the life of the process and refuses others; a notebook that trains
    twice needs them forgotten. The processes themselves stay as they were launched.

    Raises:
        UserError: fp16 without a GPU.
    """
    precision = pick_precision(precision, device)
    if precision == "fp16" and device.type == "cpu":
        raise UserError("loop.precision = 'fp16' needs a GPU; the nearest legal one is 'bf16'")
    moved = bool(PartialState._shared_state) and PartialState().device.type != device.type
    AcceleratorState._reset_state(reset_partial_state=moved)
    mixed = "no" if precision == "fp32" else precision
    patience = InitProcessGroupKwargs(timeout=PATIENCE)
    return Accelerator(mixed_precision=mixed, cpu=device.type == "cpu", kwargs_handlers=[patience])


def pick_device(name: str) -> torch.device:
    """auto -> cuda where there is one.

    Raises:
        UserError: another name than auto, cpu, cuda, or cuda asked for and absent.
    """
    if name not in DEVICES:
        raise UserError(
            f"device = {name!r} is not one of {', '.join(DEVICES)}; the nearest is {nearest(name, DEVICES)!r}"
        )
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


def _has_bf16_units() -> bool:
    """Whether the CPU multiplies bf16 matrices in hardware; others emulate it, slower than fp32."""
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.is_file() and "amx_bf16" in cpuinfo.read_text()
