"""Rank correlation of distances between latents with those of the pixel network between pictures, and its plot."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fewstep.common.files import atomic_write
from fewstep.distillation.latent_lpips.network import LatentLPIPS, group_distances
from fewstep.distillation.latent_lpips.pairs import KINDS, PAIRS
from fewstep.methods.distances import huber, l2

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


COLOURS = (
    *("#1f6feb", "#0b8fa3", "#2e9e5b", "#7a9a01", "#d9730d", "#b4531f"),
    *("#b8309a", "#7a5af0", "#6b7280", "#111827", "#dc2626"),
)
INK, GRID_COLOUR = "#333333", "#e5e7eb"
TITLES = {"network": "network on latents", "l2": "latent L2", "huber": "latent Huber (c = .001)"}


def draw_figure(comparison: RankComparison, path: Path) -> Path:
    """Draw one log-log panel per distance between latents (y) against the pixel network's (x), coloured by kind."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure as Canvas

    overall, kinds = comparison.overall(), comparison.by_kind()
    with rc_context({"font.family": "DejaVu Sans"}):
        canvas: Any = Canvas(figsize=(4.3 * len(comparison.predicted), 5.2), layout="constrained")
        panels = canvas.subplots(1, len(comparison.predicted), squeeze=False)[0]
        for ax, (name, found) in zip(panels, comparison.predicted.items(), strict=True):
            for k, kind in enumerate(KINDS):
                ax.scatter(
                    comparison.pixel[:, k], found[:, k], s=9, color=COLOURS[k], alpha=0.75, linewidths=0, label=kind
                )
            mean = sum(by[name] for by in kinds.values()) / len(kinds)
            ax.set_title(
                f"{TITLES[name]}\nrank correlation {overall[name]:.3f}; within a kind {mean:.3f}",
                fontsize=10,
                color=INK,
            )
            ax.set_xscale("log")
            ax.set_yscale("log")
            ax.set_xlabel("distance of the pictures in pixel features", color=INK, fontsize=9)
            ax.grid(True, color=GRID_COLOUR, linewidth=0.6)
            ax.set_axisbelow(True)
            ax.tick_params(colors=INK, labelsize=8.5, length=0)
            for side in ax.spines.values():
                side.set_visible(False)
        panels[0].axline((0.1, 0.1), (1, 1), color=INK, linewidth=0.8, linestyle="--", zorder=0)
        handles, labels = panels[0].get_legend_handles_labels()
        canvas.legend(handles, labels, loc="outside lower center", ncols=6, frameon=False, fontsize=8.5, markerscale=2)
        canvas.suptitle(f"{comparison.pixel.size} held-out pairs of latents", fontsize=11, color=INK)
        with atomic_write(path) as part:
            canvas.savefig(part, format=path.suffix.removeprefix("."), dpi=110, facecolor="white")
    return path
