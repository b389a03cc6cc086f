"""One way to get an Accelerator, for every training in a process."""

from __future__ import annotations

from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import InitProcessGroupKwargs

from fewstep.common.choices import Precision
from fewstep.common.device import pick_precision
from fewstep.common.errors import UserError

PATIENCE = timedelta(hours=6)
"""How long processes wait for each other. The main one judges students while the others wait, and shares of a data set
take longer in some than in others; the usual 10 minutes would end the run. A process that dies ends its launch at once
all the same."""


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
