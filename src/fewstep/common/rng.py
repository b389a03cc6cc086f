"""Random numbers keyed by (seed, purpose, step, global sample index).

They do not depend on the rank, the world size, the micro-batch or earlier draws. A resumed run therefore repeats an
uninterrupted one, and any number of processes draws the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache, partial

import numpy as np
import torch
from torch import Tensor

from fewstep.common.device import copy_async
from fewstep.common.random_streams import generator

CPU = torch.device("cpu")

NoiseKey = tuple[str, tuple[int, ...]]
"""Purpose and shape of a row."""


@dataclass(frozen=True)
class KeyedRng:
    """Random numbers of one training step for the global sample indices `indices` [B], one row per sample.

    Noise is copied to `device` asynchronously; times, guidance and captions stay on the CPU, where schedules are
    computed.

    Attributes:
        steps: length of the run; None outside of a run, which counts as its end.
    """

    seed: int
    step: int
    indices: tuple[int, ...]
    device: torch.device = CPU
    steps: int | None = None
    _ahead: dict[NoiseKey, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    def reached(self, share: float) -> bool:
        """Return whether this step is at or after a share of the run."""
        return self.steps is None or self.step / self.steps >= share

    def _generators(self, purpose: str) -> Iterator[np.random.Generator]:
        """Yield `generator(seed, purpose, index, step)` of each sample.

        One generator is moved from stream to stream, which takes a quarter of the time of making one.
        """
        shared = generator(self.seed, purpose, step=self.step)
        state = shared.bit_generator.state
        counter = state["state"]["counter"]
        for index in self.indices:
            counter[2] = index
            shared.bit_generator.state = state
            yield shared

    def _normal(self, purpose: str, shape: tuple[int, ...]) -> Tensor:
        rows = [g.standard_normal(shape, dtype=np.float32) for g in self._generators(purpose)]
        return copy_async(torch.from_numpy(np.stack(rows)), self.device)

    def normal(self, purpose: str, shape: tuple[int, ...]) -> Tensor:
        """Return standard normal numbers, float32 [B, *shape], on the device."""
        held = self._ahead.pop((purpose, shape), None)
        return self._normal(purpose, shape) if held is None else held

    def draw_ahead(self, purpose: str, shape: tuple[int, ...]) -> None:
        """Draw the result of a later call of `normal` now, in the thread that prefetches batches."""
        self._ahead[purpose, shape] = self._normal(purpose, shape)

    def uniform(self, purpose: str, low: float = 0.0, high: float = 1.0) -> Tensor:
        """Return uniform numbers in [low, high), float64 [B]."""
        return torch.from_numpy(np.array([g.uniform(low, high) for g in self._generators(purpose)]))

    def integers(self, purpose: str, low: int, high: int) -> Tensor:
        """Return uniform integers in [low, high), int64 [B]."""
        return torch.from_numpy(np.array([g.integers(low, high) for g in self._generators(purpose)]))

    def shared(self, purpose: str, low: int, high: int) -> int:
        """Return one uniform integer in [low, high) for all samples of the step."""
        return int(generator(self.seed, purpose, step=self.step).integers(low, high))

    def chance(self, purpose: str, probability: float) -> Tensor:
        """Return True with the given probability, bool [B]."""
        return self.uniform(purpose) < probability


def order(seed: int, count: int, start: int, stop: int) -> np.ndarray:
    """Return the items, of `count`, at positions start..stop-1 of an endless shuffled pass, int64.

    Every epoch is a fresh permutation keyed by (seed, epoch).
    """
    return endless(partial(_shuffled, seed, count), count, start, stop)


def endless(epoch: Callable[[int], np.ndarray], length: int, start: int, stop: int) -> np.ndarray:
    """Return the items at positions start..stop-1 of the epochs, `length` items each, one after another, int64."""
    positions = np.arange(start, stop)
    epochs, offsets = positions // length, positions % length
    result = np.empty_like(positions)
    for number in np.unique(epochs):
        chosen = epochs == number
        result[chosen] = epoch(int(number))[offsets[chosen]]
    return result


@lru_cache(maxsize=2)  # a batch may span two epochs; a large set takes seconds to shuffle
def _shuffled(seed: int, count: int, epoch: int) -> np.ndarray:
    shuffled = generator(seed, "order", step=epoch).permutation(count)
    shuffled.flags.writeable = False
    return shuffled
