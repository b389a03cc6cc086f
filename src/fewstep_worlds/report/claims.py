"""The TCD paper's claims (arXiv 2402.19159), each held or not on measured figures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import pandas as pd
from pandas import DataFrame, Series

from fewstep_worlds.common.tables import markdown
from fewstep_worlds.report.frame import headline, means, tidy
from fewstep_worlds.report.results import Results
from fewstep_worlds.report.tables import STEPS

TCD, LCM, DDIM, EULER, DPMPP, TEACHER = "TCD", "LCM", "DDIM", "Euler", "DPM-Solver++(2S)", "teacher"
TEACHER_STEPS = 50
"""Guided DDIM steps of the teacher's end points, which students are compared with."""
WITHIN = 0.10
SAME = 0.01
"""Relative difference below which Euler and DDIM count as equal: bf16 networks and 8-bit pictures round."""
SAME_AT_ZERO = 0.1
"""The same in widths of a figure's interval, for unbiased distances, whose true value may be 0."""


@dataclass(frozen=True)
class Claim:
    """A statement and the figures that decide it.

    Attributes:
        held: None where figures are missing.
        figures: what it rests on, by name.
        note: what is missing, or how certain the outcome is.
    """

    text: str
    held: bool | None
    figures: dict[str, float] = field(default_factory=dict)
    note: str = ""

    @property
    def verdict(self) -> str:
        """The outcome in words."""
        return "not measured" if self.held is None else "held" if self.held else "not held"

    @property
    def evidence(self) -> str:
        """Figures and note as text."""
        figures = ", ".join(f"{name}: {_number(value)}" for name, value in self.figures.items())
        return "; ".join(part for part in (figures, self.note) if part)


Check = Callable[..., tuple[bool | None, str]]
"""Rows of `means` -> whether a claim holds, and a note."""


def claims(results: Results) -> list[Claim]:
    """Check every claim.

    The paper's distances are to real pictures: FD, and KID where FD was not measured (too few pictures). A student
    that blurs may be nearer to them than a teacher that has not converged, so methods are also compared by their
    distances to the teacher's own pictures where these were measured.
    """
    frame = tidy(results)
    table = means(frame)
    rows = dict(zip(table.index, (row for _, row in table.iterrows())))

    def check(text: str, metric: str, wanted: Sequence[tuple[str, int]], decide: Check) -> Claim:
        """Return a claim on the figures of (label, steps); undecided where one is missing."""
        names = {f"{label} at {steps}": (label, metric, steps) for label, steps in wanted}
        missing = [name for name, key in names.items() if key not in rows]
        if missing:
            return Claim(text, None, note=f"no {metric} of {', '.join(missing)}")
        found = {name: rows[key] for name, key in names.items()}
        held, note = decide(*found.values())
        return Claim(text, held, {name: float(row.value) for name, row in found.items()}, note)

    def better(metric: str, steps: int, label: str, their_steps: int) -> Claim:
        text = f"{tcd} at {steps} calls is better than {label} at {their_steps} in {metric}"
        return check(text, metric, [(tcd, steps), (label, their_steps)], _lower)

    def trend(metric: str, label: str, sign: int) -> Claim:
        head, colon, tail = metric.partition(": ")
        # in the paper's own table LCM's falls from 4 calls on only; TCD's rises at every count
        late = [steps for steps in STEPS if sign > 0 or steps >= 4]
        text = f"{label}'s {f'{head} ({tail})' if colon else metric} {'rises' if sign > 0 else 'falls'} with the calls"
        return check(
            f"{text} ({', '.join(map(str, late))})", metric, [(label, steps) for steps in STEPS], _monotonic(sign, late)
        )

    tcd, lcm = headline(frame, TCD) or TCD, headline(frame, LCM) or LCM
    real, to_teacher = results.of("quality", "real") or ["FD"], results.of("quality", "teacher")
    both = [real[0], *to_teacher[:1]]
    found = [better(name, steps, lcm, steps) for name in (*real, *to_teacher) for steps in STEPS]
    rise = "rises from 4 to 20 calls at least twice as much as TCD's (paper, FID: +21 % and +7 %)"
    found += [check(f"LCM's {name} {rise}", name, [(lcm, 4), (lcm, 20), (tcd, 4), (tcd, 20)], _rise) for name in both]
    for name in results.of("detail") or ["detail"]:
        found += [trend(name, tcd, 1), trend(name, lcm, -1)]
    for method, steps in ((DDIM, 4), (EULER, 4), (DPMPP, 4), (DDIM, 8)):
        for label in frame.label[frame.method == method].drop_duplicates().tolist() or [method]:
            found += [better(name, 4, label, steps) for name in both]
    teachers = [label for label in frame.label.drop_duplicates() if label.split(",")[0] == TEACHER]
    for label in teachers or [TEACHER]:
        end = f"{label} at {TEACHER_STEPS} in {real[0]}"
        text = f"{tcd} at 8 calls is within {100 * WITHIN:.0f} % of the {end}, or better"
        found.append(check(text, real[0], [(tcd, 8), (label, TEACHER_STEPS)], _within))
    return [*found, _euler_is_ddim(frame)]


def claims_table(found: Sequence[Claim]) -> str:
    """Return claims as a Markdown table."""
    return markdown(["claim", "outcome", "figures"], [(c.text, c.verdict, c.evidence) for c in found], 3)


def _lower(ours: Series, theirs: Series) -> tuple[bool, str]:
    overlap = ours.low <= theirs.high and theirs.low <= ours.high
    return bool(ours.value < theirs.value), "the intervals overlap" if overlap else ""


def _rise(lcm4: Series, lcm20: Series, tcd4: Series, tcd20: Series) -> tuple[bool | None, str]:
    if min(lcm4.value, tcd4.value) <= 0:
        return None, "not above 0 at 4 calls: there is no rise in %"
    ours, theirs = tcd20.value / tcd4.value - 1, lcm20.value / lcm4.value - 1
    return bool(theirs > 0 and theirs >= 2 * ours), f"LCM {100 * theirs:+.0f} %, TCD {100 * ours:+.0f} %"


def _monotonic(sign: int, late: Sequence[int]) -> Check:
    def decide(*rows: Series) -> tuple[bool, str]:
        values = [row.value for row in rows][-len(late) :]
        steady = all(sign * (b - a) > 0 for a, b in pairwise(values))
        partly = not steady and sign * (values[-1] - values[0]) > 0
        return steady, f"in that direction from {late[0]} to {late[-1]}, but not at every count" if partly else ""

    return decide


def _within(ours: Series, teacher: Series) -> tuple[bool | None, str]:
    if teacher.value <= 0:
        return None, "the teacher's figure is not above 0: there is no 10 % of it"
    return bool(ours.value <= (1 + WITHIN) * teacher.value), f"{100 * (ours.value / teacher.value - 1):+.0f} %"


def _euler_is_ddim(frame: DataFrame) -> Claim:
    """Check that Euler in sigma is DDIM at the same times; the paper, which lists both, does not claim it."""
    text = (
        f"Euler (in sigma) equals DDIM on one grid: every figure within {100 * SAME:.0f} %, or within "
        f"{100 * SAME_AT_ZERO:.0f} % of its interval's width (not a claim of the paper)"
    )
    euler, ddim = (frame[frame.method == method] for method in (EULER, DDIM))
    both = euler.merge(ddim, on=["steps", "omega", "seed", "metric"], suffixes=("", "_ddim"))
    if both.empty:
        return Claim(text, None, note="no rows of Euler and DDIM at equal calls, guidance and seed")
    sizes = [SAME * both.value.abs(), SAME * both.value_ddim.abs(), SAME_AT_ZERO * (both.high - both.low)]
    gaps = ((both.value - both.value_ddim).abs() / pd.concat(sizes, axis=1).max(axis=1)).fillna(0.0)  # 0 / 0: equal
    worst = gaps.idxmax()
    name = f"largest difference as a share of what is allowed ({both.metric[worst]})"
    return Claim(text, bool(gaps[worst] <= 1), {name: float(gaps[worst])})


def _number(value: float) -> str:
    """Return a value with three significant digits or more, without exponents for ordinary sizes."""
    if value and abs(value) < 0.1:
        return f"{value:.5f}"
    return f"{value:.4f}" if abs(value) < 1 else f"{value:.2f}" if abs(value) < 1000 else f"{value:.0f}"
