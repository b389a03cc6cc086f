"""`fewstep evaluate`: any pipeline folder, any LoRA, a prompt file and a folder of real pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from fewstep.data.pictures import SUFFIXES, read_picture
from fewstep.drawing import Artist, load_artist
from fewstep.errors import UserError
from fewstep.evaluation.detail import EdgeDensity, WebpBytes, detail_scale
from fewstep.evaluation.diversity import NOISES, PROMPTS, diversity
from fewstep.evaluation.evaluate import EndPoints, Reference, evaluate_pictures, save_figures
from fewstep.evaluation.features import Features
from fewstep.evaluation.frechet import FrechetDistance, Projection
from fewstep.evaluation.kid import KernelDistance
from fewstep.evaluation.lite0 import Lite0Backbone
from fewstep.evaluation.metric import Figure, Metric
from fewstep.evaluation.settings import FD_FEWEST, KID_FEWEST
from fewstep.evaluation.teacher import TeacherFeatures, TeacherPixels
from fewstep.settings import Sampling

SCALED = 512
"""Real pictures that are blurred and noised for the scale of detail."""


@dataclass(frozen=True)
class Yardstick:
    """What a prompt list is measured with, open before anything is drawn.

    Attributes:
        reference: real pictures.
        metrics: what is measured.
        features: the backbone that they share.
        real_diversity: of real pictures of the same prompts, where that is known.
    """

    reference: Reference
    metrics: list[Metric]
    features: Features
    real_diversity: float | None = None


def read_real(folder: Path, size: int) -> np.ndarray:
    """Real pictures of a folder, uint8 [N, size, size, 3].

    Raises:
        UserError: no folder, or fewer than two pictures in it.
    """
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES) if folder.is_dir() else []
    if len(files) < 2:
        raise UserError(f"real = {str(folder)!r} is not a folder with pictures ({', '.join(SUFFIXES)}), at least 2")
    return np.stack([read_picture(file, size) for file in files])


def folder_yardstick(folder: Path, n: int, size: int, seed: int, features: Features) -> Yardstick:
    """Measure against a folder of real pictures; there is a floor where it holds more than twice `n`.

    Raises:
        UserError: no folder with pictures.
    """
    pool = read_real(folder, size)
    reference = Reference.split(pool, n, seed) if len(pool) > 2 * n else Reference(pool)
    if len(reference.pictures) < KID_FEWEST:
        raise UserError(f"real = {str(folder)!r} holds {len(pool)} pictures; KID needs at least {KID_FEWEST}")
    metrics: list[Metric] = [
        KernelDistance(features),
        TeacherFeatures(features),
        TeacherPixels(),
        EdgeDensity(),
        WebpBytes(),
    ]
    if min(n, len(reference.pictures)) >= FD_FEWEST:
        metrics.insert(0, FrechetDistance(features, Projection.fit(features(reference.pictures))))
    return Yardstick(reference, metrics, features)


def emoji8_yardstick(prompts: Sequence[str], size: int, seed: int, features: Features) -> Yardstick:
    """Measure against Emoji-8, as the benchmark does.

    Prompts that name its concepts are measured against pictures of these; other words against all pictures.

    Raises:
        UserError: the teacher draws another size.
    """
    from fewstep.world import emoji8
    from fewstep.world.measures import Gallery, agreement, metrics, real_diversity

    if size != emoji8.SIZE:
        raise UserError(
            f"real is empty and means Emoji-8 ({emoji8.SIZE} pixels), the teacher draws {size}; give a folder"
        )
    gallery = Gallery.load()
    chosen = [*metrics(gallery, features, len(prompts)), agreement()]
    if all(gallery.knows(prompt) for prompt in prompts):
        diverse = real_diversity(gallery, features, prompts[:PROMPTS], seed)
        return Yardstick(gallery.reference(prompts, seed), chosen, features, diverse.value if diverse else None)
    data = gallery.data
    names = [record.name for record in data.records]
    return Yardstick(Reference.split(data.pictures, len(prompts), seed, names), chosen, features)


def evaluate(
    artist: Artist,
    prompts: Sequence[str],
    yardstick: Yardstick,
    *,
    sampling: Sampling,
    end_points: EndPoints,
    seed: int,
) -> dict[str, Figure]:
    """Draw one picture a prompt and several of the first prompts, and measure them; figures by name.

    Args:
        end_points: the teacher's converged pictures of the same prompts.
        seed: of the first picture, and of the bootstrap.
    """
    pictures = artist.draw(prompts, count_up(seed, len(prompts)), sampling)
    figures = evaluate_pictures(pictures, prompts, yardstick.metrics, yardstick.reference, end_points, seed)
    figures |= with_teacher_floors(figures, prompts, yardstick.metrics, end_points, seed)
    several = [prompt for prompt in prompts[:PROMPTS] for _ in range(NOISES)]
    noises = artist.draw(several, count_up(seed, len(several)), sampling)
    grouped = noises.reshape(-1, NOISES, *noises.shape[1:])
    return {**figures, **diversity(yardstick.features, grouped, seed, floor=yardstick.real_diversity)}


def with_teacher_floors(
    figures: Mapping[str, Figure], prompts: Sequence[str], metrics: Sequence[Metric], end_points: EndPoints, seed: int
) -> dict[str, Figure]:
    """The distances between sets to the teacher's, each with what the teacher itself gets from other noise."""
    if end_points.same is None:
        return {}
    sets = [metric for metric in metrics if metric.against == "real"]
    own = evaluate_pictures(end_points.same, prompts, sets, None, EndPoints(other=end_points.other), seed)
    return {name: replace(figures[name], floor=floor.value) for name, floor in own.items()}


def count_up(seed: int, n: int) -> list[int]:
    """The seed of each of n pictures."""
    return [seed + i for i in range(n)]


def evaluate_folder(
    teacher: Path,
    prompts: Sequence[str],
    *,
    lora: Path | None,
    real: Path | None,
    sampling: Sampling,
    reference: Path | None,
    reference_sampling: Sampling,
    seed: int,
    device: torch.device,
    out: Path,
) -> Mapping[str, Figure]:
    """Measure a pipeline folder or a LoRA on it; write figures.json and return the figures by name.

    FD needs at least 500 pictures on both sides and is left out below.

    Args:
        teacher: pipeline folder that draws.
        lora: a student on it, or None.
        real: folder of real pictures; None for Emoji-8.
        reference: pipeline folder whose end points from the same noise are compared with; None for none.
        reference_sampling: how it draws them.
        out: folder for figures.json.
    """
    artist = load_artist(teacher, lora, device)
    n, size = len(prompts), artist.backbone.picture_size
    teller = load_artist(reference, None, device) if reference is not None else None
    if teller is not None and teller.backbone.picture_size != size:
        raise UserError(
            f"reference = {str(reference)!r} draws {teller.backbone.picture_size} pixels a side, the student {size}; "
            "the nearest is the student's own teacher"
        )
    features = Features(Lite0Backbone(), out / "features")
    yardstick = (
        folder_yardstick(real, n, size, seed, features) if real else emoji8_yardstick(prompts, size, seed, features)
    )
    end_points = EndPoints()
    if teller is not None:
        same, other = (teller.draw(prompts, count_up(first, n), reference_sampling) for first in (seed, seed + n))
        end_points = EndPoints(same, other)
    figures = evaluate(artist, prompts, yardstick, sampling=sampling, end_points=end_points, seed=seed)
    name = f"{lora.stem if lora else teacher.name} {sampling.steps} steps"
    save_figures(out / "figures.json", {name: figures, **detail_scale(yardstick.reference.some(SCALED, seed), seed)})
    return figures
