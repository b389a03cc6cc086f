"""Times of things that are run in turn, so that what slows the machine slows all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch


def settled(device: torch.device) -> float:
    """Return the time after the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@dataclass(frozen=True)
class Timed:
    """Seconds of one contender, a number each round."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle one."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> tuple[float, float]:
        """The quartiles."""
        low, _, high = statistics.quantiles(self.seconds, n=4)
        return low, high


def in_turn(contenders: Mapping[str, Callable[[], None]], device: torch.device) -> dict[str, float]:
    """Seconds of each contender, run once, in its own precision whatever the autocast around it.

    An autocast block keeps the weights that it has converted until the outermost one ends: contenders within one would
    reuse each other's conversions, and those of a step before.
    """
    found = {}
    for name, run in contenders.items():
        with torch.autocast(device.type, enabled=False):
            torch.clear_autocast_cache()
            start = settled(device)
            run()
            found[name] = settled(device) - start
            torch.clear_autocast_cache()
    return found


def rounds(
    contenders: Mapping[str, Callable[[], None]], device: torch.device, count: int, warm: int = 1
) -> dict[str, Timed]:
    """All contenders in turn, `count` times after `warm` rounds that are not counted; every other round backwards."""
    found: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    for number in range(warm + count):
        ordered = names if number % 2 else names[::-1]
        for name, seconds in in_turn({name: contenders[name] for name in ordered}, device).items():
            if number >= warm:
                found[name].append(seconds)
    return {name: Timed(tuple(seconds)) for name, seconds in found.items()}


def ratio(over: Sequence[Timed], under: Sequence[Timed]) -> tuple[float, float, float]:
    """Median and quartiles over rounds of the sum of some over the sum of others, round by round."""
    tops = [sum(round_) for round_ in zip(*(timed.seconds for timed in over), strict=True)]
    bottoms = [sum(round_) for round_ in zip(*(timed.seconds for timed in under), strict=True)]
    shares = [top / bottom for top, bottom in zip(tops, bottoms, strict=True)]
    low, middle, high = statistics.quantiles(shares, n=4)
    return middle, low, high
