"""The TCD paper's claims (arXiv 2402.19159), each held or not on measured figures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import pandas as pd
from pandas import DataFrame, Series

from fewstep_worlds.common.tables import markdown
from fewstep_worlds.emoji8.report.frame import headline, means, tidy
from fewstep_worlds.emoji8.report.results import Results
from fewstep_worlds.emoji8.report.tables import STEPS

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


@dataclass(frozen=True)
class Line:
    """A method's label in the figures; None where it was not measured."""

    method: str
    label: str | None

    def at(self, steps: int) -> str:
        """Return the name of its figure at a step count."""
        return f"{self.label or self.method} at {steps}"


Judge = Callable[[Sequence[Series]], tuple[bool | None, str]]
"""Rows of `means` -> whether a claim holds, and a note."""


def claims(results: Results) -> list[Claim]:
    """Check every claim.

    The paper's distances are to real pictures: FD, and KID where FD was not measured (too few pictures). A student
    that blurs may be nearer to them than a teacher that has not converged, so methods are also compared by their
    distances to the teacher's own pictures where these were measured.
    """
    frame = tidy(results)
    real, to_teacher = results.of("quality", "real") or ["FD"], results.of("quality", "teacher")
    both = [real[0], *to_teacher[:1]]
    tcd, lcm = Line(TCD, headline(frame, TCD)), Line(LCM, headline(frame, LCM))
    check = _Checker(means(frame))
    found = [check.better(name, tcd, steps, lcm, steps) for name in (*real, *to_teacher) for steps in STEPS]
    found += [check.rise(name, tcd, lcm) for name in both]
    for name in results.of("detail") or ["detail"]:
        found += [check.trend(name, tcd, 1), check.trend(name, lcm, -1)]
    for method, steps in ((DDIM, 4), (EULER, 4), (DPMPP, 4), (DDIM, 8)):
        for label in frame.label[frame.method == method].drop_duplicates().tolist() or [None]:
            found += [check.better(name, tcd, 4, Line(method, label), steps) for name in both]
    teachers = frame.label[frame.method.str.split(",").str[0] == TEACHER] if len(frame) else frame.label
    for label in teachers.drop_duplicates().tolist() or [None]:
        found.append(check.within(real[0], tcd, Line(TEACHER, label)))
    return [*found, _euler_is_ddim(frame)]


def claims_table(found: Sequence[Claim]) -> str:
    """Return claims as a Markdown table."""
    return markdown(["claim", "outcome", "figures"], [(c.text, c.verdict, c.evidence) for c in found], 3)


class _Checker:
    """Claims about the means over seeds."""

    def __init__(self, table: DataFrame) -> None:
        self.rows: dict[tuple[object, str, int], Series] = dict(zip(table.index, (row for _, row in table.iterrows())))

    def check(self, text: str, metric: str, wanted: Sequence[tuple[Line, int]], judge: Judge) -> Claim:
        """Return a claim on the figures of (line, steps); undecided where one is missing."""
        names = [line.at(steps) for line, steps in wanted]
        found = [self.rows.get((line.label, metric, steps)) for line, steps in wanted]
        missing = [name for name, row in zip(names, found) if row is None]
        if missing:
            return Claim(text, None, note=f"no {metric} of {', '.join(missing)}")
        rows = [row for row in found if row is not None]
        held, note = judge(rows)
        return Claim(text, held, {name: float(row.value) for name, row in zip(names, rows)}, note)

    def better(self, metric: str, ours: Line, steps: int, theirs: Line, their_steps: int) -> Claim:
        """Claim that one figure is lower than another."""

        def judge(rows: Sequence[Series]) -> tuple[bool, str]:
            a, b = rows
            overlap = a.low <= b.high and b.low <= a.high
            return bool(a.value < b.value), "the intervals overlap" if overlap else ""

        text = f"{ours.at(steps)} calls is better than {theirs.at(their_steps)} in {metric}"
        return self.check(text, metric, [(ours, steps), (theirs, their_steps)], judge)

    def rise(self, metric: str, tcd: Line, lcm: Line) -> Claim:
        """Claim that LCM gets worse with more calls at least twice as fast as TCD."""

        def judge(rows: Sequence[Series]) -> tuple[bool | None, str]:
            lcm4, lcm20, tcd4, tcd20 = (row.value for row in rows)
            if min(lcm4, tcd4) <= 0:
                return None, "not above 0 at 4 calls: there is no rise in %"
            ours, theirs = tcd20 / tcd4 - 1, lcm20 / lcm4 - 1
            return bool(theirs > 0 and theirs >= 2 * ours), f"LCM {100 * theirs:+.0f} %, TCD {100 * ours:+.0f} %"

        text = f"LCM's {metric} rises from 4 to 20 calls at least twice as much as TCD's (paper, FID: +21 % and +7 %)"
        return self.check(text, metric, [(lcm, 4), (lcm, 20), (tcd, 4), (tcd, 20)], judge)

    def trend(self, metric: str, line: Line, sign: int) -> Claim:
        """Claim that a figure rises (sign 1) or falls (-1) with the calls."""
        direction = "rises" if sign > 0 else "falls"
        # in the paper's own table LCM's falls from 4 calls on only; TCD's rises at every count
        late = [steps for steps in STEPS if sign > 0 or steps >= 4]

        def judge(rows: Sequence[Series]) -> tuple[bool, str]:
            values = [row.value for row in rows][-len(late) :]
            steady = all(sign * (b - a) > 0 for a, b in pairwise(values))
            partly = not steady and sign * (values[-1] - values[0]) > 0
            note = f"it {direction} from {late[0]} to {late[-1]}, but not at every count" if partly else ""
            return steady, note

        head, colon, tail = metric.partition(": ")
        name = f"{head} ({tail})" if colon else metric
        text = f"{line.method}'s {name} {direction} with the calls ({', '.join(map(str, late))})"
        return self.check(text, metric, [(line, steps) for steps in STEPS], judge)

    def within(self, metric: str, tcd: Line, teacher: Line) -> Claim:
        """Claim that TCD at 8 calls is within 10 % of the teacher."""

        def judge(rows: Sequence[Series]) -> tuple[bool | None, str]:
            ours, theirs = (row.value for row in rows)
            if theirs <= 0:
                return None, "the teacher's figure is not above 0: there is no 10 % of it"
            return bool(ours <= (1 + WITHIN) * theirs), f"{100 * (ours / theirs - 1):+.0f} %"

        end = teacher.at(TEACHER_STEPS)
        text = f"{tcd.at(8)} calls is within {100 * WITHIN:.0f} % of the {end} in {metric}, or better"
        return self.check(text, metric, [(tcd, 8), (teacher, TEACHER_STEPS)], judge)


def _euler_is_ddim(frame: DataFrame) -> Claim:
    """Claim (not the paper's, which lists both) that Euler in sigma is DDIM, the two taking the same times."""
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
