"""Nearest real pictures: does a picture show the right concept, and is it a copy of its training picture?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fewstep.common.errors import UserError
from fewstep.evaluation.bootstrap import mean_figure
from fewstep.evaluation.features import normalise
from fewstep.evaluation.metric import Array, Figure

ROWS = 1024
NONE = -1

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Neighbours:
    """Shares of pictures, each with its interval.

    Attributes:
        right_concept: the nearest gallery picture shows the prompt's concept.
        right_concept_without_own: the same with the prompt's own pictures left out of the gallery.
        own: the nearest gallery picture is the prompt's own; None if no prompt has one.
        nearest: each picture's nearest gallery picture, int64 [N].
    """

    right_concept: Figure
    right_concept_without_own: Figure
    own: Figure | None
    nearest: Indices


def nearest(features: Array, gallery: Array, left_out: Indices | None = None) -> Indices:
    """Return the gallery picture of the largest cosine for each picture, int64 [N].

    Args:
        features: of the pictures, [N, D].
        gallery: features of real pictures, [G, D].
        left_out: int64 [N, K], gallery pictures that do not count for that picture; -1 for none.
    """
    ours, theirs = normalise(features), normalise(gallery)
    found = []
    for start in range(0, len(ours), ROWS):
        cosine = ours[start : start + ROWS] @ theirs.T
        if left_out is not None:
            rows, columns = np.nonzero(left_out[start : start + ROWS] != NONE)
            cosine[rows, left_out[start : start + ROWS][rows, columns]] = -np.inf
        found.append(cosine.argmax(1))
    return np.concatenate(found)


def neighbour_shares(
    features: Array,
    concepts: Sequence[str],
    gallery: Array,
    gallery_concepts: Sequence[str],
    own: npt.NDArray[np.integer] | None = None,
    seed: int = 0,
) -> Neighbours:
    """Look up each picture's nearest real picture by the cosine of features.

    Args:
        features: of the pictures, [N, D].
        concepts: the concept of each prompt, N.
        gallery: features of real pictures, [G, D].
        gallery_concepts: what they show, G.
        own: gallery pictures that are the prompt's own, [N] or [N, K], -1 for none.
        seed: of the bootstrap.

    Raises:
        UserError: counts that do not fit, or an own picture outside the gallery.
    """
    n, size = len(features), len(gallery)
    if len(concepts) != n or len(gallery_concepts) != size:
        raise UserError(
            f"{n} pictures with {len(concepts)} concepts, gallery of {size} with {len(gallery_concepts)}: "
            "give one concept a picture"
        )
    if own is None:
        own = np.full((n, 1), NONE)
    mine = np.asarray(own, dtype=np.int64).reshape(n, -1)
    if mine.size and not (mine.min() >= NONE and mine.max() < size):
        raise UserError(f"own must be rows of the gallery of {size}, or {NONE} for none")
    wanted, shown = np.asarray(concepts), np.asarray(gallery_concepts)
    first = nearest(features, gallery)
    other = nearest(features, gallery, mine)
    known = (mine != NONE).any(1)
    copies = (first[:, None] == mine).any(1)[known]
    return Neighbours(
        right_concept=mean_figure(shown[first] == wanted, seed, "neighbours"),
        right_concept_without_own=mean_figure(shown[other] == wanted, seed, "neighbours"),
        own=mean_figure(copies, seed, "neighbours") if known.any() else None,
        nearest=first,
    )
