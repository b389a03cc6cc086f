"""Precision of the calls outside of a training step."""

from __future__ import annotations

import torch

from fewstep.common.device import DTYPES, pick_precision
from fewstep.distillation.config import DistillConfig


def asked_outside(config: DistillConfig, device: torch.device) -> tuple[torch.dtype, str]:
    """How networks are asked outside of a step, for quality checks and stored walks.

    In fp32 wherever their weights can be: those that are kept in bf16, or gathered in it, meet no other type.

    Returns:
        the type that they compute in, and a word that tells a teacher's answers from those of the whole one in fp32;
        empty for that one.
    """
    base, precision = config.student.base, pick_precision(config.loop.precision, device)
    computed = DTYPES[precision if base == "bf16" or config.loop.shard else "fp32"]
    whole = base == "fp32" and computed == torch.float32
    return computed, "" if whole else f"{base} {precision}"
