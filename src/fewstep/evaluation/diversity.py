"""Diversity: how much the pictures of one prompt differ from noise to noise."""

from __future__ import annotations

import numpy as np

from fewstep.common.errors import UserError
from fewstep.evaluation.bootstrap import mean_figure
from fewstep.evaluation.features import Features, normalise
from fewstep.evaluation.metric import Array, Figure, Identity, Pictures

PROMPTS = 100
"""Most prompts that diversity is measured on."""
NOISES = 8
"""Pictures of each prompt."""


def pairwise_distance(features: Array) -> Array:
    """Return the mean cosine distance over the pairs of k pictures of each prompt, [P, k, D] -> float64 [P].

    Raises:
        UserError: another shape, or a single picture per prompt.
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
    features: Features,
    pictures: Pictures,
    seed: int = 0,
    *,
    floor: float | None = None,
    name: str = "diversity-Lite0",
) -> dict[str, Figure]:
    """Return the mean over prompts of `pairwise_distance`, its interval over prompts, under its name.

    Args:
        features: of the network.
        pictures: uint8 [P, k, H, W, 3], k noises per prompt.
        seed: of the bootstrap.
        floor: the diversity of real pictures, if known.
        name: of the figure, which names the network.

    Raises:
        UserError: another shape, or a single picture per prompt.
    """
    if pictures.ndim != 5:
        raise UserError(f"diversity needs pictures [prompts, noises, H, W, 3], not {list(pictures.shape)}")
    p, k = pictures.shape[:2]
    found = features(pictures.reshape(p * k, *pictures.shape[2:]))
    figure = mean_figure(pairwise_distance(found.reshape(p, k, -1)), seed, "diversity")
    identity = Identity(
        name=name,
        group="quality",
        measures="mean feature distance between pictures of one prompt from different noise",
        better="neither",
        unit="cosine distance",
        reduction=f"mean over prompts of the mean cosine distance over the pairs of {k} noises",
        n=p,
        seed=seed,
        **features.identity_fields,
    )
    return {identity.name: Figure(figure.value, figure.low, figure.high, p, floor, identity)}
