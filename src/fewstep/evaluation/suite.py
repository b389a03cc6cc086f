"""The metrics of an evaluation, with their reference pictures."""

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
    """The metrics of one list of prompts, with what they need, loaded before any picture is generated.

    Attributes:
        reference: real pictures.
        metrics: what is measured.
        features: features that the metrics share.
        real_diversity: diversity of real pictures of the same prompts, if known.

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


def standard_suite(features: Features, n: int, real: Pictures) -> list[Metric]:
    """Return the metrics of any set of pictures.

    Args:
        features: of the network.
        n: pictures in the smallest set that is compared; below `FD_FEWEST`, FD is left out.
        real: pictures that FD's projection is fitted on.
    """
    fd: list[Metric] = [FrechetDistance(features, Projection.fit(features(real)))] if n >= FD_FEWEST else []
    return [
        *fd,
        KernelDistance(features),
        TeacherFeatures(features),
        TeacherPixels(),
        EdgeDensity(),
        WebpBytes(),
    ]
