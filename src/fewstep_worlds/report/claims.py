"""The TCD paper's claims (arXiv 2402.19159), each held or not on measured figures.

The paper counts steps. Claims on solvers are checked at equal network evaluations (NFE) too, which cost the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from pandas import Series

from fewstep.evaluation.detail import EdgeDensity
from fewstep_worlds.common.tables import markdown
from fewstep_worlds.report.frame import headline, means, swept, tidy
from fewstep_worlds.report.results import By, Results
from fewstep_worlds.report.tables import STEPS, WORDS, better_of

TCD, LCM, DDIM, DPMPP, TEACHER = "TCD", "LCM", "DDIM", "DPM-Solver++(2S)", "teacher"
PARAMETERISATIONS = ("TCF(2)", "TCF(S+)")
"""Methods of the paper's Table 2 beside TCF(1), which is TCD's."""
COMPLEXITY = EdgeDensity.identity.name
"""Metric in place of the paper's image complexity."""
TEACHER_STEPS = 50
"""Guided DDIM steps of the teacher's end points, which students are compared with."""
WITHIN = 0.10
CLOSED = 0.7
"""Share of the gap from DDIM to the teacher that TCD is expected to close at 4 network evaluations."""

Place = tuple[str, int, By]
"""A label and its count."""


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
        figures = ", ".join(f"{name}: {value:.4g}" for name, value in self.figures.items())
        return "; ".join(part for part in (figures, self.note) if part)


Check = Callable[..., tuple[bool | None, str]]
"""Rows of `means` -> whether a claim holds, and a note."""


class Figures:
    """Means over seeds, and claims on some of them."""

    def __init__(self, results: Results) -> None:
        self.frame = tidy(results, "steps")
        tables = {by: means(tidy(results, by)) for by in WORDS}
        self.rows = {(*index, by): row for by, table in tables.items() for index, row in table.iterrows()}
        self.tcd, self.lcm = (headline(self.frame, method) or method for method in (TCD, LCM))
        self.real, self.to_teacher = results.of("quality", "real") or ["FD"], results.of("quality", "teacher")
        self.prompt = results.of("prompt")
        self.first = [names[0] for names in (self.real, self.to_teacher, self.prompt) if names]
        self.sign = {metric: 1 if better_of(results, metric) == "higher" else -1 for metric in results.metrics}

    def labels(self, method: str) -> list[str]:
        """Return the labels of a method, its name if it was not measured."""
        return self.frame.label[self.frame.method == method].unique().tolist() or [method]

    def check(self, text: str, metric: str, places: Sequence[Place], decide: Check) -> Claim:
        """Return a claim on the figures of some places; undecided where one is missing."""
        keys = {_name(place): (place[0], metric, *place[1:]) for place in places}
        missing = [name for name, key in keys.items() if key not in self.rows]
        if missing:
            return Claim(text, None, note=f"no {metric} of {', '.join(missing)}")
        found = {name: self.rows[key] for name, key in keys.items()}
        held, note = decide(*found.values())
        return Claim(text, held, {name: float(row.value) for name, row in found.items()}, note)

    def better(self, metric: str, ours: Place, theirs: Place) -> Claim:
        """Return the claim that one place is better than another."""
        text = f"{_name(ours)} is better than {_name(theirs)} in {metric}"
        return self.check(text, metric, [ours, theirs], _beyond(self.sign.get(metric, -1)))


def claims(results: Results, closed: float = CLOSED) -> list[Claim]:
    """Check every claim.

    The paper's distances are to real pictures: FD, and KID where FD was not measured (too few pictures). A student
    that blurs may be nearer to them than a teacher that has not converged, so methods are also compared by their
    distances to the teacher's own pictures, and by how well pictures fit their prompts, where these were measured.

    Args:
        closed: share of the gap from DDIM to the teacher that TCD is expected to close at 4 network evaluations.
    """
    of = Figures(results)
    return [*_beside_teacher(of, closed), *_beside_lcm(of), *_beside_solvers(of), *_ablations(of)]


def _beside_lcm(of: Figures) -> Iterator[Claim]:
    for metric in (*of.real, *of.to_teacher, *of.prompt):
        for steps in STEPS:
            yield of.better(metric, (of.tcd, steps, "steps"), (of.lcm, steps, "steps"))
    ends: list[Place] = [(label, steps, "steps") for label in (of.lcm, of.tcd) for steps in (4, 20)]
    for metric in (of.real[0], *of.to_teacher[:1]):
        text = "rises from 4 to 20 steps at least twice as much as TCD's (paper, FID: +21 % and +7 %)"
        yield of.check(f"LCM's {metric} {text}", metric, ends, _rise)
    for metric in of.prompt:
        yield of.check(f"{of.tcd}'s {metric} does not fall from 4 to 20 steps", metric, ends[2:], _kept)
    for label, sign, counts in ((of.tcd, 1, STEPS), (of.lcm, -1, STEPS[1:])):  # the paper's LCM falls from 4 steps on
        text = f"{label}'s {COMPLEXITY} {'rises' if sign > 0 else 'falls'} with the steps from {counts[0]} on"
        yield of.check(text, COMPLEXITY, [(label, steps, "steps") for steps in counts], _monotonic(sign))


def _beside_solvers(of: Figures) -> Iterator[Claim]:
    for by in WORDS:
        for method, count in ((DDIM, 4), (DPMPP, 4), (DDIM, 8)):  # Euler is DDIM at the same times
            for label in of.labels(method):
                for metric in of.first:
                    yield of.better(metric, (of.tcd, 4, by), (label, count, by))
    for label in of.labels(DPMPP):
        places: list[Place] = [(of.tcd, 20, "steps"), (label, 20, "steps")]
        yield of.check(f"{_name(places[0])} has more {COMPLEXITY} than {label}", COMPLEXITY, places, _beyond(1))


def _beside_teacher(of: Figures, closed: float) -> Iterator[Claim]:
    omegas = of.frame.drop_duplicates("label").set_index("label").omega
    teachers = [label for label in omegas.index if label.split(",")[0] == TEACHER] or [TEACHER]
    for metric in (of.real[0], *of.prompt[:1]):
        for label in teachers:
            places: list[Place] = [(of.tcd, 8, "steps"), (label, TEACHER_STEPS, "steps")]
            text = f"{_name(places[0])} is within {100 * WITHIN:.0f} % of the {_name(places[1])} in {metric}, or better"
            yield of.check(text, metric, places, _within(of.sign.get(metric, -1)))
    for metric in of.first:
        for label in of.labels(DDIM):
            end = next((name for name in teachers if omegas.get(name) == omegas.get(label)), teachers[0])
            places = [(of.tcd, 4, "nfe"), (label, 4, "nfe"), (end, TEACHER_STEPS, "steps")]
            text = f"{_name(places[0])} closes at least {closed:g} of the gap from {label} to the {end} in {metric}"
            yield of.check(text, metric, places, _closes(of.sign.get(metric, -1), closed))


def _ablations(of: Figures) -> Iterator[Claim]:
    for method in PARAMETERISATIONS:
        if method in set(of.frame.method):
            for metric in of.first:
                yield of.better(metric, (of.tcd, 4, "steps"), (method, 4, "steps"))
    sweep = of.frame[of.frame.method == swept(of.frame)].drop_duplicates("label").sort_values("gamma")
    if len(sweep):
        places: list[Place] = [(label, 4, "steps") for label in sweep.label]
        yield of.check(f"at 4 steps {COMPLEXITY} rises with gamma", COMPLEXITY, places, _monotonic(1))
        text = f"at 4 steps gamma = 0 is worse than the best gamma in {of.real[0]}"
        yield of.check(text, of.real[0], places, _first_is_worse)


def claims_table(found: Sequence[Claim]) -> str:
    """Return claims as a Markdown table."""
    return markdown(["claim", "outcome", "figures"], [(c.text, c.verdict, c.evidence) for c in found], 3)


def _name(place: Place) -> str:
    label, count, by = place
    return f"{label} at {count} {WORDS[by]}"


def _beyond(sign: int) -> Check:
    def decide(ours: Series, theirs: Series) -> tuple[bool, str]:
        overlap = ours.low <= theirs.high and theirs.low <= ours.high
        return bool(sign * (ours.value - theirs.value) > 0), "the intervals overlap" if overlap else ""

    return decide


def _rise(lcm4: Series, lcm20: Series, tcd4: Series, tcd20: Series) -> tuple[bool | None, str]:
    if min(lcm4.value, tcd4.value) <= 0:
        return None, "not above 0 at 4 calls: there is no rise in %"
    ours, theirs = tcd20.value / tcd4.value - 1, lcm20.value / lcm4.value - 1
    return bool(theirs > 0 and theirs >= 2 * ours), f"LCM {100 * theirs:+.0f} %, TCD {100 * ours:+.0f} %"


def _kept(early: Series, late: Series) -> tuple[bool, str]:
    held, note = _beyond(1)(late, early)
    return bool(held or note or late.value == early.value), note or ""


def _monotonic(sign: int) -> Check:
    def decide(*rows: Series) -> tuple[bool, str]:
        values = [row.value for row in rows]
        steady = all(sign * (b - a) > 0 for a, b in pairwise(values))
        partly = not steady and sign * (values[-1] - values[0]) > 0
        return steady, "in that direction from the first to the last, but not at every one" if partly else ""

    return decide


def _within(sign: int) -> Check:
    def decide(ours: Series, teacher: Series) -> tuple[bool | None, str]:
        if teacher.value <= 0:
            return None, "the teacher's figure is not above 0: there is no 10 % of it"
        change = ours.value / teacher.value - 1
        return bool(sign * change >= -WITHIN), f"{100 * change:+.0f} %"

    return decide


def _closes(sign: int, least: float) -> Check:
    def decide(ours: Series, solver: Series, teacher: Series) -> tuple[bool | None, str]:
        ahead, overlap = _beyond(sign)(teacher, solver)
        if overlap or not ahead:
            return None, "the teacher is not clearly better than DDIM: there is no gap"
        share = (ours.value - solver.value) / (teacher.value - solver.value)
        return bool(share >= least), f"{share:.2f} of it"

    return decide


def _first_is_worse(first: Series, *others: Series) -> tuple[bool | None, str]:
    return _beyond(1)(first, min(others, key=lambda row: row.value))
