"""Quality by method and step count in the shape of the TCD paper's Table 1."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fewstep.evaluation.metric import ARROWS
from fewstep_worlds.emoji8.report.lines import HEADLINE_GAMMA, Line, Summary, compared, summary
from fewstep_worlds.emoji8.report.results import Results

STEPS = (2, 4, 8, 20)
"""Network calls at which methods are compared, as in the TCD paper's Table 1."""
DIGITS = 3
"""Significant digits of the smallest figure of a block; the block's other figures have as many decimals."""


@dataclass(frozen=True)
class Cell:
    """A printed figure.

    Attributes:
        text: the mean, or "" where nothing was measured.
        spread: over seeds, or "" for one seed.
        best: no other method prints a better figure in its column.
    """

    text: str = ""
    spread: str = ""
    best: bool = False

    @property
    def markdown(self) -> str:
        """The figure with its spread, bold if best."""
        text = f"{self.text} ± {self.spread}" if self.spread else self.text
        return f"**{text}**" if self.best else text


@dataclass(frozen=True)
class StepTable:
    """Methods by blocks of columns, a block a metric, a column a step count.

    Attributes:
        headings: metrics' names with the direction that is better.
        steps: of each block's columns.
        rows: label and, for each metric, a cell for each step count.
        references: label and a cell for each metric: more calls than the columns have, and real pictures.
        notes: what each metric is and how many pictures it rests on.
    """

    headings: tuple[str, ...]
    steps: tuple[int, ...]
    rows: tuple[tuple[str, tuple[tuple[Cell, ...], ...]], ...]
    references: tuple[tuple[str, tuple[Cell, ...]], ...]
    notes: tuple[str, ...]


def step_table(
    results: Results, metrics: Sequence[str], steps: Sequence[int] = STEPS, gamma: float = HEADLINE_GAMMA
) -> StepTable:
    """Arrange the means over seeds of some metrics; of a sweep over gamma at most the line at this one."""
    every = compared(results, gamma)
    shown = [line for line in every if set(line.steps) & set(steps)]
    beyond = [(line, count) for line in every for count in line.steps if count > max(steps)]
    blocks = [_block(results, metric, shown, beyond, steps) for metric in metrics]
    names = [f"{line.label}, {count} calls" for line, count in beyond] + ["real pictures"]
    tails = list(zip(names, zip(*(tail for _, tail in blocks))))
    return StepTable(
        headings=tuple(metric + ARROWS[better_of(results, metric)] for metric in metrics),
        steps=tuple(steps),
        rows=tuple((line.label, tuple(body[i] for body, _ in blocks)) for i, line in enumerate(shown)),
        references=tuple((label, cells) for label, cells in tails if any(cell.text for cell in cells)),
        notes=(*(note for metric in metrics for note in _notes(results, metric)), *_spread_note(results)),
    )


def table1(
    results: Results, metrics: Sequence[str], steps: Sequence[int] = STEPS, gamma: float = HEADLINE_GAMMA
) -> str:
    """Return the table as Markdown, the best figure of each column in bold, with a line on each metric."""
    table = step_table(results, metrics, steps, gamma)
    head = [f"{h}: {s}" if i == 0 else f"{s}" for h in table.headings for i, s in enumerate(table.steps)]
    text = [_line(["calls", *head]), "| --- |" + " ---: |" * len(head)]
    text += [_line([label, *(c.markdown for block in body for c in block)]) for label, body in table.rows]
    if table.references:
        text += ["", _line(["beside them", *table.headings]), "| --- |" + " ---: |" * len(metrics)]
        text += [_line([label, *(cell.markdown for cell in cells)]) for label, cells in table.references]
    return "\n".join([*text, "", *(f"- {note}" for note in table.notes)]) + "\n"


def better_of(results: Results, metric: str) -> str:
    """Say which way of a metric is better: lower, higher or neither."""
    return next((identity.better for identity in results.identities(metric)), "neither")


def decimals(values: Sequence[float], digits: int = DIGITS) -> int:
    """Return how many decimals give the smallest of some figures that many significant digits, 0 to 5."""
    sizes = [abs(value) for value in values if value and math.isfinite(value)]
    return min(5, max(0, digits - 1 - math.floor(math.log10(min(sizes))))) if sizes else 2


def _block(
    results: Results,
    metric: str,
    shown: Sequence[Line],
    beyond: Sequence[tuple[Line, int]],
    steps: Sequence[int],
) -> tuple[list[tuple[Cell, ...]], list[Cell]]:
    """The cells of one metric, and those of its reference rows."""
    found = [[summary(line, count, metric) for count in steps] for line in shown]
    tail = [summary(line, count, metric) for line, count in beyond]
    summaries = [figure for row in [*found, tail] for figure in row if figure]
    places = decimals([figure.mean for figure in summaries])
    if any(figure.spread and round(figure.spread, places) == 0 for figure in summaries):
        places += 1
    better = better_of(results, metric)
    best = [_best([row[column] for row in found], better) for column in range(len(steps))]

    def cell(figure: Summary | None, target: float | None = None) -> Cell:
        if figure is None:
            return Cell()
        text = f"{figure.mean:.{places}f}"
        tied = target is not None and text == f"{target:.{places}f}"
        return Cell(text, "" if figure.spread is None else f"{figure.spread:.{places}f}", tied)

    floor = results.floor(metric)
    real = Cell() if floor is None else Cell(f"{floor:.{places}f}")
    body = [tuple(cell(figure, target) for figure, target in zip(row, best)) for row in found]
    return body, [*(cell(figure) for figure in tail), real]


def _best(column: Sequence[Summary | None], better: str) -> float | None:
    means = [figure.mean for figure in column if figure]
    if better == "neither" or not means:
        return None
    return min(means) if better == "lower" else max(means)


def _notes(results: Results, metric: str) -> list[str]:
    """What the metric is; a warning where its figures do not compare."""
    figures = [row.figures[metric] for row in results.rows if metric in row.figures]
    if not figures:
        return [f"{metric}: not measured."]
    counts = sorted({figure.n for figure in figures})
    n = f"n = {counts[0]}" if len(counts) == 1 else f"n = {counts[0]} to {counts[-1]}"
    seeds = len({row.seed for row in results.rows if metric in row.figures})
    n += f", {seeds} seeds" if seeds > 1 else ", 1 seed"
    identities = results.identities(metric)
    meaning = f"{identities[0].measures}" if identities else "no identity record"
    unit = f", in {identities[0].unit}" if identities and identities[0].unit else ""
    warning = (
        [f"Caution: {metric} was not measured in one way in all rows; they do not compare."]
        if len(identities) > 1
        else []
    )
    return [f"{metric}: {meaning}{unit} ({n}).", *warning]


def _spread_note(results: Results) -> list[str]:
    several = len({row.seed for row in results.rows}) > 1
    return ["Mean over seeds ± standard deviation over seeds."] if several else []


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
