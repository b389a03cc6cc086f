"""How well distances between latents order pairs as the pixel-space distance does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fewstep.methods.distances import huber, l2
from fewstep.methods.latent_lpips.network import LatentLPIPS, group_distances
from fewstep.methods.latent_lpips.pairs import KINDS, PAIRS

HUBER_C = 1e-3
"""LCM's."""
ENDS = torch.tensor(PAIRS).T
NAMED = [PAIRS.index(members) for members in KINDS.values()]
"""Columns of the pairs that have a law of their own, in the order of `KINDS`."""
Array = npt.NDArray[np.float64]


def ranks(values: Array) -> Array:
    """Ranks from 0, equal values sharing the mean of theirs, [N]."""
    order = np.argsort(values, kind="stable")
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    first = np.concatenate([[0], np.cumsum(counts)[:-1]])
    found = (first + (counts - 1) / 2)[inverse]
    assert len(found) == len(order)
    return found


def rank_correlation(a: Array, b: Array) -> float:
    """Spearman's coefficient of two lists, the correlation of their ranks; nan where one is constant."""
    x, y = ranks(a) - (len(a) - 1) / 2, ranks(b) - (len(b) - 1) / 2
    with np.errstate(invalid="ignore"):
        return float((x @ y) / np.sqrt((x @ x) * (y @ y)))


@dataclass(frozen=True)
class RankComparison:
    """Distances of the same pairs, groups in rows and `KINDS` in columns, float64 [N, K].

    Attributes:
        pixel: the pixel network's.
        predicted: by name: "network", "l2", "huber".
    """

    pixel: Array
    predicted: Mapping[str, Array]

    def overall(self) -> dict[str, float]:
        """Rank correlation with the pixel network over all pairs, by name."""
        return {name: rank_correlation(found.ravel(), self.pixel.ravel()) for name, found in self.predicted.items()}

    def by_kind(self) -> dict[str, dict[str, float]]:
        """Rank correlation among the pairs of one kind, by kind and name."""
        return {
            kind: {name: rank_correlation(found[:, k], self.pixel[:, k]) for name, found in self.predicted.items()}
            for k, kind in enumerate(KINDS)
        }


@torch.no_grad()
def compare_distances(network: LatentLPIPS, groups: Tensor, distances: Tensor, batch: int = 16) -> RankComparison:
    """Measure the named pairs of some groups, [n, m, C, h, w], whose pictures lie `distances` [n, P] apart."""
    device = network.raw_own.device
    ends = ENDS[:, NAMED]
    parts = (groups[start : start + batch] for start in range(0, len(groups), batch))
    found = [group_distances(network, part.to(device), ends).double().cpu() for part in parts]
    gaps = groups[:, ends[0]] - groups[:, ends[1]]
    flat = gaps.flatten(0, 1)
    plain = {"l2": l2(flat), "huber": huber(flat, HUBER_C)}
    predicted = {name: value.double().view(len(groups), -1).numpy() for name, value in plain.items()}
    return RankComparison(distances[:, NAMED].double().numpy(), {"network": torch.cat(found).numpy(), **predicted})
