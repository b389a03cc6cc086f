"""Distances between two landings, per sample."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from fewstep.common.choices import Weight
from fewstep.common.errors import UserError
from fewstep.diffusion.denoiser import Condition
from fewstep.diffusion.schedule import Path, VariancePreserving, expand
from fewstep.diffusion.time_conditioning import WIDTH, sinusoid
from fewstep.methods.pair import Pair

MIN_DERIVATIVE = 1e-6
"""Below it a jump moves nothing and the difference of two landings is rounding."""
FeaturesOf = Callable[[Tensor, Tensor, Condition], Sequence[Tensor]]
"""(x [B, ...], times [B], condition) -> feature maps [B, C, ...] of a frozen network, with gradient to x."""
Weigh = Callable[[Tensor, Tensor], Tensor]
"""(loss of each sample [B], its times as shares of the path, float64 [B]) -> the weighted loss [B]."""
NetworkDistance = Callable[[Tensor, Tensor, Tensor, Condition], Tensor]
"""A distance by a frozen network: (landed, wanted [B, ...], times [B], condition) -> [B], with gradient to landed."""


def l2(gap: Tensor) -> Tensor:
    """Return the mean square of a difference over all axes but the first, [B]."""
    return gap.square().flatten(1).mean(1)


def huber(gap: Tensor, c: float) -> Tensor:
    """Return LCM's element-wise pseudo-Huber distance sqrt(gap^2 + c^2) - c, mean over all axes but the first, [B].

    The released c = 1e-3 makes it nearly L1.
    """
    return (torch.sqrt(gap.square() + c * c) - c).flatten(1).mean(1)


def huber_norm(gap: Tensor, c: float) -> Tensor:
    """Return iCT's pseudo-Huber distance of whole samples, sqrt(|gap|^2 + C^2) - C (arXiv 2310.14189, eq 7), [B].

    C = c sqrt(dimension), with c = .00054 in the paper. With a small c it is the unsquared L2 norm.
    """
    flat = gap.flatten(1)
    wide = c * flat.shape[1] ** 0.5
    length: Tensor = (flat.square().sum(1) + wide * wide).sqrt()
    result: Tensor = length - wide
    return result


def normalised(gap: Tensor, c: float) -> Tensor:
    """Return sCM's squared error with the target's gap scaled to length 1, |gap/(rms + c)|^2 (arXiv 2410.11081), [B].

    The scale is a constant of the gradient, 2 gap/(rms + c), which is bounded for large gaps. rms is that of a sample,
    as released, so that c does not depend on the dimension.
    """
    still = gap.detach()
    rms = still.square().flatten(1).mean(1).sqrt()
    return l2(gap - still + still / expand(rms + c, gap))


def adaptive(gap: Tensor, c: float, power: float) -> Tensor:
    """Return MeanFlow's adaptive squared error |gap|^2/sg(|gap|^2 + c)^p of whole samples (arXiv 2505.13447), [B].

    Equation 22. p = 1 weighs samples by 1/|gap|^2, so that small gaps have the largest gradient; with p = 1/2 all have
    the same.
    """
    square = gap.square().flatten(1).sum(1)
    return square / (square.detach() + c) ** power


def unit(x: Tensor) -> Tensor:
    """Scale a map's vectors over the channels to length 1, [B, C, ...]; zeros stay zero."""
    return x / (x.square().sum(1, keepdim=True) + 1e-10).sqrt()


def feature_distance(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """Return LPIPS's distance without its learned weights (arXiv 1801.03924, eq 1), [B].

    Each map's vectors are normalised over the channels. Squared differences are summed over the channels, averaged over
    the places and summed over the maps.
    """
    parts = [(unit(x) - unit(y)).square().sum(1).flatten(1).mean(1) for x, y in zip(a, b, strict=True)]
    return torch.stack(parts).sum(0)


def network_distance_of(features: FeaturesOf) -> NetworkDistance:
    """Return the distance in a network's features."""

    def network_distance(landed: Tensor, wanted: Tensor, at: Tensor, condition: Condition) -> Tensor:
        of_landed = features(landed, at, condition)
        with torch.no_grad():
            of_wanted = features(wanted, at, condition)
        return feature_distance(of_landed, of_wanted)

    return network_distance


def landing_derivative(weight: Weight, path: Path, t: Tensor, s: Tensor) -> Tensor | None:
    """Return the derivative of a first-order jump's landing x_s by an output at t, float64 [B]; None for `none`.

    |df/deps| = alpha_s sigma_t/alpha_t - sigma_s, |df/dx0| = alpha_s - sigma_s alpha_t/sigma_t. Their squares differ by
    four orders of magnitude over a batch: differences divided by them weigh all pairs alike. `v` is x0's divided by
    sqrt(SNR + 1), the weight of v-prediction (MCM, arXiv 2403.06807); `velocity` is that by eps - x0, on a flow t - s.
    It is infinite for eps from pure noise (alpha_t = 0), so that such a sample has weight 0.
    """
    if weight in ("none", "step", "learned"):
        return None
    alpha_t, sigma_t, alpha_s, sigma_s = (part(when) for when in (t, s) for part in (path.alpha, path.sigma))
    if weight == "eps":
        return alpha_s * sigma_t / alpha_t - sigma_s
    by_x0 = alpha_s - sigma_s * alpha_t / sigma_t
    if weight == "velocity":
        return by_x0 * sigma_t / (alpha_t + sigma_t)
    return by_x0 if weight == "x0" else by_x0 / ((alpha_t / sigma_t).square() + 1).sqrt()


def _inverse(derivative: Tensor, like: Tensor) -> Tensor:
    """Return 1/derivative, and 0 where the jump moves nothing, in the rank and type of `like`."""
    return expand(torch.where(derivative > MIN_DERIVATIVE, 1 / derivative, 0.0), like)


def implied_x0(pair: Pair, landed: Tensor, derivative: Tensor) -> Tensor:
    """Return the x0 by which a first-order jump from x_{t_n+k} lands there; 0 for a jump that moves nothing.

    (x_s - (sigma_s/sigma_t) x_t)/(dx_s/dx0), MCM's inverse DDIM step (arXiv 2403.06807, section 3).
    """
    path, times = pair.denoiser.path, pair.times
    kept = expand(path.sigma(times.s) / path.sigma(times.t_nk), landed) * pair.x_nk
    return _inverse(derivative, landed) * (landed - kept)


def step_weight(path: Path, t_nk: Tensor, t_n: Tensor) -> Tensor:
    """Return iCT's weight 1/(t_{n+1} - t_n) in noise levels (arXiv 2310.14189, table 1), float64 [B]; 0 for no step.

    The noise level is sigma on variance exploding and flow paths, sigma/alpha on indexed ones.
    """
    above, below = (
        path.sigma(t) / path.alpha(t) if isinstance(path, VariancePreserving) else path.sigma(t) for t in (t_nk, t_n)
    )
    width = above - below
    return torch.where(width > 0, 1 / width, 0.0)


class LearnedWeight(nn.Module):
    """sCM's adaptive weight e^w of the loss L, by w(t) that minimises e^w L - w (arXiv 2410.11081, eq 8; EDM2).

    Its minimum is e^-w = E[L | t]: each time weighs alike. w is linear in a sinusoid of the time, and 0 at first.
    """

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, 1)
        nn.init.zeros_(self.layer.weight)
        nn.init.zeros_(self.layer.bias)

    def forward(self, loss: Tensor, t_share: Tensor) -> Tensor:
        """Return e^w L - w, [B]."""
        with torch.autocast(loss.device.type, enabled=False):
            times = (1000 * t_share).to(self.layer.weight.device, non_blocking=True)
            w = self.layer(sinusoid(times))[:, 0].to(loss.dtype)
        weighted: Tensor = w.exp() * loss - w
        return weighted


def distance(
    pair: Pair, landed: Tensor, wanted: Tensor, at: Tensor, network_distance: NetworkDistance | None = None
) -> Tensor:
    """Return the recipe's weighted distance between points [B, ...] at the times `at`, [B].

    Weights by an output (eps, x0, v, velocity) divide the difference by the landing's derivative; a frozen network then
    takes the x0 that both landings imply. The weight `step` multiplies the distance (`step_weight`).

    Raises:
        UserError: the distance needs a frozen network, and there is none.
    """
    config, path, times = pair.config, pair.denoiser.path, pair.times
    derivative = landing_derivative(config.weight, path, times.t_nk, times.s)
    if config.distance in ("features", "latent_lpips"):
        if network_distance is None:
            name = f"method.distance = {config.distance!r}"
            raise UserError(f"{name} needs a frozen network; use 'l2'", field="method.distance")
        if derivative is not None:
            landed, wanted = implied_x0(pair, landed, derivative), implied_x0(pair, wanted, derivative)
        found = network_distance(landed, wanted, at, pair.batch.condition)
    else:
        gap = landed - wanted
        if derivative is not None:
            gap = _inverse(derivative, gap) * gap
        scaled: dict[str, Callable[[Tensor, float], Tensor]] = {
            **{"huber": huber, "huber_norm": huber_norm, "normalised": normalised},
            "adaptive": partial(adaptive, power=config.adaptive_power),
        }
        found = scaled[config.distance](gap, config.huber_c) if config.distance in scaled else l2(gap)
    if config.weight != "step":
        return found
    return expand(step_weight(path, times.t_nk, times.t_n), found) * found
