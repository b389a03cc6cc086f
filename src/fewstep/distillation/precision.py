"""Precision of network evaluations outside a training step."""

from __future__ import annotations

import torch

from fewstep.common.device import DTYPES, pick_precision
from fewstep.distillation.config import DistillConfig


def precision_outside(config: DistillConfig, device: torch.device) -> tuple[torch.dtype, str]:
    """Return the precision of network evaluations outside a step, for validation and stored trajectories.

    It is fp32 unless the weights are kept or gathered in bf16.

    Returns:
        the type of the computation, and a word for the keys of cached results; empty if all is fp32.
    """
    base, precision = config.student.base, pick_precision(config.loop.precision, device, "loop.precision")
    computed = DTYPES[precision if base == "bf16" or config.loop.shard else "fp32"]
    whole = base == "fp32" and computed == torch.float32
    return computed, "" if whole else f"{base} {precision}"
