"""Gains of one row over another, printed."""

from __future__ import annotations

import numpy as np

from fewstep.evaluation.metric import Figure
from fewstep_worlds.emoji8.report.gains import gains
from fewstep_worlds.emoji8.report.results import Results, Row

PROMPTS = tuple(f"prompt {i}" for i in range(400))


def row(method: str, steps: int, seed: int, scores: np.ndarray) -> Row:
    value = float(scores.mean())
    figures = {"agreement": Figure(value, value - 0.1, value + 0.1, len(scores))}
    return Row(
        method=method, steps=steps, gamma=None, omega=None, seed=seed, figures=figures,
        scores={"agreement": [float(score) for score in scores]}, commit="0",
    )  # fmt: skip


def test_a_gain_is_between_prompts_and_told_for_each_seed() -> None:
    """What prompts share cancels: a shift of .01 shows among prompts that differ by .3, at other calls too."""
    rng = np.random.default_rng(0)
    prompts = rng.normal(0.5, 0.3, len(PROMPTS))
    rows = []
    for seed, shift in ((0, 0.008), (1, 0.012)):
        own = rng.normal(0, 0.01, len(PROMPTS))
        rows += [row("new", 3, seed, prompts + shift + own - own.mean()), row("old", 25, seed, prompts)]
    rows.append(row("new", 3, 2, prompts + 9))  # a seed that the other has not
    results = Results(title="", rows=tuple(rows), real={}, prompts=PROMPTS, settings={})
    told = gains(results, [(("new", 3), ("old", 25)), (("new", 3), ("gone", 4))], ["agreement"])
    _, _, line = told.strip().split("\n")
    assert line.startswith("| new 3 - old 25 | +0.0100 ± 0.000")
    assert line.endswith("(+0.0080, +0.0120) |")
