"""The base of metrics that average a number over pictures."""

from __future__ import annotations

from fewstep.evaluation.bootstrap import mean_figure
from fewstep.evaluation.metric import Array, Figure, Identity


class PerPictureMetric:
    """Mean of one number per picture. Its scores can be paired by prompt with those of another method.

    A subclass computes that number in `features`, or overrides `scores`.
    """

    identity: Identity

    def scores(self, features: Array, against: Array | None) -> Array:
        """Return each picture's number, float64 [N]."""
        return features

    def reduce(self, features: Array, against: Array | None, seed: int) -> Figure:
        """Return the mean of `scores` with its interval."""
        return mean_figure(self.scores(features, against), seed, self.identity.name)
