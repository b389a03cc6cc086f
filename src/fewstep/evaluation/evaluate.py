"""Measure one set of pictures with many metrics, beside the figures of real pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from fewstep.common.errors import UserError
from fewstep.common.files import short_digest, write_json
from fewstep.common.random_streams import generator
from fewstep.evaluation.detail import EdgeDensity, WebpBytes
from fewstep.evaluation.features import Features
from fewstep.evaluation.frechet import FrechetDistance, Projection
from fewstep.evaluation.kid import KernelDistance
from fewstep.evaluation.limits import FD_FEWEST, KID_FEWEST
from fewstep.evaluation.metric import (
    TO_TEACHER,
    Array,
    Figure,
    Identity,
    Metric,
    Pictures,
    check_pictures,
)
from fewstep.evaluation.per_picture import PerPictureMetric
from fewstep.evaluation.teacher_distance import TeacherFeatures, TeacherPixels


@dataclass(frozen=True)
class TeacherPictures:
    """The teacher's converged pictures of the measured prompts, uint8 [N, H, W, 3] each.

    Sets are compared with pictures from other noise. Those from the same noise are not an independent sample: an
    unbiased distance would come out too low, the more so the closer a method keeps to the teacher's path.

    Attributes:
        same: from the same noise as the measured pictures, to compare one by one; None leaves that out.
        other: from other noise, to compare sets with; None leaves that out.
    """

    same: Pictures | None = None
    other: Pictures | None = None


@dataclass(frozen=True)
class Reference:
    """Real pictures: those measured against, and others in the place of a perfect generator.

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
        """Set n pictures, drawn at random, aside for the floor and keep the rest to measure against.

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
        """Return up to n of the pictures, drawn at random (a folder is often sorted by style)."""
        rows = generator(seed, "some real pictures").permutation(len(self.pictures))[:n]
        chosen: Pictures = self.pictures[rows]
        return chosen

    def floor_of(self, metric: Metric, n: int, seed: int) -> float | None:
        """Return the figure of n of the set-aside pictures, computed once per metric; None where there is none.

        A fit to prompts has none where the set-aside pictures have no prompts.

        Raises:
            UserError: fewer than n pictures were set aside.
        """
        identity = metric.identity
        if self.floor is None or identity.against == "teacher":
            return None
        if identity.group == "prompt" and not any(self.floor_prompts):
            return None
        if len(self.floor) < n:
            raise UserError(f"{n} pictures need as many real ones set aside for the floor, not {len(self.floor)}")
        key = (identity, n, seed)
        if key not in self._floors:
            features = metric.features(self.floor[:n], self.floor_prompts[:n])
            against = metric.features(self.pictures, ()) if identity.against == "real" else None
            self._floors[key] = metric.reduce(features, against, seed).value
        return self._floors[key]


NO_TEACHER = TeacherPictures()


def evaluate_pictures(
    pictures: Pictures,
    prompts: Sequence[str],
    metrics: Sequence[Metric],
    reference: Reference | None = None,
    teacher: TeacherPictures = NO_TEACHER,
    seed: int = 0,
) -> dict[str, Figure]:
    """Measure pictures, one of each prompt.

    A distance between sets is taken from the real pictures and, where the teacher's are given, from those too
    (name + `TO_TEACHER`). A comparison whose pictures are not given is left out.

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
    for given in (pictures, teacher.same, teacher.other):
        if given is not None:
            check_pictures(given, prompts)
    figures: dict[str, Figure] = {}
    for metric in metrics:
        own, compared = metric.identity, metric.identity.against
        others: list[tuple[Identity, Array | None]] = []
        if compared == "nothing":
            others.append((own, None))
        if compared == "real" and reference:
            others.append((own, metric.features(reference.pictures, ())))
        if compared == "real" and teacher.other is not None:
            to_teacher = replace(own, name=own.name + TO_TEACHER, against="teacher")
            others.append((to_teacher, metric.features(teacher.other, prompts)))
        if compared == "teacher" and teacher.same is not None:
            others.append((own, metric.features(teacher.same, prompts)))
        for identity, against in others:
            features = metric.features(pictures, prompts)
            if identity is not own and against is not None and isinstance(metric, KernelDistance):
                figure = metric.reduce(features, against, seed, matched=True)
            else:
                figure = metric.reduce(features, against, seed)
            floor = reference.floor_of(metric, len(pictures), seed) if reference and identity is own else None
            identity = replace(identity, n=figure.n, seed=seed, prompts_sha256=short_digest("\n".join(prompts)))
            figures[identity.name] = replace(figure, floor=floor, identity=identity)
    return figures


def score_pictures(
    pictures: Pictures, prompts: Sequence[str], metrics: Sequence[Metric], teacher: Pictures | None = None
) -> dict[str, Array]:
    """Return each prompt's number, [N], by per-picture metric, for `bootstrap.paired_difference` of two methods.

    Args:
        teacher: the teacher's pictures from the same noise; None leaves the distances from it out.

    Raises:
        UserError: as `evaluate_pictures`.
    """
    check_pictures(pictures, prompts)
    scores = {}
    for metric in metrics:
        to_teacher = metric.identity.against == "teacher"
        if isinstance(metric, PerPictureMetric) and not (to_teacher and teacher is None):
            against = metric.features(teacher, prompts) if to_teacher and teacher is not None else None
            scores[metric.identity.name] = metric.scores(metric.features(pictures, prompts), against)
    return scores


def save_figures(path: Path | str, rows: Mapping[str, Mapping[str, Figure]]) -> None:
    """Write figures by row (a method at a step count) and metric as JSON."""
    write_json(path, {row: {name: asdict(f) for name, f in figures.items()} for row, figures in rows.items()})


@dataclass(frozen=True)
class Suite:
    """The metrics of one list of prompts, with what they need, loaded before any picture is generated.

    Attributes:
        reference: real pictures.
        metrics: what is measured.
        features: features that the metrics share.
        real_diversity: diversity of real pictures of the same prompts, if known.

    Raises:
        UserError: too few real pictures to measure against.
    """

    reference: Reference
    metrics: list[Metric]
    features: Features
    real_diversity: float | None = None

    def __post_init__(self) -> None:
        if len(self.reference.pictures) < KID_FEWEST:
            raise UserError(
                f"there are {len(self.reference.pictures)} real pictures to measure against; KID needs at least "
                f"{KID_FEWEST}"
            )


def standard_suite(features: Features, n: int, real: Pictures) -> list[Metric]:
    """Return the metrics of any set of pictures.

    Args:
        features: of the network.
        n: pictures in the smallest set that is compared; below `FD_FEWEST`, FD is left out.
        real: pictures that FD's projection is fitted on.
    """
    fd: list[Metric] = [FrechetDistance(features, Projection.fit(features(real)))] if n >= FD_FEWEST else []
    return [
        *fd,
        KernelDistance(features),
        TeacherFeatures(features),
        TeacherPixels(),
        EdgeDensity(),
        WebpBytes(),
    ]
