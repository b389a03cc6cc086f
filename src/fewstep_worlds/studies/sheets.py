"""Sheets of pictures for a report: the same prompts and noise by the teacher, its solvers and its students."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle, islice

import numpy as np

from fewstep_worlds.report.page import Column, Sheet
from fewstep_worlds.report.results import By
from fewstep_worlds.report.tables import WORDS
from fewstep_worlds.studies.comparison import Comparison, Entry

COUNT = 4
"""Network evaluations, or steps, of what is shown beside the teacher."""
FIRST = ("DDIM", "LCM", "TCD")
"""Methods of the first sheet."""


def spread_rows(comparison: Comparison, pictures: np.ndarray, count: int) -> list[int]:
    """Return the rows of `count` prompts, in turn from each category of the world; the first ones if it has none.

    Args:
        pictures: one of each prompt; a metric of a category gives NaN for prompts of other categories.
    """
    prompts = comparison.store.prompts
    categories = [metric for metric in comparison.metrics if metric.identity.group == "category"]
    left = [np.flatnonzero(~np.isnan(metric.features(pictures, prompts))).tolist() for metric in categories]
    chosen: list[int] = []
    for rows in islice(cycle(left or [list(range(len(prompts)))]), count):
        chosen += [row for row in rows if row not in chosen][:1]
    return chosen


def sheets(comparison: Comparison, teacher: Entry, entries: Sequence[Entry], count: int) -> list[Sheet]:
    """Return the first methods beside the teacher at equal cost, then all at equal cost and at equal steps."""
    store = comparison.store
    rows = spread_rows(comparison, store.pictures(teacher), count)

    def sheet(title: str, chosen: Sequence[Entry]) -> Sheet:
        columns = []
        for entry in (teacher, *chosen):
            omega = entry.sampling.omega
            other = f", omega {omega:g}" if omega not in (0, teacher.sampling.omega) else ""
            cost = f"{entry.steps} step{'s' if entry.steps > 1 else ''}, {entry.count('nfe')} network evaluations"
            columns.append(Column(entry.method + other, cost, store.pictures(entry)[rows]))
        return Sheet(title, [store.prompts[row] for row in rows], columns)

    def alike(by: By) -> list[Entry]:
        return [entry for entry in entries if entry.count(by) == COUNT]

    usual = [e for e in alike("nfe") if e.method in FIRST and e.sampling.omega in (0, teacher.sampling.omega)]
    lead = f"The same prompts by the teacher, and at {COUNT} network evaluations by a solver and by students"
    return [sheet(lead, usual), *(sheet(f"All methods at {COUNT} {WORDS[by]}", alike(by)) for by in WORDS)]
