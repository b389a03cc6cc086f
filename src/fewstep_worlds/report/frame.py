"""The figures of a comparison as one tidy DataFrame."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
from pandas import DataFrame

from fewstep.common.errors import UserError
from fewstep.evaluation.bootstrap import paired_difference
from fewstep.evaluation.metric import Figure
from fewstep_worlds.report.results import Results

HEADLINE_GAMMA = 0.2
"""The TCD paper's gamma."""
SWEEP = 3
"""Gammas at one step count that make a sweep. A sweep has a figure of its own and is left out of tables."""
SETTINGS = ["method", "steps", "seed", "gamma", "omega", "calls_note", "note"]
FIGURE = ["value", "low", "high", "n", "identity"]


def tidy(results: Results) -> DataFrame:
    """Return a row for each figure: `SETTINGS`, label, metric, `FIGURE`, and the scores of the prompts.

    The label is the method, with gamma or omega where a method has several at one step count. Rows of a method are
    consecutive, in the order of the results.
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
    for name, sign in (("gamma", "γ"), ("omega", "ω")):
        varied = (frame.groupby(["method", "steps"])[name].nunique(dropna=False) > 1).groupby("method").any()
        shown = frame.method.isin(varied.index[varied])
        frame.loc[shown, "label"] += [f", {sign} = {'none' if pd.isna(x) else f'{x:g}'}" for x in frame[name][shown]]
    return frame


def means(frame: DataFrame) -> DataFrame:
    """Return mean, spread and interval over seeds, indexed by (label, metric, steps).

    The spread is the standard deviation over seeds (n - 1), NaN for one seed. The interval is mean -+ spread; for one
    seed it is the bootstrap interval over pictures.
    """
    groups = frame.groupby(["label", "metric", "steps"], sort=False)
    columns = {name: (name, "first") for name in ("method", "gamma", "low", "high")}
    found = groups.agg(**columns, spread=("value", "std"), value=("value", "mean"))
    several = found.spread.notna()
    found["low"] = found.low.mask(several, found.value - found.spread)
    found["high"] = found.high.mask(several, found.value + found.spread)
    return found


def swept(frame: DataFrame) -> str | None:
    """Return the method that was measured at `SWEEP` gammas or more at one step count, None if none was."""
    gammas = frame.groupby(["method", "steps"], sort=False).gamma.nunique()
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
    frame: DataFrame, ours: str, theirs: str, metric: str, steps: int, their_steps: int | None = None
) -> Figure | None:
    """Return the mean of ours - theirs over prompts, with its bootstrap interval over prompts.

    Each prompt's score is first averaged over the seeds that both labels have.

    Args:
        their_steps: network calls of theirs; None for `steps`.

    Returns:
        None where the two share no seed with scores.

    Raises:
        UserError: the two were not scored on the same number of prompts.
    """
    scored = frame[(frame.metric == metric) & frame.scores.notna()]
    sides = [
        scored[(scored.label == label) & (scored.steps == count)].set_index("seed")
        for label, count in ((ours, steps), (theirs, their_steps or steps))
    ]
    seeds = sorted(set(sides[0].index) & set(sides[1].index))
    if not seeds:
        return None
    scores = [[side.scores[seed] for seed in seeds] for side in sides]
    counts = sorted({len(own) for side in scores for own in side})
    if len(counts) > 1:
        raise UserError(
            f"{metric} of {ours} and {theirs} at {steps} calls has scores of {counts} prompts; give both the same "
            "prompts"
        )
    difference = paired_difference(np.mean(scores[0], axis=0), np.mean(scores[1], axis=0), 0)
    return replace(difference, identity=sides[0].identity.iloc[0])
