"""Tables of a comparison: quality by method and step count, and differences prompt by prompt."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import pandas as pd
from pandas import DataFrame

from fewstep.evaluation.metric import ARROWS
from fewstep_worlds.common.tables import markdown
from fewstep_worlds.report.frame import compared, means, paired, tidy
from fewstep_worlds.report.results import By, Results

STEPS = (2, 4, 8, 20)
"""Counts at which methods are compared, as in the TCD paper's Table 1."""
WORDS: dict[By, str] = {"nfe": "NFE", "steps": "steps"}
BLOCKS = 4
"""Metrics beside each other in one table."""
WIDTH = 100
"""Columns of a terminal."""

Place = tuple[str, int]
"""A label or a method, and its count."""


class StepTable(NamedTuple):
    """Table 1's shape: a row a method, a block of columns a metric, a column a count.

    Attributes:
        cells: means over seeds as text, with the spread; empty where nothing was measured.
        best: bool, like `cells`: no other method prints a better mean in the column.
        references: rows beside them, a column a metric: methods without a cell, and real pictures.
        notes: what each metric is and how many pictures it rests on.
    """

    cells: DataFrame
    best: DataFrame
    references: DataFrame
    notes: list[str]


def step_table(results: Results, metrics: Sequence[str], counts: Sequence[int] = STEPS, by: By = "nfe") -> StepTable:
    """Arrange the means over seeds of some metrics."""
    frame = compared(tidy(results, by))
    found = means(frame)
    labels = [label for label, own in frame.groupby("label", sort=False)["count"] if set(own) & set(counts)]
    blocks = {
        metric + ARROWS[better_of(results, metric)]: _block(
            found[found.index.get_level_values("metric") == metric].droplevel("metric"),
            labels,
            counts,
            better_of(results, metric),
            results.floor(metric),
        )
        for metric in metrics
    }
    cells, best = (pd.concat({name: block[part] for name, block in blocks.items()}, axis=1) for part in (0, 1))
    references = DataFrame({name: block[2] for name, block in blocks.items()}).fillna("")
    notes = [note for metric in metrics for note in _notes(results, frame, metric)]
    if frame.seed.nunique() > 1:
        notes.append("Mean over seeds ± standard deviation over seeds.")
    cells = cells.rename_axis(columns=[None, WORDS[by]])
    return StepTable(cells, best, references[(references != "").any(axis=1)], notes)


def _block(
    own: DataFrame, labels: Sequence[str], counts: Sequence[int], better: str, floor: float | None
) -> tuple[DataFrame, DataFrame, dict[str, str]]:
    """Return cells, best and references of one metric, whose means are indexed by (label, count)."""
    beside = own[~own.index.get_level_values("label").isin(labels)]
    values = own.value.unstack("count").reindex(index=labels, columns=counts)
    spreads = own.spread.unstack("count").reindex(index=labels, columns=counts)
    places = decimals([*values.to_numpy().ravel(), *beside.value])
    if any(round(spread, places) == 0 for spread in own.spread if spread > 0):
        places += 1

    def printed(value: float | None) -> str:
        return "" if value is None or math.isnan(value) else f"{value:.{places}f}"

    def spread(value: float) -> str:
        return f" ± {printed(value)}" if printed(value) else ""

    extreme = {"lower": values.min(), "higher": values.max()}.get(better)
    text = values.map(printed).astype(object)
    best = text.eq(extreme.map(printed)) & values.notna() if extreme is not None else text.eq(None)
    references = {
        f"{label}, {row.steps} steps ({row.nfe} NFE)": printed(row.value) + spread(row.spread)
        for (label, _), row in beside.iterrows()
    }
    return text + spreads.map(spread).astype(object), best, references | {"real pictures": printed(floor)}


def measured_counts(results: Results) -> tuple[int, ...]:
    """Return those of `STEPS` at which a row was measured; all of them where none was."""
    return tuple(count for count in STEPS if count in {row.steps for row in results.rows}) or STEPS


def table1(results: Results, metrics: Sequence[str], counts: Sequence[int] = STEPS, by: By = "nfe") -> str:
    """Return the table as Markdown, the best figure of each column in bold, with a line on each metric."""
    table = step_table(results, metrics, counts, by)
    bold = table.cells.mask(table.best, "**" + table.cells + "**")
    head = [f"{metric}: {count}" if count == counts[0] else f"{count}" for metric, count in bold.columns]
    text = markdown([WORDS[by], *head], bold.itertuples(name=None))
    if len(table.references):
        text += "\n" + markdown(["beside them", *table.references.columns], table.references.itertuples(name=None))
    return text + "\n" + "".join(f"- {note}\n" for note in table.notes)


def tables(results: Results, counts: Sequence[int] = STEPS, metrics: Sequence[str] | None = None) -> str:
    """Return the tables of all metrics as Markdown, by network evaluations, then by steps unless these are the same."""
    blocks = table_blocks(results, metrics)
    both = [[table1(results, names, counts, by) for names in blocks] for by in WORDS]
    if all(row.nfe_a_step == 1 or row.steps > max(counts) for row in results.rows):
        both.pop()
    return "\n".join(text for texts in both for text in texts)


def terminal_table(results: Results) -> str:
    """Return the first metrics' tables by network evaluations as plain text of at most `WIDTH` columns."""
    names = default_metrics(results)
    texts = []
    for metrics in (names[:2], names[2:]):
        if metrics:
            table = step_table(results, metrics, measured_counts(results))
            parts = (table.cells.rename_axis(index=None), table.references)
            texts += [part.to_string(line_width=WIDTH) for part in parts if len(part)]
    return "\n\n".join(texts)


def table_blocks(results: Results, metrics: Sequence[str] | None = None) -> list[tuple[str, ...]]:
    """Return the metrics of each table: the given ones (by default `default_metrics`) first, then all others."""
    first = tuple(metrics) if metrics is not None else default_metrics(results)
    others = [name for name in results.metrics if name not in first]
    return [first, *(tuple(others[i : i + BLOCKS]) for i in range(0, len(others), BLOCKS))]


def default_metrics(results: Results) -> tuple[str, ...]:
    """Return up to four metrics: distance to real pictures, prompt, detail, distance to the teacher, then others."""
    groups = [results.of("quality", "real"), results.of("prompt"), results.of("detail"), results.of("teacher")]
    wanted = [name for names in groups for name in names[:1]]
    others = [name for name in results.metrics if name not in results.of("quality", "teacher")]
    return tuple(dict.fromkeys([*wanted, *others]))[:BLOCKS]


def gains(frame: DataFrame, pairs: Sequence[tuple[Place, Place]], metrics: Sequence[str]) -> DataFrame:
    """Return differences of metrics that score each prompt: the mean with its 95 % interval, each seed's.

    Args:
        frame: of `tidy`.
        pairs: (ours, theirs), each a label or a method, and its count; a pair without scores is left out.
    """
    rows = {}
    for (ours, count), (theirs, their_count) in pairs:
        cells = {metric: _gain(frame, (ours, count), (theirs, their_count), metric) for metric in metrics}
        rows[f"{ours} at {count} - {theirs} at {their_count}"] = {name: text for name, text in cells.items() if text}
    return DataFrame({row: cells for row, cells in rows.items() if cells}).T.fillna("")


def better_of(results: Results, metric: str) -> str:
    """Return which direction of a metric is better: lower, higher or neither."""
    return next((identity.better for identity in results.identities(metric)), "neither")


def decimals(values: Sequence[float], digits: int = 3) -> int:
    """Return how many decimals (0 to 5) give the smallest of some figures `digits` significant digits."""
    sizes = [abs(value) for value in values if value and math.isfinite(value)]
    return min(5, max(0, digits - 1 - math.floor(math.log10(min(sizes))))) if sizes else 2


def _gain(frame: DataFrame, ours: Place, theirs: Place, metric: str) -> str:
    sides = []
    for name, count in (ours, theirs):
        own = frame[((frame.label == name) | (frame.method == name)) & (frame["count"] == count)]
        sides.append(own[(own.label == own.label.iloc[0]) & (own.metric == metric)] if len(own) else own)
    if not all(len(side) for side in sides):
        return ""
    figure = paired(frame, sides[0].label.iloc[0], sides[1].label.iloc[0], metric, ours[1], theirs[1])
    if figure is None or figure.low is None or figure.high is None:
        return ""
    left, right = (side.set_index("seed").value for side in sides)
    by_seed = [f"{gain:+.4f}" for gain in (left - right).dropna().sort_index()]
    text = f"{figure.value:+.4f} ± {abs(figure.high - figure.low) / 2:.4f}"
    return f"{text} ({', '.join(by_seed)})" if len(by_seed) > 1 else text


def _notes(results: Results, frame: DataFrame, metric: str) -> list[str]:
    """Return what the metric is, and a warning where its figures do not compare."""
    own = frame[frame.metric == metric]
    if own.empty:
        return [f"{metric}: not measured."]
    counts = " to ".join(str(n) for n in sorted({own.n.min(), own.n.max()}))
    seeds = own.seed.nunique()
    identities = results.identities(metric)
    meaning = identities[0].measures if identities else "no identity record"
    unit = f", in {identities[0].unit}" if identities and identities[0].unit else ""
    warning = f"Caution: {metric} was not measured in one way in all rows; they do not compare."
    return [
        f"{metric}: {meaning}{unit} (n = {counts}, {seeds} seed{'s' if seeds > 1 else ''}).",
        *([warning] if len(identities) > 1 else []),
    ]
