"""Distance between a student's picture and the teacher's converged one from the same noise."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fewstep.common.errors import UserError
from fewstep.evaluation.features import Features, normalise
from fewstep.evaluation.metric import Array, Identity, Pictures
from fewstep.evaluation.per_picture import PerPictureMetric


def pixel_rmse(ours: Array | Pictures, theirs: Array | Pictures) -> Array:
    """Return the root mean squared difference of each pair of pictures, in 8-bit levels, [N, ...] -> float64 [N].

    Raises:
        UserError: pictures of other sizes.
    """
    if ours.shape != theirs.shape:
        raise UserError(f"pictures are {list(ours.shape[1:])} but the teacher's are {list(theirs.shape[1:])}")
    error = (ours.astype(np.float64) - theirs).reshape(len(ours), -1)
    rmse: Array = np.sqrt(np.square(error).mean(1))
    return rmse


def cosine_distance(ours: Array, theirs: Array) -> Array:
    """Return 1 - cosine of each pair of features, [N, D] -> float64 [N], in [0, 2]."""
    distance: Array = 1 - (normalise(ours) * normalise(theirs)).sum(-1)
    return distance


class _TeacherDistance(PerPictureMetric):
    """Mean distance between the student's and the teacher's picture of each prompt and noise."""

    distance: staticmethod[[Array, Array], Array]
    """(ours, theirs), features of N pictures each -> [N]."""

    def scores(self, features: Array, against: Array | None) -> Array:
        """Return each pair's distance, [N].

        Raises:
            UserError: no pictures of the teacher, or another number of them.
        """
        if against is None or len(against) != len(features):
            found = 0 if against is None else len(against)
            raise UserError(
                f"{self.identity.name}: {len(features)} pictures came with {found} of the teacher; "
                "give one for each, from the same prompt and noise"
            )
        return self.distance(features, against)


class TeacherPixels(_TeacherDistance):
    """Distance to the teacher in pixels."""

    distance = staticmethod(pixel_rmse)
    identity = Identity(
        name="to teacher: pixels",
        group="teacher",
        against="teacher",
        measures="difference from the teacher's end point from the same noise",
        better="lower",
        unit="levels (0 to 255)",
        reduction="mean over prompts of the root mean squared difference of pixels",
    )

    def features(self, pictures: Pictures, prompts: Sequence[str]) -> Array:
        """Return the pixels, float32 [N, H, W, 3]."""
        return pictures.astype(np.float32)


class TeacherFeatures(_TeacherDistance):
    """Distance to the teacher in features."""

    distance = staticmethod(cosine_distance)

    def __init__(self, features: Features) -> None:
        self._features = features
        self.identity = Identity(
            name="to teacher: Lite0",
            group="teacher",
            against="teacher",
            measures="feature distance from the teacher's end point from the same noise",
            better="lower",
            unit="cosine distance",
            reduction="mean over prompts of 1 - cosine",
            **features.identity_fields,
        )

    def features(self, pictures: Pictures, prompts: Sequence[str]) -> Array:
        """Return the network's features, [N, D]."""
        return self._features(pictures)
