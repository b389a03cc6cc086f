"""Diversity: how much the pictures of one prompt differ from noise to noise."""

from __future__ import annotations

import numpy as np

from fewstep.common.errors import UserError
from fewstep.evaluation.bootstrap import mean_figure
from fewstep.evaluation.features import Features, normalise
from fewstep.evaluation.metric import Array, Figure, Identity, Pictures

PROMPTS = 100
"""Prompts that diversity is measured on, at most."""
NOISES = 8
"""Pictures of each."""


def pairwise_distance(features: Array) -> Array:
    """Mean cosine distance over the pairs of k pictures of each prompt, [P, k, D] -> float64 [P].

    Raises:
        UserError: another shape, or a single picture a prompt.
    """
    if features.ndim != 3 or features.shape[1] < 2:
        raise UserError(f"diversity needs features [prompts, noises >= 2, D], not {list(features.shape)}")
    unit = normalise(features)
    k = unit.shape[1]
    # Of unit rows, the sum over ordered pairs of x_i.x_j is |sum x|^2 - k.
    similarity = (np.square(unit.sum(1)).sum(-1) - np.square(unit).sum((1, 2))) / (k * (k - 1))
    distance: Array = 1 - similarity
    return distance


def diversity(
    features: Features, pictures: Pictures, seed: int = 0, *, floor: float | None = None, short: str = "Lite0"
) -> dict[str, Figure]:
    """Return the mean over prompts of `pairwise_distance`, its interval over prompts, under its name.

    Args:
        features: the backbone.
        pictures: uint8 [P, k, H, W, 3], k noises a prompt.
        seed: of the bootstrap.
        floor: the same of real pictures, where it is known.
        short: the backbone's short name.

    Raises:
        UserError: another shape, or a single picture a prompt.
    """
    if pictures.ndim != 5:
        raise UserError(f"diversity needs pictures [prompts, noises, H, W, 3], not {list(pictures.shape)}")
    p, k = pictures.shape[:2]
    found = features(pictures.reshape(p * k, *pictures.shape[2:]))
    figure = mean_figure(pairwise_distance(found.reshape(p, k, -1)), seed, "diversity")
    backbone = features.backbone
    identity = Identity(
        name=f"diversity-{short}",
        measures="mean feature distance between pictures of one prompt from different noise",
        better="neither",
        unit="cosine distance",
        reduction=f"mean over prompts of the mean cosine distance over the pairs of {k} noises",
        backbone=backbone.name,
        weights_sha256=backbone.weights_sha256,
        licence=backbone.licence,
        input=backbone.input,
        n=p,
        seed=seed,
    )
    return {identity.name: Figure(figure.value, figure.low, figure.high, p, floor, identity)}
