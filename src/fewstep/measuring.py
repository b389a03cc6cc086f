"""`fewstep evaluate`: any pipeline folder, any LoRA, a prompt file and a folder of real pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fewstep.data.pictures import SUFFIXES, read_picture
from fewstep.drawing import load_artist
from fewstep.errors import UserError
from fewstep.evaluation.detail import EdgeDensity, WebpBytes
from fewstep.evaluation.evaluate import Reference, evaluate_pictures, save_figures
from fewstep.evaluation.features import Features
from fewstep.evaluation.frechet import FEWEST, FrechetDistance, Projection
from fewstep.evaluation.kid import KernelDistance
from fewstep.evaluation.lite0 import Lite0Backbone
from fewstep.evaluation.metric import Figure, Metric
from fewstep.evaluation.teacher import TeacherFeatures, TeacherPixels
from fewstep.settings import TEACHER_SAMPLING, Sampling


def read_real(folder: Path | None, size: int) -> np.ndarray:
    """Real pictures of a folder, or the bundled set's training split for None.

    Raises:
        UserError: no folder or no picture in it.
    """
    if folder is None:
        from fewstep.world import emoji8

        return emoji8.load("train").pictures
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES) if folder.is_dir() else []
    if not files:
        raise UserError(f"real = {str(folder)!r} is not a folder with pictures ({', '.join(SUFFIXES)})")
    return np.stack([read_picture(file, size) for file in files])


def evaluate(
    teacher: Path,
    prompts: list[str],
    *,
    lora: Path | None,
    real: Path | None,
    sampling: Sampling | None,
    reference_omega: float,
    seed: int,
    out: Path,
) -> dict[str, Figure]:
    """Draw one picture a prompt, measure them, write figures.json; return the figures by name.

    FD needs at least 500 prompts and is left out below. Distances to the teacher are taken from its guided DDIM
    end points at 50 steps from the same noise.
    """
    artist = load_artist(teacher, lora)
    seeds = [seed + i for i in range(len(prompts))]
    pictures = artist.draw(prompts, seeds, sampling)
    end_points = None
    if lora is not None:
        settings = TEACHER_SAMPLING.model_copy(update={"omega": reference_omega})
        end_points = load_artist(teacher).draw(prompts, seeds, settings)
    features = Features(Lite0Backbone())
    pool = read_real(real, artist.backbone.picture_size)
    n = len(prompts)
    reference = Reference.split(pool, n, seed) if len(pool) > 2 * n else Reference(pool)
    metrics: list[Metric] = [KernelDistance(features), EdgeDensity(), WebpBytes()]
    if n >= FEWEST:
        metrics.insert(0, FrechetDistance(features, Projection.fit(features(reference.pictures))))
    metrics += [TeacherPixels(), TeacherFeatures(features)]
    if real is None:
        from fewstep.evaluation.agreement import PromptAgreement, load_scorer
        from fewstep.world.location import root

        metrics.append(PromptAgreement(load_scorer(root() / "scorer")))
    figures = evaluate_pictures(pictures, prompts, metrics, reference, end_points, seed)
    name = f"{Path(lora).stem if lora else 'teacher'} {(sampling or artist.sampling).steps} steps"
    save_figures(out / "figures.json", {name: figures})
    return figures
