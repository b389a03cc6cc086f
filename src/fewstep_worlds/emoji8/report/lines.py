"""Rows of a comparison by method: mean and spread over seeds, and differences prompt by prompt."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from fewstep.common.errors import UserError
from fewstep.evaluation.bootstrap import paired_difference
from fewstep.evaluation.metric import Figure, Identity
from fewstep_worlds.emoji8.report.results import Results, Row

HEADLINE_GAMMA = 0.2
"""The TCD paper's gamma."""
SWEEP = 3
"""Gammas at one step count that make a sweep: a figure of its own, not lines of a table."""


@dataclass(frozen=True)
class Line:
    """A method in one setting (at a step count there is one gamma and one omega): a row of a table, a curve.

    Attributes:
        label: the method, with its gamma or omega where the method alone would not tell.
        method: its name.
        rows: of all step counts and seeds.
    """

    label: str
    method: str
    rows: tuple[Row, ...]

    @property
    def steps(self) -> tuple[int, ...]:
        """Its step counts, ascending."""
        return tuple(sorted({row.steps for row in self.rows}))

    def at(self, steps: int) -> tuple[Row, ...]:
        """Return its rows at a step count, one a seed."""
        return tuple(row for row in self.rows if row.steps == steps)


@dataclass(frozen=True)
class Summary:
    """A figure over seeds.

    Attributes:
        mean: over seeds.
        spread: standard deviation over seeds (of n - 1), None for one seed.
        low: mean - spread; for one seed the lower end of the bootstrap interval, or None.
        high: the upper end likewise.
        seeds: how many.
        n: pictures a seed, the smallest.
        identity: what was measured.
    """

    mean: float
    spread: float | None
    low: float | None
    high: float | None
    seeds: int
    n: int
    identity: Identity | None


def lines(results: Results) -> tuple[Line, ...]:
    """Group rows by method; a method with several settings at one step count is split by setting."""
    found: list[Line] = []
    for method in dict.fromkeys(row.method for row in results.rows):
        rows = [row for row in results.rows if row.method == method]
        gammas = _varies((row.steps, row.gamma) for row in rows)
        omegas = _varies((row.steps, row.omega) for row in rows)
        split: dict[str, list[Row]] = {}
        for row in rows:
            parts = [method]
            parts += [f"γ = {_or_none(row.gamma)}"] if gammas else []
            parts += [f"ω = {_or_none(row.omega)}"] if omegas else []
            split.setdefault(", ".join(parts), []).append(row)
        found += [Line(label, method, tuple(group)) for label, group in split.items()]
    return tuple(found)


def lines_of(results: Results, method: str) -> tuple[Line, ...]:
    """Return all settings of one method."""
    return tuple(line for line in lines(results) if line.method == method)


def swept(results: Results) -> str | None:
    """Return the method that was measured at `SWEEP` gammas or more at one step count, None if none was."""
    gammas: dict[tuple[str, int], set[float]] = {}
    for row in results.rows:
        if row.gamma is not None:
            gammas.setdefault((row.method, row.steps), set()).add(row.gamma)
    return next((method for (method, _), values in gammas.items() if len(values) >= SWEEP), None)


def compared(results: Results, gamma: float = HEADLINE_GAMMA) -> tuple[Line, ...]:
    """Return the lines that stand beside each other in tables: all but those of a sweep over gamma.

    Of a sweep under a method's own name ("TCD", not "TCD, gamma sweep") the line at this gamma stays.
    """
    sweep = swept(results)
    kept = headline(results, sweep, gamma) if sweep and "," not in sweep else None
    return tuple(line for line in lines(results) if line.method != sweep or line == kept)


def headline(results: Results, method: str, gamma: float = HEADLINE_GAMMA) -> Line | None:
    """Return the setting that stands for a method: its only one, else the first at this gamma, else the first."""
    options = lines_of(results, method)
    chosen = [line for line in options if all(row.gamma == gamma for row in line.rows)]
    return next(iter(chosen or options), None)


def summary(line: Line, steps: int, metric: str) -> Summary | None:
    """Return a figure's mean and spread over seeds, None where nothing was measured."""
    figures = [row.figures[metric] for row in line.at(steps) if metric in row.figures]
    if not figures:
        return None
    values = np.array([figure.value for figure in figures])
    mean, low, high = float(values.mean()), figures[0].low, figures[0].high
    spread = float(values.std(ddof=1)) if len(values) > 1 else None
    if spread is not None:
        low, high = mean - spread, mean + spread
    n = min(figure.n for figure in figures)
    return Summary(mean, spread, low, high, len(values), n, figures[0].identity)


def paired(
    ours: Line, theirs: Line, steps: int, metric: str, seed: int = 0, *, their_steps: int | None = None
) -> Figure | None:
    """Return the mean of ours - theirs over prompts, with its bootstrap interval over prompts.

    Each prompt's number is first averaged over the seeds that both have.

    Args:
        their_steps: calls of theirs; None for as many.

    Returns:
        None where the two share no seed with scores.

    Raises:
        UserError: the two were not scored on the same number of prompts.
    """
    left, right = _scores(ours, steps, metric), _scores(theirs, their_steps or steps, metric)
    shared = sorted(left.keys() & right.keys())
    if not shared:
        return None
    counts = {len(scores[s]) for scores in (left, right) for s in shared}
    if len(counts) > 1:
        raise UserError(
            f"{metric} of {ours.label} and {theirs.label} at {steps} calls has scores of {sorted(counts)} prompts; "
            "give each the same prompts"
        )
    means = [np.mean([scores[s] for s in shared], axis=0) for scores in (left, right)]
    identity = next((row.figures[metric].identity for row in ours.at(steps) if metric in row.figures), None)
    return replace(paired_difference(means[0], means[1], seed), identity=identity)


def _scores(line: Line, steps: int, metric: str) -> dict[int, list[float]]:
    return {row.seed: row.scores[metric] for row in line.at(steps) if metric in row.scores}


def _varies(pairs: Iterable[tuple[int, float | None]]) -> bool:
    """Is there a step count with more than one value?"""
    distinct = set(pairs)
    return len({steps for steps, _ in distinct}) < len(distinct)


def _or_none(value: float | None) -> str:
    return "none" if value is None else f"{value:g}"
