"""Distance to the teacher: a student's picture against the teacher's converged one from the same noise."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fewstep.common.errors import UserError
from fewstep.evaluation.bootstrap import mean_figure
from fewstep.evaluation.features import Features, normalise
from fewstep.evaluation.metric import Against, Array, Figure, Identity, Pictures


def pixel_rmse(ours: Array, theirs: Array) -> Array:
    """Root mean squared difference of each pair of pictures, in 8-bit levels, [N, ...] -> float64 [N]."""
    error = (ours.astype(np.float64) - theirs).reshape(len(ours), -1)
    rmse: Array = np.sqrt(np.square(error).mean(1))
    return rmse


def cosine_distance(ours: Array, theirs: Array) -> Array:
    """1 - cosine of each pair of features, [N, D] -> float64 [N], in [0, 2]."""
    distance: Array = 1 - (normalise(ours) * normalise(theirs)).sum(-1)
    return distance


class _Paired:
    """A number for each pair of the student's and the teacher's picture."""

    against: Against = "teacher"
    identity: Identity

    def scores(self, features: Array, against: Array | None) -> Array:
        """Return each pair's distance, [N].

        Raises:
            UserError: no teacher's pictures, or not one for each of the student's.
        """
        if against is None or len(against) != len(features):
            found = 0 if against is None else len(against)
            raise UserError(
                f"{self.identity.name}: {len(features)} pictures came with {found} of the teacher; "
                "give one for each, from the same prompt and noise"
            )
        return self._distance(features, against)

    def reduce(self, features: Array, against: Array | None, seed: int) -> Figure:
        """Return the mean distance."""
        return mean_figure(self.scores(features, against), seed, self.identity.name)

    def _distance(self, ours: Array, theirs: Array) -> Array:
        raise NotImplementedError


class TeacherPixels(_Paired):
    """Distance to the teacher in pixels."""

    identity = Identity(
        name="to teacher: pixels",
        measures="difference from the teacher's end point from the same noise",
        better="lower",
        unit="levels (0 to 255)",
        reduction="mean over prompts of the root mean squared difference of pixels",
    )

    def features(self, pictures: Pictures, prompts: Sequence[str]) -> Array:
        """Return the pixels, float32 [N, H, W, 3]."""
        return pictures.astype(np.float32)

    def _distance(self, ours: Array, theirs: Array) -> Array:
        if ours.shape != theirs.shape:
            raise UserError(f"pictures are {list(ours.shape[1:])} but the teacher's are {list(theirs.shape[1:])}")
        return pixel_rmse(ours, theirs)


class TeacherFeatures(_Paired):
    """Distance to the teacher in features."""

    def __init__(self, features: Features, short: str = "Lite0") -> None:
        self._features = features
        backbone = features.backbone
        self.identity = Identity(
            name=f"to teacher: {short}",
            measures="feature distance from the teacher's end point from the same noise",
            better="lower",
            unit="cosine distance",
            reduction="mean over prompts of 1 - cosine",
            backbone=backbone.name,
            weights_sha256=backbone.weights_sha256,
            licence=backbone.licence,
            input=backbone.input,
        )

    def features(self, pictures: Pictures, prompts: Sequence[str]) -> Array:
        """Return the backbone's features, [N, D]."""
        return self._features(pictures)

    def _distance(self, ours: Array, theirs: Array) -> Array:
        return cosine_distance(ours, theirs)
