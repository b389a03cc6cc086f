"""A table of figures by steps and gamma, and curves of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewstep.common.files import atomic_write, write_text
from fewstep.evaluation.metric import ARROWS, Figure
from fewstep.evaluation.standard.registry import Column

TABLE, CURVES = "table.md", "curves.png"
ACROSS = 3
"""Panels of curves beside each other."""


@dataclass(frozen=True)
class Cell:
    """The figures of one setting; gamma is None where the sampler has none."""

    steps: int
    gamma: float | None
    figures: Mapping[str, Figure]

    def label(self, gamma: bool) -> str:
        """Return the setting's name, with its gamma where several are compared."""
        return f"{self.steps} steps" + (f", gamma {self.gamma:g}" if gamma and self.gamma is not None else "")


def columns_of(cells: Sequence[Cell], columns: Mapping[str, Column] | None) -> dict[str, Column]:
    """Return the columns of a table by figure: those that are given, else one for each figure."""
    return dict(columns or {name: Column(name, name) for name in cells[0].figures})


def table_lines(cells: Sequence[Cell], columns: Mapping[str, Column] | None = None) -> list[str]:
    """Return the lines of a Markdown table, a row a setting, and below it what decides each figure."""
    shown = columns_of(cells, columns)
    identities = {name: figure.identity for name, figure in cells[0].figures.items() if figure.identity}
    better = {name: ARROWS[identity.better] for name, identity in identities.items()}
    rows = [["steps", "gamma", *(column.heading + better.get(name, "") for name, column in shown.items())]]
    for cell in cells:
        values = {name: figure.value * shown[name].factor for name, figure in cell.figures.items() if name in shown}
        written = [f"{values[name]:.4g}" if name in values else "" for name in shown]
        rows.append([str(cell.steps), "" if cell.gamma is None else f"{cell.gamma:g}", *written])
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    lines = [f"| {' | '.join(word.ljust(width) for word, width in zip(row, widths))} |" for row in rows]
    lines.insert(1, f"| {' | '.join('-' * width for width in widths)} |")
    return [*lines, "", *(f"- {identities[name].line()}" for name in shown if name in identities)]


def write_sweep(out: Path, cells: Sequence[Cell], columns: Mapping[str, Column] | None) -> None:
    """Write table.md; with several settings, curves.png too."""
    write_text(out / TABLE, "\n".join(table_lines(cells, columns)) + "\n")
    if len(cells) > 1:
        draw_curves(out / CURVES, cells, columns)


def curves(cells: Sequence[Cell]) -> tuple[str, dict[str, list[tuple[float, Cell]]]]:
    """Return the horizontal axis and its points by curve: gamma where there is one number of steps, else steps."""
    by_steps = len({cell.steps for cell in cells}) > 1
    found: dict[str, list[tuple[float, Cell]]] = {}
    for cell in sorted(cells, key=lambda cell: (cell.steps, cell.gamma or 0)):
        name = cell.label(False) if not by_steps else "" if cell.gamma is None else f"gamma {cell.gamma:g}"
        found.setdefault(name, []).append((cell.steps if by_steps else cell.gamma or 0, cell))
    return "steps" if by_steps else "gamma", found


def draw_curves(path: Path, cells: Sequence[Cell], columns: Mapping[str, Column] | None) -> None:
    """Draw a panel for each figure."""
    from matplotlib.figure import Figure as Canvas

    shown = columns_of(cells, columns)
    axis, found = curves(cells)
    across, down = min(ACROSS, len(shown)), -(-len(shown) // ACROSS)
    canvas: Any = Canvas(figsize=(4.2 * across, 3.2 * down), layout="constrained")
    panels = canvas.subplots(down, across, squeeze=False).ravel()
    for panel, (name, column) in zip(panels, shown.items()):
        for label, points in found.items():
            _draw_curve(panel, label, [(x, cell.figures[name]) for x, cell in points if name in cell.figures], column)
        if axis == "steps":
            steps = sorted({cell.steps for cell in cells})
            panel.set_xscale("log", base=2)
            panel.set_xticks(steps, labels=steps)
        panel.set_title(column.heading, fontsize=10, parse_math=False)
        panel.set_xlabel(axis, fontsize=9)
        panel.grid(True, alpha=0.4)
    for panel in panels[len(shown) :]:
        panel.set_visible(False)
    if any(found):
        panels[0].legend(fontsize=8, frameon=False)
    with atomic_write(path) as part:
        canvas.savefig(part, format="png", dpi=140, facecolor="white")


def _draw_curve(panel: Any, label: str, points: Sequence[tuple[float, Figure]], column: Column) -> None:
    """Draw one curve, and its interval where each point has one."""
    x = [at for at, _ in points]
    panel.plot(x, [figure.value * column.factor for _, figure in points], marker="o", markersize=4, label=label)
    ends = [(figure.low, figure.high) for _, figure in points if figure.low is not None and figure.high is not None]
    if len(ends) == len(points):
        low, high = ([end[side] * column.factor for end in ends] for side in (0, 1))
        panel.fill_between(x, low, high, alpha=0.15, linewidth=0)
