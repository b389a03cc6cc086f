"""Distances between two points, per sample."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fewstep.denoiser import Condition
from fewstep.errors import UserError
from fewstep.method_settings import ConsistencyConfig
from fewstep.schedule import expand

LEAST_PULL = 1e-6
"""Below it a jump goes nowhere: rounding is all that is left of its difference."""
FeaturesOf = Callable[[Tensor, Tensor, Condition], Sequence[Tensor]]
"""(x [B, ...], times [B], condition) -> feature maps [B, C, ...] of a frozen network, with gradient to x."""


def l2(gap: Tensor) -> Tensor:
    """Mean square of a difference over all axes but the first, [B]."""
    return gap.square().flatten(1).mean(1)


def huber(gap: Tensor, c: float) -> Tensor:
    """LCM's element-wise pseudo-Huber distance sqrt(gap^2 + c^2) - c, mean over all axes but the first, [B].

    c = 1e-3 (the released value) makes it nearly L1.
    """
    return (torch.sqrt(gap.square() + c * c) - c).flatten(1).mean(1)


def huber_norm(gap: Tensor, c: float) -> Tensor:
    """Improved consistency training's pseudo-Huber distance of whole samples (arXiv 2310.14189, eq 7), [B].

    sqrt(|gap|^2 + C^2) - C with C = c sqrt(dimension); their c is .00054. Not the element-wise one: there every
    number is cut off at c, here a sample is at C. With a small c it is the unsquared L2 norm.
    """
    flat = gap.flatten(1)
    wide = c * flat.shape[1] ** 0.5
    length: Tensor = (flat.square().sum(1) + wide * wide).sqrt()
    result: Tensor = length - wide
    return result


def feature_distance(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """LPIPS's form without its learned weights (arXiv 1801.03924): each map's vectors are brought to length 1 over the
    channels, squared differences are summed over these, averaged over the places and summed over the maps, [B]."""

    def unit(x: Tensor) -> Tensor:
        return x / (x.square().sum(1, keepdim=True) + 1e-10).sqrt()

    parts = [(unit(x) - unit(y)).square().sum(1).flatten(1).mean(1) for x, y in zip(a, b, strict=True)]
    return torch.stack(parts).sum(0)


def distance(
    config: ConsistencyConfig,
    landed: Tensor,
    wanted: Tensor,
    at: Tensor,
    condition: Condition,
    features: FeaturesOf | None,
    pull: Tensor | None = None,
) -> Tensor:
    """The distance that the recipe names, between points at the times `at`, [B].

    Args:
        pull: what differences are divided by, float64 [B]; a sample whose pull is 0, which jumped nowhere, counts for
            nothing.

    Raises:
        UserError: `features` where the backbone has none.
    """
    gap = landed - wanted
    if pull is not None:
        gap = expand(torch.where(pull > LEAST_PULL, 1 / pull, 0.0), gap) * gap
    if config.distance == "l2":
        return l2(gap)
    if config.distance == "huber":
        return huber(gap, config.huber_c)
    if config.distance == "huber_norm":
        return huber_norm(gap, config.huber_c)
    if features is None:
        raise UserError("method.distance = 'features' needs a backbone with features; the nearest legal one is 'l2'")
    mine = features(landed, at, condition)
    with torch.no_grad():
        theirs = features(wanted, at, condition)
    return feature_distance(mine, theirs)
