"""The Accelerator of every training in a process."""

from __future__ import annotations

from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import InitProcessGroupKwargs

from fewstep.common.choices import Precision
from fewstep.common.device import pick_precision

TIMEOUT = timedelta(hours=6)
"""Timeout of collectives: while the main process validates, the others wait longer than the default of 10 minutes. A
process that dies ends its launch at once all the same."""


def make_accelerator(precision: Precision, device: torch.device) -> Accelerator:
    """Return an Accelerator for loop.precision on `device`.

    Accelerate keeps its first settings for the life of the process; they are reset, so that a notebook can train twice.

    Raises:
        UserError: fp16 without a GPU.
    """
    precision = pick_precision(precision, device, "loop.precision")
    moved = bool(PartialState._shared_state) and PartialState().device.type != device.type
    AcceleratorState._reset_state(reset_partial_state=moved)
    mixed = "no" if precision == "fp32" else precision
    timeout = InitProcessGroupKwargs(timeout=TIMEOUT)
    return Accelerator(mixed_precision=mixed, cpu=device.type == "cpu", kwargs_handlers=[timeout])
