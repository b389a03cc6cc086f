"""The TCD paper's claims (arXiv 2402.19159), each held or not on measured rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from fewstep.evaluation.metric import Figure
from fewstep_worlds.emoji8.report.lines import HEADLINE_GAMMA, Line, Summary, headline, lines, lines_of, summary
from fewstep_worlds.emoji8.report.results import Results
from fewstep_worlds.emoji8.report.step_table import STEPS

TCD, LCM, DDIM, EULER, DPMPP, TEACHER = "TCD", "LCM", "DDIM", "Euler", "DPM-Solver++(2S)", "teacher"
TEACHER_STEPS = 50
"""Guided DDIM steps of the teacher's end points, to which students are compared."""
WITHIN = 0.10
SAME = 0.01
"""Relative difference below which Euler and DDIM count as equal: networks in bf16 and 8-bit pictures round."""
SAME_AT_ZERO = 0.1
"""The same in widths of a figure's interval, for unbiased distances, which may be 0 in truth."""
VERDICTS = {True: "held", False: "not held", None: "not measured"}


@dataclass(frozen=True)
class Claim:
    """A statement and what was measured.

    Attributes:
        text: the statement, in the words in which it can be checked.
        held: None where rows for it are missing.
        figures: what it rests on, by name.
        note: what is missing, or how sure the verdict is.
    """

    text: str
    held: bool | None
    figures: dict[str, float] = field(default_factory=dict)
    note: str = ""

    @property
    def verdict(self) -> str:
        """The outcome in words."""
        return VERDICTS[self.held]

    @property
    def evidence(self) -> str:
        """Its figures in words."""
        return ", ".join(f"{name}: {_number(value)}" for name, value in self.figures.items())


def claims(results: Results, gamma: float = HEADLINE_GAMMA) -> list[Claim]:
    """Check every claim; where FD was not measured (too few pictures), those about it are checked on KID.

    The paper's distances are to real pictures. Beside a teacher that is far from these, a student that blurs may look
    better than its teacher: where distances to the teacher's own pictures were measured, the comparisons of methods
    are checked on them too.

    Args:
        gamma: at which TCD is judged, where it was measured at several.
    """
    real = results.of("quality", "real") or ["FD"]
    main = real[0]
    tcd, lcm = headline(results, TCD, gamma), headline(results, LCM, gamma)
    taught = results.of("quality", "teacher")
    both = [main, *taught[:1]]
    found = [_better(name, tcd, steps, lcm, steps, LCM) for name in (*real, *taught) for steps in STEPS]
    found += [_rise(name, tcd, lcm) for name in both]
    for name in results.of("detail") or ["detail"]:
        found += [_trend(name, tcd, TCD, 1), _trend(name, lcm, LCM, -1)]
    for method, steps in ((DDIM, 4), (EULER, 4), (DPMPP, 4), (DDIM, 8)):
        for line in lines_of(results, method) or (None,):
            found += [_better(name, tcd, 4, line, steps, method) for name in both]
    teachers = [line for line in lines(results) if line.method.split(",")[0] == TEACHER]
    for line in teachers or (None,):
        found.append(_within(main, tcd, line))
    found.append(_euler_is_ddim(results))
    return found


def claims_table(found: Sequence[Claim]) -> str:
    """Return claims as a Markdown table."""
    rows = ["| claim | outcome | figures |", "| --- | --- | --- |"]
    for claim in found:
        figures = "; ".join(part for part in (claim.evidence, claim.note) if part)
        rows.append(f"| {claim.text} | {claim.verdict} | {figures} |".replace("\n", " "))
    return "\n".join(rows) + "\n"


def _look(metric: str, asked: Sequence[tuple[Line | None, str, int]]) -> tuple[list[Summary], str]:
    """The figures of (line, its method, steps), and which are missing, in words."""
    found = [summary(line, steps, metric) if line else None for line, _, steps in asked]
    missing = [f"{name} at {steps}" for (_, name, steps), figure in zip(asked, found) if figure is None]
    return [figure for figure in found if figure], f"no {metric} of {', '.join(missing)}" if missing else ""


def _percent(share: float, sign: str = "") -> str:
    return f"{100 * share:{sign}.0f} %"


def _words(metric: str) -> str:
    head, colon, tail = metric.partition(": ")
    return f"{head} ({tail})" if colon else metric


def _names(asked: Sequence[tuple[Line | None, str, int]]) -> list[str]:
    return [f"{line.label if line else name} at {steps}" for line, name, steps in asked]


def _better(metric: str, ours: Line | None, steps: int, theirs: Line | None, other: int, method: str) -> Claim:
    asked = ((ours, TCD, steps), (theirs, method, other))
    names = _names(asked)
    text = f"{names[0]} calls is better than {names[1]} in {metric}"
    found, missing = _look(metric, asked)
    if missing:
        return Claim(text, None, note=missing)
    a, b = found
    note = "the intervals overlap" if _overlap(a, b) else ""
    return Claim(text, a.mean < b.mean, dict(zip(names, (a.mean, b.mean))), note)


def _overlap(a: Summary, b: Summary) -> bool:
    if a.low is None or a.high is None or b.low is None or b.high is None:
        return False
    return a.low <= b.high and b.low <= a.high


def _rise(metric: str, tcd: Line | None, lcm: Line | None) -> Claim:
    text = f"LCM's {metric} rises from 4 to 20 calls at least twice as much as TCD's (paper, FID: +21 % and +7 %)"
    found, missing = _look(metric, ((lcm, LCM, 4), (lcm, LCM, 20), (tcd, TCD, 4), (tcd, TCD, 20)))
    if missing:
        return Claim(text, None, note=missing)
    lcm4, lcm20, tcd4, tcd20 = (figure.mean for figure in found)
    if min(lcm4, tcd4) <= 0:
        return Claim(text, None, {"LCM at 4": lcm4, "TCD at 4": tcd4}, "not above 0 at 4 calls: it has no rise in %")
    ours, theirs = tcd20 / tcd4 - 1, lcm20 / lcm4 - 1
    figures = {"LCM at 4": lcm4, "LCM at 20": lcm20, "TCD at 4": tcd4, "TCD at 20": tcd20}
    note = f"LCM {_percent(theirs, '+')}, TCD {_percent(ours, '+')}"
    return Claim(text, theirs > 0 and theirs >= 2 * ours, figures, note)


def _trend(metric: str, line: Line | None, method: str, sign: int) -> Claim:
    way = "rises" if sign > 0 else "falls"
    # in the paper's own table LCM's falls from 4 calls on only; TCD's rises at every count
    late = [steps for steps in STEPS if sign > 0 or steps >= 4]
    text = f"{method}'s {_words(metric)} {way} with the calls ({', '.join(map(str, late))})"
    found, missing = _look(metric, [(line, method, steps) for steps in STEPS])
    if missing:
        return Claim(text, None, note=missing)
    figures = {f"{method} at {steps}": figure.mean for steps, figure in zip(STEPS, found)}
    path = [figure.mean for steps, figure in zip(STEPS, found) if steps in late]
    steady = all(sign * (b - a) > 0 for a, b in pairwise(path))
    in_all = sign * (path[-1] - path[0]) > 0
    note = "" if steady or not in_all else f"it {way} from {late[0]} to {late[-1]}, but not at every count"
    return Claim(text, steady, figures, note)


def _within(metric: str, tcd: Line | None, teacher: Line | None) -> Claim:
    asked = ((tcd, TCD, 8), (teacher, TEACHER, TEACHER_STEPS))
    names = _names(asked)
    text = f"{names[0]} calls is within {_percent(WITHIN)} of the {names[1]} in {metric}, or better"
    found, missing = _look(metric, asked)
    if missing:
        return Claim(text, None, note=missing)
    ours, theirs = (figure.mean for figure in found)
    figures = dict(zip(names, (ours, theirs)))
    if theirs <= 0:
        return Claim(text, None, figures, "the teacher's is not above 0: it has no 10 %")
    return Claim(text, ours <= (1 + WITHIN) * theirs, figures, _percent(ours / theirs - 1, "+"))


def _euler_is_ddim(results: Results) -> Claim:
    """Not the paper's, which lists both: Euler in sigma is DDIM, if the two take the same times."""
    text = (
        f"Euler (in sigma) equals DDIM on one grid: every figure within {_percent(SAME)}, or within "
        f"{_percent(SAME_AT_ZERO)} of its interval's width (not a claim of the paper)"
    )
    gaps: dict[str, float] = {}
    settings = {(row.steps, row.omega, row.seed): row for row in results.rows if row.method == DDIM}
    for row in results.rows:
        other = settings.get((row.steps, row.omega, row.seed))
        if row.method != EULER or other is None:
            continue
        for name in row.figures.keys() & other.figures.keys():
            gaps[name] = max(gaps.get(name, 0.0), _gap(row.figures[name], other.figures[name]))
    if not gaps:
        return Claim(text, None, note="no rows of Euler and DDIM at equal calls, guidance and seed")
    worst = max(gaps, key=lambda name: gaps[name])
    return Claim(text, gaps[worst] <= 1, {f"largest difference, of what is allowed ({worst})": gaps[worst]})


def _gap(a: Figure, b: Figure) -> float:
    """The difference of two figures as a share of what rounding may make of it."""
    if a.value == b.value:
        return 0.0
    width = (a.high or 0.0) - (a.low or 0.0)
    return abs(a.value - b.value) / max(SAME * abs(a.value), SAME * abs(b.value), SAME_AT_ZERO * width)


def _number(value: float) -> str:
    """A value with three significant digits or more, without exponents for ordinary sizes."""
    if value and abs(value) < 0.1:
        return f"{value:.5f}"
    return f"{value:.4f}" if abs(value) < 1 else f"{value:.2f}" if abs(value) < 1000 else f"{value:.0f}"
