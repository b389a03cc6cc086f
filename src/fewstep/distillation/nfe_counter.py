"""Network evaluations, counted where they happen."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from torch import Tensor

from fewstep.diffusion.denoiser import Call, Condition


class NfeCounter:
    """How many samples each role was asked for. Counting is a sum of batch sizes: nothing waits for it."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()

    def add(self, role: str, count: int) -> None:
        """Note one call with a batch of `count`."""
        self._counts[role] += count

    def start(self, counts: Mapping[str, int]) -> None:
        """Start again from counts of before, or from nothing."""
        self._counts = Counter(counts)

    @property
    def counts(self) -> dict[str, int]:
        """Evaluations by role."""
        return dict(sorted(self._counts.items()))

    def counting(self, call: Call) -> Call:
        """The call, counted."""

        def counted(x: Tensor, t: Tensor, condition: Condition, role: str) -> Tensor:
            self.add(role, len(x))
            return call(x, t, condition, role)

        return counted


def in_words(calls: Mapping[str, float]) -> str:
    """Evaluations by role as text: "12 (student 2, teacher 10)"."""
    parts = ", ".join(f"{role} {count:.4g}" for role, count in calls.items())
    return f"{sum(calls.values()):.4g} ({parts})"
