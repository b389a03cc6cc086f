"""What a list of prompts is measured with: real pictures, metrics, and the backbone that they share."""

from __future__ import annotations

from dataclasses import dataclass

from fewstep.common.errors import UserError
from fewstep.evaluation.detail import EdgeDensity, WebpBytes
from fewstep.evaluation.evaluate import Reference
from fewstep.evaluation.features import Features
from fewstep.evaluation.frechet import FrechetDistance, Projection
from fewstep.evaluation.kid import KernelDistance
from fewstep.evaluation.limits import FD_FEWEST, KID_FEWEST
from fewstep.evaluation.metric import Metric, Pictures
from fewstep.evaluation.teacher_distance import TeacherFeatures, TeacherPixels


@dataclass(frozen=True)
class Suite:
    """What a prompt list is measured with, open before anything is drawn.

    Attributes:
        reference: real pictures.
        metrics: what is measured.
        features: the backbone that they share.
        real_diversity: of real pictures of the same prompts, where that is known.

    Raises:
        UserError: too few real pictures to measure against.
    """

    reference: Reference
    metrics: list[Metric]
    features: Features
    real_diversity: float | None = None

    def __post_init__(self) -> None:
        if len(self.reference.pictures) < KID_FEWEST:
            raise UserError(
                f"there are {len(self.reference.pictures)} real pictures to measure against; KID needs at least "
                f"{KID_FEWEST}"
            )


def set_metrics(features: Features, n: int, real: Pictures) -> list[Metric]:
    """Return what any set of pictures is measured by.

    Args:
        features: the backbone.
        n: pictures in the smallest set that is compared: FD is left out below its least number.
        real: pictures that FD's projection is fitted on.
    """
    chosen: list[Metric] = [
        KernelDistance(features),
        TeacherFeatures(features),
        TeacherPixels(),
        EdgeDensity(),
        WebpBytes(),
    ]
    if n >= FD_FEWEST:
        chosen.insert(0, FrechetDistance(features, Projection.fit(features(real))))
    return chosen
