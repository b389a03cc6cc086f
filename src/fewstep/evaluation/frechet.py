"""FD: the Frechet distance between Gaussians fitted to features, on the real pictures' principal components.

With 1,280 dimensions and 1,000 pictures the distance is mostly sampling noise of the covariances; with 64 components
it is not. It is named after its network ("FD-Lite0"), not FID, whose values are not comparable.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from fewstep.common.errors import UserError
from fewstep.evaluation.bootstrap import centred_interval, counts
from fewstep.evaluation.features import Features, SetDistance
from fewstep.evaluation.limits import FD_FEWEST
from fewstep.evaluation.metric import Array, Figure, Identity

COMPONENTS = 64
RESAMPLES = 200

Wide = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Projection:
    """Principal components of the real pictures' features.

    Attributes:
        mean: float64 [D].
        axes: orthonormal columns, float64 [D, K], the largest variance first.
        explained: share of the variance that they explain.
        n: number of pictures that they were fitted on.
    """

    mean: Wide
    axes: Wide
    explained: float
    n: int

    @classmethod
    def fit(cls, features: Array, components: int = COMPONENTS) -> Projection:
        """Fit to features [N, D].

        Raises:
            UserError: N is not above the number of components, or D is below it.
        """
        n, width = features.shape
        if n <= components or width < components:
            raise UserError(
                f"{components} principal components need more than {components} pictures and features; "
                f"got {n} pictures of {width}"
            )
        wide = features.astype(np.float64)
        mean = wide.mean(0)
        variances, vectors = np.linalg.eigh(np.cov(wide, rowvar=False))
        axes = vectors[:, ::-1][:, :components]
        # An eigenvector's sign is arbitrary: it is fixed, so that the hash depends on the subspace's basis alone.
        axes = axes * np.sign(axes[np.abs(axes).argmax(0), np.arange(components)])
        return cls(mean, np.ascontiguousarray(axes), float(variances[-components:].sum() / variances.sum()), n)

    def __call__(self, features: Array) -> Wide:
        """Project features [N, D] to [N, K], float64."""
        projected: Wide = (features.astype(np.float64) - self.mean) @ self.axes
        return projected

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the mean and axes to 6 decimals, so that rounding noise does not change it."""
        rounded = [np.round(part, 6) + 0.0 for part in (self.mean, self.axes)]
        return hashlib.sha256(b"".join(part.astype("<f8").tobytes() for part in rounded)).hexdigest()


def moments(features: Wide, weights: Wide | None = None) -> tuple[Wide, Wide]:
    """Return the mean [K] and unbiased covariance [K, K] of [N, K]; `weights` [N] are the rows' multiplicities."""
    weights = np.ones(len(features)) if weights is None else weights
    total = weights.sum()
    mean = weights @ features / total
    centred = features - mean
    return mean, (centred * weights[:, None]).T @ centred / (total - 1)


def frechet(mean_a: Wide, cov_a: Wide, mean_b: Wide, cov_b: Wide) -> float:
    """Return the squared Frechet distance |m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a^1/2 C_b C_a^1/2)^1/2) of two Gaussians.

    Symmetric square roots by eigenvalues: real and stable for singular covariances too.
    """
    values, vectors = np.linalg.eigh(cov_a)
    root = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    cross = np.linalg.eigvalsh(root @ cov_b @ root)
    shift = mean_a - mean_b
    distance = shift @ shift + np.trace(cov_a) + np.trace(cov_b) - 2 * np.sqrt(np.clip(cross, 0, None)).sum()
    return max(float(distance), 0.0)


class FrechetDistance(SetDistance):
    """FD of pictures from a set of others, through one network and one projection.

    Args:
        features: of the network.
        projection: fitted on real pictures; the same for all figures that are to be compared.
    """

    def __init__(self, features: Features, projection: Projection) -> None:
        identity = Identity(
            name="FD-Lite0",
            group="quality",
            against="real",
            measures="Frechet distance between the features of two picture sets",
            better="lower",
            unit="",
            reduction=(
                f"squared Frechet distance of Gaussians, float64, on {projection.axes.shape[1]} principal "
                f"components of {projection.n} real pictures (sha256 {projection.sha256[:16]}), "
                f"interval: {RESAMPLES} bootstrap resamples of both sets, centred"
            ),
            **features.identity_fields,
        )
        super().__init__(features, identity, FD_FEWEST)
        self.projection = projection

    def distance(self, features: Array, against: Array) -> float:
        """Return the distance alone, without an interval."""
        against = self.checked(features, against)
        return frechet(*moments(self.projection(features)), *moments(self.projection(against)))

    def reduce(self, features: Array, against: Array | None, seed: int) -> Figure:
        """Return the distance with its interval."""
        ours, theirs = self.projection(features), self.projection(self.checked(features, against))
        value = frechet(*moments(ours), *moments(theirs))
        pairs = zip(
            counts(len(ours), RESAMPLES, seed, "frechet"),
            counts(len(theirs), RESAMPLES, seed, "frechet against"),
            strict=True,
        )
        resampled = np.array([frechet(*moments(ours, a), *moments(theirs, b)) for a, b in pairs])
        low, high = centred_interval(value, resampled)
        return Figure(value, max(low, 0.0), high, len(features))
