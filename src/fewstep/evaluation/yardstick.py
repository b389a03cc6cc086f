"""What a list of prompts is measured with: real pictures, metrics, and the backbone that they share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fewstep.data.pictures import find_pictures, read_picture
from fewstep.errors import UserError
from fewstep.evaluation.detail import EdgeDensity, WebpBytes
from fewstep.evaluation.evaluate import Reference
from fewstep.evaluation.features import Features
from fewstep.evaluation.frechet import FrechetDistance, Projection
from fewstep.evaluation.kid import KernelDistance
from fewstep.evaluation.metric import Metric
from fewstep.evaluation.settings import FD_FEWEST, KID_FEWEST
from fewstep.evaluation.teacher import TeacherFeatures, TeacherPixels


@dataclass(frozen=True)
class Yardstick:
    """What a prompt list is measured with, open before anything is drawn.

    Attributes:
        reference: real pictures.
        metrics: what is measured.
        features: the backbone that they share.
        real_diversity: of real pictures of the same prompts, where that is known.
    """

    reference: Reference
    metrics: list[Metric]
    features: Features
    real_diversity: float | None = None


def read_real(folder: Path, size: int) -> np.ndarray:
    """Real pictures of a folder, uint8 [N, size, size, 3].

    Raises:
        UserError: no folder, or too few pictures in it.
    """
    files = find_pictures(folder)
    if len(files) < KID_FEWEST:
        raise UserError(f"real = {str(folder)!r} holds {len(files)} pictures; KID needs at least {KID_FEWEST}")
    return np.stack([read_picture(file, size) for file in files])


def folder_yardstick(folder: Path, n: int, size: int, seed: int, features: Features) -> Yardstick:
    """Measure against a folder of real pictures; there is a floor where it holds more than twice `n`.

    Raises:
        UserError: no folder with pictures.
    """
    pool = read_real(folder, size)
    reference = Reference.split(pool, n, seed) if len(pool) > 2 * n else Reference(pool)
    if len(reference.pictures) < KID_FEWEST:
        raise UserError(f"real = {str(folder)!r} holds {len(pool)} pictures; KID needs at least {KID_FEWEST}")
    metrics: list[Metric] = [
        KernelDistance(features),
        TeacherFeatures(features),
        TeacherPixels(),
        EdgeDensity(),
        WebpBytes(),
    ]
    if min(n, len(reference.pictures)) >= FD_FEWEST:
        metrics.insert(0, FrechetDistance(features, Projection.fit(features(reference.pictures))))
    return Yardstick(reference, metrics, features)
