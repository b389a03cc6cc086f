"""Alarms of a run: figures that a student's pictures and the log have left their limits with, in plain words.

Pictures are compared with the teacher's of the same prompts and noise, so that what is common to both cancels. Each
limit leaves room for what healthy students of the recipes do; its reason stands beside it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from statistics import fmean, median
from typing import Any

import numpy as np

from fewstep.evaluation.diversity import pairwise_distance
from fewstep.evaluation.metric import Array, Pictures
from fewstep.evaluation.teacher_distance import pixel_rmse
from fewstep.methods.config import ConsistencyConfig

Figures = Mapping[str, float]

ENOUGH = 100
"""Updates before which nothing is judged: until then students, critics and fake scores are near their starts, and
AdamW's warm-up and moments decide more than the method."""
LINES = 8
"""Log lines that means of quarters need."""
VISIBLE = 4.0
"""8-bit levels added to both sides of a ratio: without them ratios of grey or flat pictures are those of rounding."""
COLOURED = 16
"""Levels between a pixel's channels above which it counts as coloured; clipped white and black backgrounds are none."""

SIDE = 256
"""Pixels a side that pictures are measured at."""

SATURATED = 1.3
"""Chroma or contrast over the teacher's, a third more: what eyes call another look. Both cancel in the ratio up to
sampling noise of some hundredths."""
CLIPPED = 0.1
"""Share of all pixels that are coloured and clipped, above the teacher's: clipped colours have lost their shading."""
FADED = 0.6
"""Chroma or contrast over the teacher's: few steps blur, which costs edges, not the spread of light and colour."""
COLLAPSED = 0.5
"""Distance between pictures of one prompt over the teacher's; students of the bundled world keep 0.75 and more
(docs/results/tlcm.md)."""
STUCK = 0.002
"""Distance of the pictures from the start's over the teacher's distance from these: with 50 levels to go, a third of
the rounding to 8 bits. The slowest healthy recipe in the plane, MeanFlow, has .004 after 120 steps."""
RISEN = 10.0
"""Growth of the loss in one tenth of the times, over its start there and over the growth of the other tenths. Recipes
with a tangent (MeanFlow) rise by 6 while they improve; a diverging one rises by powers of ten."""
CHANCE = 0.55
"""Share of pairs (real, fake) that a critic ranks right; 0.5 is chance."""
PERFECT = 0.99
"""The same share, of a critic that the student no longer moves."""
LAG = 1.5
"""Denoising error of the fake score over the teacher's, on the student's samples, in both last quarters of the log. The
network that is fitted to samples has the least error on them, so that one which tracks has 1 at most. Healthy runs in
the plane rise to 1.5 while the student moves fast, and return. One that is 1 to rounding is the teacher still."""
ROUNDING = 1e-5
"""Relative difference of two errors that rounding makes."""


@dataclass(frozen=True)
class Alarm:
    """A figure beyond its limit.

    Attributes:
        text: what it means and what to try.
    """

    name: str
    value: float
    limit: float
    text: str

    def line(self) -> str:
        """Return the alarm as a line."""
        return f"{self.name}: {self.value:.3g}, limit {self.limit:.3g}; {self.text}"

    def record(self) -> dict[str, Any]:
        """Return the alarm for JSON."""
        return asdict(self)


TEXTS = {
    "saturation": "colours or contrast are beyond the teacher's; lower method.guidance or the weight of the term that "
    "pushes them (matching, adversarial, reward), or optim.lr",
    "fading": "colours or contrast are below the teacher's; train longer, draw with more steps, or raise "
    "method.guidance",
    "collapse": "pictures of one prompt are nearly alike whatever the noise; lower optim.lr, train the fake score more "
    "often (method.matching.every), or add method.consistency",
    "stuck": "pictures are still those of the start; raise optim.lr, and check student.targets",
    "loss by time": "the loss of one range of times runs away; lower optim.lr or method.k, or set optim.clip",
    "critic at chance": "the critic does not tell the student's points from real ones, which differ; raise "
    "method.adversarial.lr or update it each step (method.adversarial.every)",
    "critic wins": "the critic tells all points apart, and the student does not catch up; lower method.adversarial.lr, "
    "raise its r1, or noise its inputs (method.adversarial.noise)",
    "fake score": "it does not track the student, whose samples it denoises no better than the teacher; raise "
    "method.matching.lr, lower method.matching.every or optim.lr",
}
"""Name -> what it means and what to try."""


def raised(name: str, value: float, limit: float) -> Alarm:
    """Return the alarm of a name."""
    return Alarm(name, float(value), float(limit), TEXTS[name])


@dataclass(frozen=True)
class Appearance:
    """Means over pictures.

    Attributes:
        chroma: largest minus smallest channel, 8-bit levels.
        contrast: standard deviation of the luminance within a picture, 8-bit levels.
        clipped: share of coloured pixels with a channel at 0 or 255.
        diversity: feature distance between pictures of one prompt; None if no prompt has two.
    """

    chroma: float
    contrast: float
    clipped: float
    diversity: float | None

    def over(self, teacher: Appearance) -> dict[str, float]:
        """Return chroma, contrast and diversity over the teacher's, and clipped minus the teacher's."""
        found = {
            "chroma": (self.chroma + VISIBLE) / (teacher.chroma + VISIBLE),
            "contrast": (self.contrast + VISIBLE) / (teacher.contrast + VISIBLE),
            "clipped": self.clipped - teacher.clipped,
        }
        if self.diversity is not None and teacher.diversity:
            found["diversity"] = self.diversity / teacher.diversity
        return found


def same_prompt(prompts: Sequence[str]) -> list[list[int]]:
    """Return the places of each prompt that occurs more than once."""
    places: dict[str, list[int]] = {}
    for place, prompt in enumerate(prompts):
        places.setdefault(prompt, []).append(place)
    return [found for found in places.values() if len(found) > 1]


def thinned(pictures: Pictures) -> Pictures:
    """Return pictures of `SIDE` pixels a side or some more, by leaving out rows and columns of larger ones."""
    every = max(1, min(pictures.shape[1:3]) // SIDE)
    thin: Pictures = pictures[:, ::every, ::every]
    return thin


def appearance(pictures: Pictures, features: Array, prompts: Sequence[str]) -> Appearance:
    """Measure pictures, uint8 [N, H, W, 3], with their features [N, D] and prompts."""
    sums = np.zeros(3)
    for picture in thinned(pictures):  # one by one: floats of all would take several times their memory
        low, high = picture.min(-1), picture.max(-1)
        chroma = high.astype(np.int16) - low
        luminance = picture.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)  # Rec. 601
        clipped = ((low == 0) | (high == 255)) & (chroma >= COLOURED)
        sums += chroma.mean(), luminance.std(), clipped.mean()
    apart = [float(pairwise_distance(features[None, places])[0]) for places in same_prompt(prompts)]
    chroma, contrast, clipped = (sums / len(pictures)).tolist()
    return Appearance(chroma, contrast, clipped, fmean(apart) if apart else None)


def moved(now: Pictures, start: Pictures, teacher: Pictures) -> float:
    """Return the mean distance of pictures from the start's over that of the teacher's, in pixels."""
    now, start, teacher = map(thinned, (now, start, teacher))
    way = float(pixel_rmse(teacher, start).mean())
    return float(pixel_rmse(now, start).mean()) / way if way else 1.0


def picture_alarms(now: Figures, start: Figures, share: float) -> Iterator[Alarm]:
    """Yield the alarms of pictures.

    Args:
        now: of the student, `Appearance.over` the teacher's and `moved`.
        start: the same of the student before its first step. In the first half of a run limits are relative to it
            where it is farther from the teacher: few steps of a network that is not distilled may well be.
        share: of the run's steps that are done.
    """
    begun = start if share <= 0.5 else {}

    def beyond(name: str, limit: float, up: bool) -> tuple[float, float] | None:
        base = begun.get(name, 1.0)
        limit *= max(1.0, base) if up else min(1.0, base)
        return (now[name], limit) if name in now and (now[name] > limit if up else now[name] < limit) else None

    over = [beyond(name, SATURATED, up=True) for name in ("chroma", "contrast")]
    clipped = CLIPPED + max(0.0, begun.get("clipped", 0.0))
    over += [(now["clipped"], clipped) if now["clipped"] > clipped else None]
    under = [beyond(name, FADED, up=False) for name in ("chroma", "contrast")]
    alike = beyond("diversity", COLLAPSED, up=False)
    if found := [pair for pair in over if pair]:
        yield raised("saturation", *max(found, key=lambda pair: pair[0] / pair[1]))
    if found := [pair for pair in under if pair]:
        yield raised("fading", *min(found, key=lambda pair: pair[0] / pair[1]))
    elif alike:  # grey pictures are alike for that reason alone
        yield raised("collapse", *alike)
    if now.get("moved", 1.0) < STUCK:
        yield raised("stuck", now["moved"], STUCK)


def quarters(lines: Sequence[Figures], name: str) -> list[float] | None:
    """Return a figure's means over the quarters of the lines that have it; None if these are few."""
    values = [line[name] for line in lines if name in line]
    if len(values) < LINES:
        return None
    ends = [len(values) * part // 4 for part in range(5)]
    return [fmean(values[start:stop]) for start, stop in pairwise(ends)]


def updates(lines: Sequence[Figures], name: str, every: int) -> float:
    """Return the number of updates that lines report, of an update whose figure is named."""
    steps = [line["step"] for line in lines if name in line]
    return (steps[-1] - steps[0]) / every if steps else 0.0


def loss_alarms(lines: Sequence[Figures]) -> Iterator[Alarm]:
    """Yield the alarm of a range of times whose loss has grown far more than at its start and than the others'."""
    names = sorted({name for line in lines for name in line if name.startswith("student/loss_t")})
    bands = [found for name in names if (found := quarters(lines, name))]
    rises = [means[-1] - means[0] for means in bands]
    if not bands:
        return
    others = median(map(abs, rises))
    grown = max(rise / max(abs(first), others, 1e-12) for rise, (first, *_) in zip(rises, bands, strict=True))
    if grown > RISEN:
        yield raised("loss by time", grown, RISEN)


def critic_alarms(lines: Sequence[Figures], method: ConsistencyConfig, behind: bool) -> Iterator[Alarm]:
    """Yield the alarms of the critic.

    At chance is what a critic is to be whose student draws as the real points are, so that it takes a student which is
    `behind` them: worse than the teacher. Where the target's or the student's own points are real, it always is.
    """
    found = quarters(lines, "critic/ranked")
    if not found or updates(lines, "critic/ranked", method.adversarial.every) < ENOUGH:
        return
    first, _, before, last = found
    if last < CHANCE and behind and method.adversarial.real == "data" and method.start != "student":
        yield raised("critic at chance", last, CHANCE)
    if min(before, last) > PERFECT and last >= first:
        yield raised("critic wins", last, PERFECT)


def fake_alarms(lines: Sequence[Figures]) -> Iterator[Alarm]:
    """Yield the alarm of a fake score that does not track the student."""
    fakes, teachers = (quarters(lines, f"student/{name}_error") for name in ("fake", "teacher"))
    if updates(lines, "student/fake_error", 1) < ENOUGH or not fakes or not teachers:
        return
    before, last = [fake / teacher for fake, teacher in zip(fakes, teachers, strict=True)][-2:]
    if min(before, last) > LAG:
        yield raised("fake score", last, LAG)
    elif abs(last - 1) < ROUNDING:
        yield raised("fake score", last, 1 - ROUNDING)


def log_alarms(lines: Sequence[Figures], method: ConsistencyConfig, behind: bool) -> list[Alarm]:
    """Return the alarms of the log lines of one run (or stage).

    Args:
        behind: whether the student's pictures are farther from the real ones than the teacher's.
    """
    return [*loss_alarms(lines), *critic_alarms(lines, method, behind), *fake_alarms(lines)]
