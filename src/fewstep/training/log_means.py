"""Means for the log lines of one update, over steps, micro-batches and processes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fewstep.common.distributed import gather_to_main, rank, sum_over_processes, world_size
from fewstep.training.loss import Loss

T_BINS = 10
"""Bins of t/T in which the loss is reported."""


class LogMeans:
    """Sums since the last log line, kept on the device.

    They are saved with a checkpoint, so that a resumed run logs the same figures as an uninterrupted one.

    Args:
        prefix: the update's name, before those of its figures.
    """

    def __init__(self, prefix: str, device: torch.device) -> None:
        self._prefix = prefix
        self._device = device
        self._reset()

    def _reset(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self._weights: dict[str, float] = {}
        self._bin_sum = torch.zeros(T_BINS, device=self._device)
        self._bin_count = torch.zeros(T_BINS, device=self._device)

    def add(self, name: str, value: Tensor, parts: int = 1) -> None:
        """Add a figure of one of `parts` micro-batches of a step in each process; a whole step has weight 1."""
        weight = 1 / (parts * world_size())
        self.sums[name] = self.sums.get(name, torch.zeros((), device=self._device)) + weight * value.detach().float()
        self._weights[name] = self._weights.get(name, 0.0) + weight

    def add_loss(self, loss: Loss, parts: int) -> None:
        """Add a micro-batch's loss, its values by bin of t/T, and its further scalars."""
        self.add("loss", loss.value, parts)
        if loss.per_sample is not None and loss.t is not None:
            index = (loss.t * T_BINS).long().clamp(0, T_BINS - 1).to(self._device, non_blocking=True)
            self._bin_sum.index_add_(0, index, loss.per_sample.detach().float())
            self._bin_count.index_add_(0, index, torch.ones_like(loss.per_sample, dtype=torch.float32))
        for name, value in loss.scalars.items():
            self.add(name, value, parts)

    def _message(self) -> Tensor:
        """Return the sums of this process by name and by bin, and the number of samples in each bin."""
        return torch.cat([*(value.reshape(1) for value in self.sums.values()), self._bin_sum, self._bin_count])

    def _totals(self) -> tuple[dict[str, tuple[float, float]], list[tuple[float, float]]]:
        """Return sums and weights by name and by bin, over all processes; waits for the device."""
        weights = torch.tensor(list(self._weights.values()), device=self._device)
        numbers = sum_over_processes(torch.cat([weights, self._message()])).tolist()  # one message
        n = len(weights)
        by_name = dict(zip(self.sums, zip(numbers[n : 2 * n], numbers[:n], strict=True), strict=True))
        bins = numbers[2 * n :]
        return by_name, list(zip(bins[:T_BINS], bins[T_BINS:], strict=True))

    def not_finite(self) -> list[str]:
        """Return the names of figures that are not finite in any process (a collective)."""
        return [f"{self._prefix}/{name}" for name, (value, _) in self._totals()[0].items() if not math.isfinite(value)]

    def read(self) -> dict[str, float]:
        """Return the means over all processes (a collective) and start anew."""
        by_name, bins = self._totals()
        means = {f"{self._prefix}/{name}": value / weight for name, (value, weight) in by_name.items()}
        for index, (value, count) in enumerate(bins):
            if count:
                means[f"{self._prefix}/loss_t{index / T_BINS:.1f}"] = value / count
        self._reset()
        return means

    def state(self) -> dict[str, Any]:
        """Return the sums of every process for a checkpoint (a collective); complete in the main process."""
        if not self.sums:
            return {}
        return {"weighed": self._weights, "processes": gather_to_main(self._message()[None], world_size()).tolist()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Read the result of `state`; another number of processes shares the sums out."""
        before, now = state["processes"], world_size()
        numbers = torch.tensor([*before[rank() :: now], [0.0] * len(before[0])]).sum(0).to(self._device)
        sums, self._bin_sum, self._bin_count = torch.split(numbers, [len(state["weighed"]), T_BINS, T_BINS])
        self.sums = dict(zip(state["weighed"], sums, strict=True))
        self._weights = {name: weight * len(before) / now for name, weight in state["weighed"].items()}
