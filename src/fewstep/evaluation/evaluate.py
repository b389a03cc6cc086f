"""Measure one set of pictures with many metrics, beside what real pictures get."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from fewstep.common.choices import TO_TEACHER
from fewstep.common.errors import UserError
from fewstep.common.files import write_json
from fewstep.common.rng import generator
from fewstep.evaluation.metric import Array, Figure, Matched, Metric, Pictures, Scored, check_pictures


@dataclass(frozen=True)
class EndPoints:
    """The teacher's converged pictures of the measured prompts, uint8 [N, H, W, 3] each.

    Sets are compared with pictures from other noise: those from the same noise are no independent sample, and
    an unbiased distance would come out too low, the more so the closer a method keeps to the teacher's path.

    Attributes:
        same: from the same noise as the measured pictures, to compare one by one; None leaves that out.
        other: from other noise, to compare sets with; None leaves that out.
    """

    same: Pictures | None = None
    other: Pictures | None = None


@dataclass(frozen=True)
class Reference:
    """Real pictures: those measured against, and others that stand for a perfect generator.

    Attributes:
        pictures: uint8 [M, H, W, 3].
        floor: uint8 [F, H, W, 3], none of them in `pictures`, F at least the number measured; None for none.
        floor_prompts: a prompt for each of them.
    """

    pictures: Pictures
    floor: Pictures | None = None
    floor_prompts: Sequence[str] = ()
    _floors: dict[tuple[object, ...], float] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def split(cls, pictures: Pictures, n: int, seed: int = 0, prompts: Sequence[str] | None = None) -> Reference:
        """Put n pictures, drawn at random, aside for the floor and keep the rest to measure against.

        Raises:
            UserError: n leaves no picture to measure against.
        """
        check_pictures(pictures, prompts)
        if not 0 < n < len(pictures):
            raise UserError(
                f"{len(pictures)} real pictures with {n} set aside leave none to measure against; give more"
            )
        shuffled = generator(seed, "floor").permutation(len(pictures))
        aside = shuffled[:n]
        return cls(
            pictures[shuffled[n:]],
            pictures[aside],
            tuple(prompts[i] for i in aside) if prompts else ("",) * n,
        )

    def some(self, n: int, seed: int = 0) -> Pictures:
        """Up to n of the pictures, drawn at random (a folder's order is often one style after another)."""
        rows = generator(seed, "some real pictures").permutation(len(self.pictures))[:n]
        chosen: Pictures = self.pictures[rows]
        return chosen

    def floor_of(self, metric: Metric, n: int, seed: int) -> float | None:
        """Return what n of the set-aside pictures get, measured once for each metric; None where nothing can.

        Raises:
            UserError: fewer than n pictures were set aside.
        """
        if self.floor is None or metric.against == "teacher":
            return None
        if len(self.floor) < n:
            raise UserError(f"{n} pictures need as many real ones set aside for the floor, not {len(self.floor)}")
        key = (metric.identity, n, seed)
        if key not in self._floors:
            features = metric.features(self.floor[:n], self.floor_prompts[:n])
            against = metric.features(self.pictures, ()) if metric.against == "real" else None
            self._floors[key] = metric.reduce(features, against, seed).value
        return self._floors[key]


NO_TEACHER = EndPoints()


def evaluate_pictures(
    pictures: Pictures,
    prompts: Sequence[str],
    metrics: Sequence[Metric],
    reference: Reference | None = None,
    teacher: EndPoints = NO_TEACHER,
    seed: int = 0,
) -> dict[str, Figure]:
    """Measure pictures, one of each prompt.

    A distance between sets is taken from the real pictures and, where the teacher's are given, from those too
    (name + `TO_TEACHER`). What cannot be compared for want of pictures is left out.

    Args:
        pictures: uint8 [N, H, W, 3].
        prompts: N.
        metrics: what to measure.
        reference: real pictures; without them, distances from real pictures are left out.
        teacher: its converged pictures of the same prompts.
        seed: of the bootstrap.

    Returns:
        Figures by name, each with its identity, n and floor.

    Raises:
        UserError: shapes or counts that do not fit, or too few pictures for a metric.
    """
    check_pictures(pictures, prompts)
    for given in (teacher.same, teacher.other):
        if given is not None:
            check_pictures(given, prompts)
    figures: dict[str, Figure] = {}
    for metric in metrics:
        own = metric.identity.name
        others: dict[str, Array | None] = {}
        if metric.against == "nothing":
            others[own] = None
        if metric.against == "real" and reference:
            others[own] = metric.features(reference.pictures, ())
        if metric.against == "real" and teacher.other is not None:
            others[own + TO_TEACHER] = metric.features(teacher.other, prompts)
        if metric.against == "teacher" and teacher.same is not None:
            others[own] = metric.features(teacher.same, prompts)
        features = metric.features(pictures, prompts) if others else None
        for name, against in others.items():
            assert features is not None
            if name == own + TO_TEACHER and against is not None and isinstance(metric, Matched):
                figure = metric.reduce_matched(features, against, seed)
            else:
                figure = metric.reduce(features, against, seed)
            identity = replace(metric.identity, name=name, n=figure.n, seed=seed)
            floor = reference.floor_of(metric, figure.n, seed) if reference and name == own else None
            figures[name] = replace(figure, floor=floor, identity=identity)
    return figures


def score_pictures(
    pictures: Pictures, prompts: Sequence[str], metrics: Sequence[Scored], teacher: Pictures | None = None
) -> dict[str, Array]:
    """Return each prompt's number, [N], by metric, for `bootstrap.paired_difference` of two methods.

    Args:
        teacher: the teacher's pictures from the same noise; None leaves the distances from it out.

    Raises:
        UserError: as `evaluate_pictures`.
    """
    check_pictures(pictures, prompts)
    scores = {}
    for metric in metrics:
        if metric.against == "teacher" and teacher is None:
            continue
        against = metric.features(teacher, prompts) if metric.against == "teacher" and teacher is not None else None
        scores[metric.identity.name] = metric.scores(metric.features(pictures, prompts), against)
    return scores


def save_figures(path: Path | str, rows: Mapping[str, Mapping[str, Figure]]) -> None:
    """Write figures by row (a method at a step count) and metric as JSON."""
    write_json(path, {row: {name: f.to_dict() for name, f in figures.items()} for row, figures in rows.items()})
