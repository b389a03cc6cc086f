"""The reduction shared by metrics that give each picture a number of its own: the mean."""

from __future__ import annotations

from fewstep.evaluation.bootstrap import mean_figure
from fewstep.evaluation.metric import Against, Array, Figure, Identity


class PictureMean:
    """Base of metrics whose `features` are already one number a picture, [N]."""

    against: Against = "nothing"
    identity: Identity

    def scores(self, features: Array, against: Array | None) -> Array:
        """Return the features themselves, [N]."""
        return features

    def reduce(self, features: Array, against: Array | None, seed: int) -> Figure:
        """Return their mean."""
        return mean_figure(features, seed, self.identity.name)
