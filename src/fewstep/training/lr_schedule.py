"""Learning-rate schedules; importable without torch."""

from __future__ import annotations

import math

from fewstep.training.config import OptimConfig

COOLDOWN = 0.2
"""Share of the steps over which the `cooldown` schedule falls to 0."""


def learning_rate(config: OptimConfig, step: int, steps: int) -> float:
    """Return the rate of update number `step` (0-based) out of `steps`."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    share = (step - config.warmup) / max(1, steps - config.warmup)
    if config.decay == "cosine":
        return config.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, share)))
    if config.decay == "linear":
        return config.lr * max(0.0, 1 - share)
    if config.decay == "cooldown":
        return config.lr * min(1.0, max(0.0, 1 - share) / COOLDOWN)
    return config.lr
