"""The result of a loss function, the interface between methods and the loop."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class Loss:
    """Result of a loss function.

    Attributes:
        value: the scalar to minimise, the mean over the micro-batch.
        per_sample: [B], for the log of the loss by bin of t/T.
        t: [B] in [0, 1], t/T of each sample.
        scalars: further scalars to log; same names and order in every process.
    """

    value: Tensor
    per_sample: Tensor | None = None
    t: Tensor | None = None
    scalars: Mapping[str, Tensor] = field(default_factory=dict)
