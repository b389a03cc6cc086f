"""The figures of a comparison as one tidy DataFrame."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import numpy as np
import pandas as pd
from pandas import DataFrame

from fewstep.common.errors import UserError
from fewstep.evaluation.bootstrap import paired_difference
from fewstep.evaluation.metric import Figure
from fewstep_worlds.report.results import By, Results

HEADLINE_GAMMA = 0.2
"""The TCD paper's gamma."""
SWEEP = 3
"""Gammas at one count that make a sweep. A sweep has a figure of its own and is left out of tables."""
SETTINGS = ["method", "steps", "nfe", "seed", "gamma", "omega", "note"]
FIGURE = ["value", "low", "high", "n", "identity"]


def tidy(results: Results, by: By) -> DataFrame:
    """Return a row for each figure: `SETTINGS`, label, count, metric, `FIGURE`, and the scores of the prompts.

    The label is the method, with gamma or omega where a method has several at one count of either kind. Rows of a
    method are consecutive, in the order of the results.

    Args:
        by: what the count is.
    """
    methods = list(dict.fromkeys(row.method for row in results.rows))
    records = [
        [*(getattr(row, name) for name in SETTINGS), metric, *(getattr(figure, name) for name in FIGURE),
         row.scores.get(metric)]
        for row in sorted(results.rows, key=lambda row: methods.index(row.method))
        for metric, figure in row.figures.items()
    ]  # fmt: skip
    frame = DataFrame(records, columns=[*SETTINGS, "metric", *FIGURE, "scores"])
    frame = frame.astype(dict.fromkeys(("gamma", "omega", "value", "low", "high"), float))
    frame["label"] = frame.method
    frame["count"] = frame[by]
    for name, sign in (("gamma", "γ"), ("omega", "ω")):
        several = [
            frame.groupby(["method", kind])[name].transform("nunique", dropna=False) > 1 for kind in get_args(By)
        ]
        shown = frame.method.isin(frame.method[several[0] | several[1]])
        frame.loc[shown, "label"] += [f", {sign} = {'none' if pd.isna(x) else f'{x:g}'}" for x in frame[name][shown]]
    return frame


def means(frame: DataFrame) -> DataFrame:
    """Return mean, spread and interval over seeds, indexed by (label, metric, count).

    The spread is the standard deviation over seeds (n - 1), NaN for one seed. The interval is mean -+ spread; for one
    seed it is the bootstrap interval over pictures.
    """
    groups = frame.groupby(["label", "metric", "count"], sort=False)
    columns = {name: (name, "first") for name in ("method", "steps", "nfe", "gamma", "low", "high")}
    found = groups.agg(**columns, spread=("value", "std"), value=("value", "mean"))
    several = found.spread.notna()
    found["low"] = found.low.mask(several, found.value - found.spread)
    found["high"] = found.high.mask(several, found.value + found.spread)
    return found


def swept(frame: DataFrame) -> str | None:
    """Return the method that was measured at `SWEEP` gammas or more at one count, None if none was."""
    gammas = frame.groupby(["method", "count"], sort=False).gamma.nunique()
    return next((method for method, _ in gammas.index[gammas >= SWEEP]), None)


def compared(frame: DataFrame) -> DataFrame:
    """Return the rows that tables compare: all but those of a sweep over gamma.

    Of a sweep under a method's own name ("TCD", not "TCD, gamma sweep") the headline remains.
    """
    sweep = swept(frame)
    kept = headline(frame, sweep) if sweep and "," not in sweep else None
    return frame[(frame.method != sweep) | (frame.label == kept)]


def headline(frame: DataFrame, method: str) -> str | None:
    """Return the label that represents a method: the first one at `HEADLINE_GAMMA`, else the first."""
    own = frame[frame.method == method]
    other = own.label[own.gamma != HEADLINE_GAMMA]
    return next(iter([*own.label[~own.label.isin(other)], *own.label]), None)


def paired(
    frame: DataFrame, ours: str, theirs: str, metric: str, count: int, their_count: int | None = None
) -> Figure | None:
    """Return the mean of ours - theirs over prompts, with its bootstrap interval over prompts.

    Each prompt's score is first averaged over the seeds that both labels have.

    Args:
        their_count: count of theirs; None for the same.

    Returns:
        None where the two share no seed with scores.

    Raises:
        UserError: the two were not scored on the same number of prompts.
    """
    scored = frame[(frame.metric == metric) & frame.scores.notna()]
    sides = [
        scored[(scored.label == label) & (scored["count"] == number)].set_index("seed")
        for label, number in ((ours, count), (theirs, their_count or count))
    ]
    seeds = sorted(set(sides[0].index) & set(sides[1].index))
    if not seeds:
        return None
    scores = [[side.scores[seed] for seed in seeds] for side in sides]
    lengths = sorted({len(own) for side in scores for own in side})
    if len(lengths) > 1:
        raise UserError(
            f"{metric} of {ours} and {theirs} at {count} has scores of {lengths} prompts; give both the same prompts"
        )
    difference = paired_difference(np.mean(scores[0], axis=0), np.mean(scores[1], axis=0), 0)
    return replace(difference, identity=sides[0].identity.iloc[0])
