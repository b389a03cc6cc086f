"""Counter of network function evaluations (NFE) during training."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from torch import Tensor

from fewstep.diffusion.denoiser import Call, Condition


class NfeCounter(Counter[str]):
    """Network evaluations by role, summed from batch sizes: no device synchronisation."""

    def counting(self, call: Call) -> Call:
        """Return the call with a counter around it."""

        def counted(x: Tensor, t: Tensor, condition: Condition, role: str) -> Tensor:
            self[role] += len(x)
            return call(x, t, condition, role)

        return counted


def in_words(calls: Mapping[str, float]) -> str:
    """Return evaluations by role as text: "12 (student 2, teacher 10)"."""
    parts = ", ".join(f"{role} {count:.4g}" for role, count in calls.items())
    return f"{sum(calls.values()):.4g} ({parts})"
