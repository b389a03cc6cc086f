"""Noise paths, and conversions of a network's output on them.

A path is x_t = alpha_t x_0 + sigma_t eps. Its half log-SNR is lambda_t = log(alpha_t / sigma_t), as in
DPM-Solver. Times are float64 tensors of any shape, in the units of the path:

- variance preserving: the training index of the network, 0 .. T-1. Index i has seen i+1 noising steps, so
  clean data is t = -1. Between integers log(alpha_t^2) is linear;
- flow matching: t in [0, 1], clean at 0;
- variance exploding (EDM): t is sigma itself, clean at 0.

All functions compute in float64 on the CPU; `expand` copies coefficients to the device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fewstep.common.choices import Prediction

PURE_NOISE = 1e-6
"""alpha below which x_t counts as pure noise: dividing by alpha does not recover x_0."""
NO_SIGNAL = math.log(PURE_NOISE**4)
"""log(alpha_t^2) in place of alpha_t = 0 (zero terminal SNR): finite, since it is interpolated."""


@dataclass(frozen=True)
class VariancePreserving:
    """alpha^2 + sigma^2 = 1 on T training indices.

    `log_alpha_bar` is log(alpha_i^2) for i = -1 .. T-1, [T+1].
    """

    log_alpha_bar: Tensor
    clean: ClassVar[float] = -1.0
    least: ClassVar[float] = 0.0

    @staticmethod
    def from_betas(betas: Tensor) -> VariancePreserving:
        """Build from DDPM's betas [T]: alpha_i^2 = prod_{j <= i} (1 - beta_j)."""
        steps = torch.log1p(-betas.double())
        return VariancePreserving(torch.cat([steps.new_zeros(1), steps.cumsum(0).clamp(min=NO_SIGNAL)]))

    @staticmethod
    def from_alphas_cumprod(alphas_cumprod: Tensor) -> VariancePreserving:
        """Build from a scheduler's own table alpha_i^2, [T], for exact parity with it."""
        table = alphas_cumprod.double().log().clamp(min=NO_SIGNAL)
        return VariancePreserving(torch.cat([table.new_zeros(1), table]))

    @property
    def noisiest(self) -> float:
        """T - 1."""
        return float(len(self.log_alpha_bar) - 2)

    def _log_alpha_bar(self, t: Tensor) -> Tensor:
        table = self.log_alpha_bar
        place = (t.double() + 1).clamp(0, len(table) - 1)
        low = place.floor().long().clamp(max=len(table) - 2)
        return torch.lerp(table[low], table[low + 1], place - low)

    def alpha(self, t: Tensor) -> Tensor:
        """Return alpha_t."""
        return torch.exp(0.5 * self._log_alpha_bar(t))

    def sigma(self, t: Tensor) -> Tensor:
        """Return sigma_t, without cancellation near clean data."""
        return torch.sqrt(-torch.expm1(self._log_alpha_bar(t)))

    def log_snr(self, t: Tensor) -> Tensor:
        """Return lambda_t; infinite on clean data."""
        log_alpha_bar = self._log_alpha_bar(t)
        return 0.5 * (log_alpha_bar - torch.log(-torch.expm1(log_alpha_bar)))

    def time_of(self, log_snr: Tensor) -> Tensor:
        """Return the time of a given lambda, clamped to the path's ends; exact inverse of `log_snr`."""
        table = self.log_alpha_bar
        wanted = -torch.nn.functional.softplus(-2 * log_snr.double())
        # the table falls; searchsorted wants it to rise
        high = torch.searchsorted(-table, -wanted).clamp(1, len(table) - 1)
        share = (table[high - 1] - wanted) / (table[high - 1] - table[high])
        return high - 2 + share.clamp(0, 1)


@dataclass(frozen=True)
class FlowMatching:
    """alpha = 1 - sigma (rectified flow), sigma = shift t / (1 + (shift - 1) t).

    With a shift of 1 the time is sigma itself. Stable Diffusion 3 and Flux space their times by a shift (3 for the
    former): even in t, they are denser where there is more noise. Networks take 1000 sigma as their time.
    """

    shift: float = 1.0
    clean: ClassVar[float] = 0.0
    least: ClassVar[float] = 1e-3
    noisiest: ClassVar[float] = 1.0

    def alpha(self, t: Tensor) -> Tensor:
        """Return 1 - sigma, without cancellation near noise."""
        return (1 - t.double()) / (1 + (self.shift - 1) * t.double())

    def sigma(self, t: Tensor) -> Tensor:
        """Return the share of noise."""
        return self.shift * t.double() / (1 + (self.shift - 1) * t.double())

    def log_snr(self, t: Tensor) -> Tensor:
        """Return log((1 - sigma)/sigma); infinite at both ends."""
        return torch.log1p(-t.double()) - torch.log(self.shift * t.double())

    def time_of(self, log_snr: Tensor) -> Tensor:
        """Return the time of a given lambda: sigmoid(-lambda - log shift)."""
        return torch.sigmoid(-log_snr.double() - math.log(self.shift))


@dataclass(frozen=True)
class VarianceExploding:
    """alpha = 1, sigma = t (EDM), up to `sigma_max`; grids of times end at `sigma_min`."""

    sigma_max: float = 80.0
    sigma_min: float = 0.002
    clean: ClassVar[float] = 0.0

    @property
    def least(self) -> float:
        """`sigma_min`."""
        return self.sigma_min

    @property
    def noisiest(self) -> float:
        """`sigma_max`."""
        return self.sigma_max

    def alpha(self, t: Tensor) -> Tensor:
        """Return 1."""
        return torch.ones_like(t, dtype=torch.float64)

    def sigma(self, t: Tensor) -> Tensor:
        """Return t."""
        return t.double()

    def log_snr(self, t: Tensor) -> Tensor:
        """Return -log t."""
        return -torch.log(t.double())

    def time_of(self, log_snr: Tensor) -> Tensor:
        """Return the time of a given lambda, e^{-lambda}."""
        return torch.exp(-log_snr.double())


Path = VariancePreserving | FlowMatching | VarianceExploding
"""A noise path; `clean` (sigma = 0) and `noisiest` are its two ends, in its own units of time.

`least` is the least noisy time that networks of the path are trained at: index 0 of an indexed path.
"""


def scaled_linear(start: float = 0.00085, end: float = 0.012, steps: int = 1000) -> VariancePreserving:
    """Return Stable Diffusion's schedule: betas = linspace(sqrt(start), sqrt(end), T)^2."""
    roots = torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float64)
    return VariancePreserving.from_betas(roots.square())


def expand(coefficient: Tensor, like: Tensor) -> Tensor:
    """Return a per-sample coefficient [B] (or a scalar) in the rank, type and device of `like` [B, ...]."""
    wide = coefficient.to(device=like.device, dtype=like.dtype, non_blocking=True)
    return wide if wide.dim() == 0 else wide.reshape(-1, *[1] * (like.dim() - 1))


def share_of(path: Path, t: Tensor) -> Tensor:
    """Return t as a share of the way from clean data (0) to the noisiest time (1), in the path's own time."""
    return (t - path.clean) / (path.noisiest - path.clean)


def index_of(path: Path, t: Tensor, indices: int = 1000) -> Tensor:
    """Return t in training indices, the networks' input: t on an indexed path, `indices` times sigma on a flow."""
    if isinstance(path, FlowMatching):
        return indices * path.sigma(t)
    return t if isinstance(path, VariancePreserving) else indices * share_of(path, t)


def add_noise(path: Path, x_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """Return x_t = alpha_t x_0 + sigma_t eps at times t [B]."""
    return expand(path.alpha(t), x_0) * x_0 + expand(path.sigma(t), x_0) * eps


@dataclass(frozen=True)
class Estimate:
    """A network's estimate in both forms: x_t = alpha_t x0 + sigma_t eps holds exactly."""

    x0: Tensor
    eps: Tensor


def interpret(prediction: Prediction, output: Tensor, x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor) -> Estimate:
    """Return x0 and eps by a network's output.

    With alpha, sigma shaped to multiply x_t:
    eps: x0 = (x - sigma eps) / alpha;  x0: eps = (x - alpha x0) / sigma;
    v = alpha eps - sigma x0;  flow: u = eps - x0. The last two are solved together with
    x = alpha x0 + sigma eps, so that they hold on every path. Where sigma = 0, x is clean data,
    whatever the output of an x0 network.
    """
    if prediction == "eps":
        return Estimate((x_t - sigma_t * output) / alpha_t, output)
    if prediction == "x0":
        clean = sigma_t == 0
        x0 = torch.where(clean, x_t / torch.where(clean, alpha_t, 1), output)
        return Estimate(x0, (x_t - alpha_t * x0) / torch.where(clean, 1, sigma_t))
    if prediction == "v":
        norm = alpha_t.square() + sigma_t.square()
        return Estimate((alpha_t * x_t - sigma_t * output) / norm, (sigma_t * x_t + alpha_t * output) / norm)
    norm = alpha_t + sigma_t
    return Estimate((x_t - sigma_t * output) / norm, (x_t + alpha_t * output) / norm)


def target_of(prediction: Prediction, x_0: Tensor, eps: Tensor, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
    """Return the training target of a network of the given kind at x_t = alpha_t x_0 + sigma_t eps."""
    if prediction == "eps":
        return eps
    if prediction == "x0":
        return x_0
    if prediction == "v":
        return alpha_t * eps - sigma_t * x_0
    return eps - x_0
