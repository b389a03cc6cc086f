"""An exact teacher: on data from a mixture of Gaussians the score, the marginals and the PF-ODE are known.

Everything is float64; x is [B, D], times are [B].
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.diffusion.schedule import Estimate, Path, expand


def times_of(t: float, x: Tensor) -> Tensor:
    """Return one time for a whole batch, float64 [B]."""
    return torch.full((len(x),), t, dtype=torch.float64)


@dataclass(frozen=True)
class Mixture:
    """x_0 ~ sum_k w_k N(mu_k, s_k^2 I): weights [K], means [K, D], stds [K]."""

    path: Path
    weights: Tensor
    means: Tensor
    stds: Tensor

    def _estimate(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Estimate:
        """Return E[x0 | x] and E[eps | x] at x = alpha x0 + sigma eps; both are finite at alpha = 0 and sigma = 0.

        Modes and coordinates are the first dimension here, [K, B] and [D, B], which is several times faster.
        """
        y, means, spread = x.T.contiguous(), self.means.T, self.stds.square()[:, None]
        var = alpha.square() * spread + sigma.square()
        distance = y.square().sum(0) - 2 * alpha * (self.means @ y) + alpha.square() * means.square().sum(0)[:, None]
        log_density = self.weights.log()[:, None] - 0.5 * (distance / var + len(y) * var.log())
        share = torch.softmax(log_density, dim=0)
        pull = share / var  # sum_k pull_k (x - alpha mu_k) = -score
        eps = pull.sum(0) * y - alpha * (means @ pull)
        shrink = (spread * pull).sum(0) * y - alpha * (means @ (spread * pull))
        return Estimate((means @ share + alpha * shrink).T, (sigma * eps).T)

    def denoise(self, x_t: Tensor, t: Tensor) -> Estimate:
        """Return the teacher's E[x0 | x_t] and E[eps | x_t] = -sigma_t score(x_t)."""
        return self._estimate(x_t, self.path.alpha(t), self.path.sigma(t))

    def flow(self, x_t: Tensor, t: Tensor, s: Tensor, steps: int = 64) -> Tensor:
        """Return the exact jump x_s: the PF-ODE from t to s.

        One Gaussian: the closed form alpha_s mu + sqrt(var_s/var_t) (x_t - alpha_t mu). Several: with
        tau = sigma/(alpha + sigma) and w = x/(alpha + sigma) every path is the straight one,
        dw/dtau = eps - x0, finite at both ends. It is integrated in `steps` Runge-Kutta steps of order 4.
        """
        alpha_t, sigma_t, alpha_s, sigma_s = (f(u) for u in (t, s) for f in (self.path.alpha, self.path.sigma))
        if len(self.weights) == 1:
            var_t, var_s = (
                a.square() * self.stds.square() + b.square() for a, b in ((alpha_t, sigma_t), (alpha_s, sigma_s))
            )
            away = x_t - expand(alpha_t, x_t) * self.means
            return expand(alpha_s, x_t) * self.means + expand((var_s / var_t).sqrt(), x_t) * away
        start, stop = sigma_t / (alpha_t + sigma_t), sigma_s / (alpha_s + sigma_s)
        step = (stop - start) / steps
        wide = step[:, None]

        def slope(w: Tensor, tau: Tensor) -> Tensor:
            estimate = self._estimate(w, 1 - tau, tau)
            return estimate.eps - estimate.x0

        w = x_t / expand(alpha_t + sigma_t, x_t)
        for i in range(steps):
            tau = start + i * step
            k1 = slope(w, tau)
            k2 = slope(w + wide / 2 * k1, tau + step / 2)
            k3 = slope(w + wide / 2 * k2, tau + step / 2)
            k4 = slope(w + wide * k3, start + (i + 1) * step)
            w = w + wide / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        landed: Tensor = expand(alpha_s + sigma_s, x_t) * w
        return landed

    def sample(self, count: int, t: float, generator: torch.Generator) -> Tensor:
        """Draw from the marginal p_t, [count, D]."""
        kind = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        z, eps = (torch.randn(count, self.means.shape[1], dtype=torch.float64, generator=generator) for _ in range(2))
        x_0 = self.means[kind] + self.stds[kind, None] * z
        now = times_of(t, x_0)
        noised: Tensor = expand(self.path.alpha(now), x_0) * x_0 + expand(self.path.sigma(now), x_0) * eps
        return noised

    def energy(self, x: Tensor, t: float) -> float:
        """Return the squared energy distance between the points x [N, 2] and the marginal p_t.

        2 E|X - Y| - E|X - X'| - E|Y - Y'| is 0 for equal distributions only. Y is a mixture of round Gaussians in the
        plane, whose mean distance to a point is Rice's mean, in closed form. The average over X is unbiased, so the
        estimate may be slightly below 0.
        """
        now = times_of(t, x[:1])
        alpha, var = float(self.path.alpha(now)), float(self.path.sigma(now)) ** 2
        means, spread = alpha * self.means, (alpha * self.stds).square() + var
        between = torch.cdist(x, means)
        to_marginal = (rice_mean(between, spread.sqrt()) @ self.weights).mean()
        apart = rice_mean(torch.cdist(means, means), (spread[:, None] + spread[None]).sqrt())
        within = self.weights @ apart @ self.weights
        own = torch.pdist(x).mean()
        return float(2 * to_marginal - own - within)

    def recall(self, x: Tensor, t: float) -> float:
        """Return the share of the modes that are nearest to half of their weight of the points x [N, D] or more."""
        kind = torch.cdist(x, float(self.path.alpha(times_of(t, x[:1]))) * self.means).argmin(1)
        found = torch.bincount(kind, minlength=len(self.weights)) / len(x)
        return float((found >= self.weights / 2).double().mean())


def one_gaussian(mixture: Mixture) -> Mixture:
    """Return the round Gaussian of a mixture's mean and variance."""
    mean = mixture.weights @ mixture.means
    spread = mixture.weights @ ((mixture.means - mean).square().mean(1) + mixture.stds.square())
    return Mixture(mixture.path, mixture.weights.new_ones(1), mean[None], spread.sqrt()[None])


def rice_mean(distance: Tensor, std: Tensor) -> Tensor:
    """Return E|z + d| for a vector d of length `distance` and z ~ N(0, std^2 I) in the plane.

    std sqrt(pi/2) e^{-v/2} [(1 + v) I_0(v/2) + v I_1(v/2)] with v = d^2/(2 std^2).
    """
    v = distance.square() / (2 * std.square())
    half = v / 2
    scaled = (1 + v) * torch.special.i0e(half) + v * torch.special.i1e(half)
    mean: Tensor = std * math.sqrt(math.pi / 2) * scaled
    return mean


def ring(path: Path, modes: int = 8, radius: float = 1.5, std: float = 0.1) -> Mixture:
    """Return a mixture of equal modes on a circle."""
    angles = torch.arange(modes, dtype=torch.float64) * 2 * math.pi / modes
    means = radius * torch.stack([angles.cos(), angles.sin()], 1)
    return Mixture(path, torch.full((modes,), 1 / modes, dtype=torch.float64), means, torch.full_like(angles, std))
