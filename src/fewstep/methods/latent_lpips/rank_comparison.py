"""Rank correlation of distances between latents with the pixel network's distance between the pictures."""

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

BATCH = 16
"""Groups whose distances are computed at once."""
HUBER_C = 1e-3
"""LCM's constant of the pseudo-Huber distance."""
ENDS = torch.tensor(PAIRS).T
NAMED = [PAIRS.index(members) for members in KINDS.values()]
"""Columns of the named pairs, in the order of `KINDS`."""
Array = npt.NDArray[np.float64]


def ranks(values: Array) -> Array:
    """Return ranks from 0, [N]; equal values share the mean of their ranks."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    found: Array = (np.cumsum(counts) - counts + (counts - 1) / 2)[inverse]
    return found


def rank_correlation(a: Array, b: Array) -> float:
    """Return Spearman's coefficient, the correlation of ranks; nan where one list is constant."""
    x, y = ranks(a) - (len(a) - 1) / 2, ranks(b) - (len(b) - 1) / 2
    with np.errstate(invalid="ignore"):
        return float((x @ y) / np.sqrt((x @ x) * (y @ y)))


@dataclass(frozen=True)
class RankComparison:
    """Distances of the same pairs, groups in rows and `KINDS` in columns, float64 [N, K].

    Attributes:
        pixel: distances by the pixel network.
        predicted: distances between latents by name: "network", "l2", "huber".
    """

    pixel: Array
    predicted: Mapping[str, Array]

    def overall(self) -> dict[str, float]:
        """Return the rank correlation with the pixel network over all pairs, by name."""
        return {name: rank_correlation(found.ravel(), self.pixel.ravel()) for name, found in self.predicted.items()}

    def by_kind(self) -> dict[str, dict[str, float]]:
        """Return the rank correlation among the pairs of each kind, by kind and name."""
        return {
            kind: {name: rank_correlation(found[:, k], self.pixel[:, k]) for name, found in self.predicted.items()}
            for k, kind in enumerate(KINDS)
        }


@torch.no_grad()
def compare_distances(network: LatentLPIPS, groups: Tensor, distances: Tensor) -> RankComparison:
    """Compute the distances of the named pairs of groups [n, m, C, h, w] with pixel distances [n, P]."""
    device = network.raw_own.device
    ends = ENDS[:, NAMED]
    found = [group_distances(network, part.to(device), ends).double().cpu() for part in torch.split(groups, BATCH)]
    gaps = groups[:, ends[0]] - groups[:, ends[1]]
    flat = gaps.flatten(0, 1)
    plain = {"l2": l2(flat), "huber": huber(flat, HUBER_C)}
    predicted = {name: value.double().view(len(groups), -1).numpy() for name, value in plain.items()}
    return RankComparison(distances[:, NAMED].double().numpy(), {"network": torch.cat(found).numpy(), **predicted})
