"""What one row of a comparison has more than another: prompt by prompt, and seed by seed."""

from __future__ import annotations

from collections.abc import Sequence

from fewstep_worlds.emoji8.report.lines import Line, lines_of, paired
from fewstep_worlds.emoji8.report.results import Results

Place = tuple[str, int]
"""A method's name and its network calls."""
DECIMALS = 4


def gains(results: Results, pairs: Sequence[tuple[Place, Place]], metrics: Sequence[str]) -> str:
    """Differences of metrics that score each prompt, as Markdown; a pair of which a row is missing is left out.

    Args:
        pairs: whose gain over whom.

    Returns:
        A table: mean over prompts and seeds with its 95 % interval over prompts, and in brackets each seed's.
    """
    head = ["prompt by prompt, 95 % intervals over prompts (by seed)", *metrics]
    rows = [f"| {' | '.join(head)} |", "| --- " * len(head) + "|"]
    for (method, steps), (other, their_steps) in pairs:
        ours, theirs = _line(results, method, steps), _line(results, other, their_steps)
        if ours is None or theirs is None:
            continue
        cells = [_cell(ours, theirs, steps, their_steps, metric) for metric in metrics]
        rows.append(f"| {method} {steps} - {other} {their_steps} | {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def _line(results: Results, method: str, steps: int) -> Line | None:
    return next((line for line in lines_of(results, method) if line.at(steps)), None)


def _cell(ours: Line, theirs: Line, steps: int, their_steps: int, metric: str) -> str:
    found = paired(ours, theirs, steps, metric, their_steps=their_steps)
    if found is None or found.low is None or found.high is None:
        return ""
    left, right = (
        {row.seed: row.figures[metric].value for row in line.at(n)}
        for line, n in ((ours, steps), (theirs, their_steps))
    )
    each = ", ".join(_told(left[seed] - right[seed]) for seed in sorted(left.keys() & right.keys()))
    return f"{_told(found.value)} ± {abs(found.high - found.low) / 2:.{DECIMALS}f} ({each})"


def _told(value: float) -> str:
    return f"{value:+.{DECIMALS}f}"
