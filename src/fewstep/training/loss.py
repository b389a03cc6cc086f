"""What a loss hands the loop: the one thing that objectives and training share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class Loss:
    """What a loss function returns.

    Attributes:
        value: the scalar to minimise, the mean over the micro-batch.
        per_sample: [B], for the loss by timestep bin.
        t: [B] in [0, 1], the share t/T of each sample.
        scalars: further scalars to log; of the same names in the same order in every process.
    """

    value: Tensor
    per_sample: Tensor | None = None
    t: Tensor | None = None
    scalars: Mapping[str, Tensor] = field(default_factory=dict)
