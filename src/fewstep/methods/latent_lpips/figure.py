"""A scatter plot of the distances of held-out pairs: between latents against between pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fewstep.common.files import atomic_write
from fewstep.methods.latent_lpips.pairs import KINDS
from fewstep.methods.latent_lpips.rank_comparison import RankComparison

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
