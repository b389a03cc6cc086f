"""Distances between two points, per sample."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fewstep.common.choices import Weight
from fewstep.common.errors import UserError
from fewstep.diffusion.denoiser import Condition
from fewstep.diffusion.schedule import Path, VariancePreserving, expand
from fewstep.methods.pair import Scene

LEAST_PULL = 1e-6
"""Below it a jump goes nowhere: rounding is all that is left of its difference."""
FeaturesOf = Callable[[Tensor, Tensor, Condition], Sequence[Tensor]]
"""(x [B, ...], times [B], condition) -> feature maps [B, C, ...] of a frozen network, with gradient to x."""
NetworkDistance = Callable[[Tensor, Tensor, Tensor, Condition], Tensor]
"""A distance by a frozen network: (landed, wanted [B, ...], times [B], condition) -> [B], with gradient to landed."""


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


def implicit_pull(weight: Weight, path: Path, t: Tensor, s: Tensor) -> Tensor | None:
    """How far a change of eps, x0 or v at t moves the landing x_s of a first-order jump, float64 [B]; None for `none`.

    |df/deps| = alpha_s sigma_t/alpha_t - sigma_s, |df/dx0| = alpha_s - sigma_s alpha_t/sigma_t. Their squares differ by
    four orders of magnitude over a batch: gaps divided by them count every pair alike. `v` is x0's over sqrt(SNR + 1),
    the weight of v-prediction (MCM, arXiv 2403.06807). Where x_t is pure noise (alpha_t = 0, the flow path's start) eps
    moves the landing without bound: such a sample counts for nothing.
    """
    if weight in ("none", "step"):
        return None
    alpha_t, sigma_t, alpha_s, sigma_s = (part(when) for when in (t, s) for part in (path.alpha, path.sigma))
    if weight == "eps":
        return alpha_s * sigma_t / alpha_t - sigma_s
    pull = alpha_s - sigma_s * alpha_t / sigma_t
    return pull if weight == "x0" else pull / ((alpha_t / sigma_t).square() + 1).sqrt()


def noise_level(path: Path, t: Tensor) -> Tensor:
    """Return the noise level in which the step of `weight: step` is measured, float64, the shape of t.

    sigma on a variance exploding path and on a flow, where it is the time itself; sigma/alpha on an indexed path, whose
    points are those of a variance exploding one but for a factor.
    """
    return path.sigma(t) / path.alpha(t) if isinstance(path, VariancePreserving) else path.sigma(t)


def step_weight(path: Path, t_nk: Tensor, t_n: Tensor) -> Tensor:
    """Return improved consistency training's weight 1/(t_{n+1} - t_n) (arXiv 2310.14189, table 1), float64 [B].

    Times are measured as noise levels. A pair without a step (t_{n+k} is the end point) has weight 0.
    """
    width = noise_level(path, t_nk) - noise_level(path, t_n)
    return torch.where(width > 0, 1 / width, 0.0)


def network_distance_of(features: FeaturesOf) -> NetworkDistance:
    """The distance in a network's features."""

    def network_distance(landed: Tensor, wanted: Tensor, at: Tensor, condition: Condition) -> Tensor:
        mine = features(landed, at, condition)
        with torch.no_grad():
            theirs = features(wanted, at, condition)
        return feature_distance(mine, theirs)

    return network_distance


def implied_x0(scene: Scene, landed: Tensor, pull: Tensor) -> Tensor:
    """The x0 by which a first-order jump from x_{t_n+k} lands there: (x_s - (sigma_s/sigma_t) x_t)/(dx_s/dx0) (MCM's
    inverse DDIM step). A jump that went nowhere says nothing of x0: 0."""
    path, times = scene.denoiser.path, scene.times
    kept = expand(path.sigma(times.s) / path.sigma(times.t_nk), landed) * scene.x_nk
    return expand(torch.where(pull > LEAST_PULL, 1 / pull, 0.0), landed) * (landed - kept)


def distance(
    scene: Scene, landed: Tensor, wanted: Tensor, at: Tensor, network_distance: NetworkDistance | None = None
) -> Tensor:
    """The distance that the recipe names, between points at the times `at`, [B].

    Where the recipe has a weight, differences are divided by its pull; a frozen network then sees both points as the x0
    that they stand for. A sample whose pull is 0, which jumped nowhere, counts for nothing. The weight `step`
    multiplies the whole distance instead (`step_weight`).

    Raises:
        UserError: a frozen network is asked for where there is none.
    """
    found = _unweighted(scene, landed, wanted, at, network_distance)
    if scene.config.weight != "step":
        return found
    return expand(step_weight(scene.denoiser.path, scene.times.t_nk, scene.times.t_n), found) * found


def _unweighted(
    scene: Scene, landed: Tensor, wanted: Tensor, at: Tensor, network_distance: NetworkDistance | None
) -> Tensor:
    config, times = scene.config, scene.times
    pull = implicit_pull(config.weight, scene.denoiser.path, times.t_nk, times.s)
    if config.distance in ("features", "latent_lpips"):
        if network_distance is None:
            raise UserError(
                f"method.distance = {config.distance!r} needs a network that looks; the nearest legal one is 'l2'"
            )
        if pull is not None:
            landed, wanted = implied_x0(scene, landed, pull), implied_x0(scene, wanted, pull)
        return network_distance(landed, wanted, at, scene.sample.condition)
    gap = landed - wanted
    if pull is not None:
        gap = expand(torch.where(pull > LEAST_PULL, 1 / pull, 0.0), gap) * gap
    if config.distance == "huber":
        return huber(gap, config.huber_c)
    return huber_norm(gap, config.huber_c) if config.distance == "huber_norm" else l2(gap)
