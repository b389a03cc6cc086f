"""`fewstep evaluate`: any pipeline folder, any LoRA, a prompt file and a folder of real pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from fewstep.backbones.lengths import tell_cut
from fewstep.common.defaults import world
from fewstep.common.distributed import on_main
from fewstep.common.errors import UserError
from fewstep.data.images import find_pictures, read_picture
from fewstep.diffusion.config import Sampling
from fewstep.evaluation.detail import detail_scale
from fewstep.evaluation.diversity import NOISES, PROMPTS, diversity
from fewstep.evaluation.evaluate import EndPoints, Reference, evaluate_pictures, save_figures
from fewstep.evaluation.features import Features
from fewstep.evaluation.lite0 import Lite0Backbone
from fewstep.evaluation.metric import Figure, Metric
from fewstep.evaluation.suite import Suite, set_metrics
from fewstep.inference.generator import ImageGenerator, load_image_generator

SCALED = 512
"""Real pictures that are blurred and noised for the scale of detail."""


def read_real(folder: Path, size: int) -> np.ndarray:
    """Real pictures of a folder, uint8 [N, size, size, 3].

    Raises:
        UserError: no folder, or no pictures in it.
    """
    files = find_pictures(folder)
    if not files:
        raise UserError(f"real = {str(folder)!r} holds no pictures")
    return np.stack([read_picture(file, size) for file in files])


def folder_suite(folder: Path, n: int, size: int, seed: int, features: Features) -> Suite:
    """Measure against a folder of real pictures; there is a floor where it holds more than twice `n`.

    Raises:
        UserError: no folder, or too few pictures in it.
    """
    pool = read_real(folder, size)
    reference = Reference.split(pool, n, seed) if len(pool) > 2 * n else Reference(pool)
    real = reference.pictures
    return Suite(reference, set_metrics(features, min(n, len(real)), real), features)


class Drawn(NamedTuple):
    """What is measured: one picture a prompt, several of the first prompts, and the teacher's end points.

    Attributes:
        pictures: uint8 [N, H, W, 3].
        several: uint8 [P, NOISES, H, W, 3].
    """

    pictures: np.ndarray
    several: np.ndarray
    end_points: EndPoints


def draw_all(
    image_generator: ImageGenerator, prompts: Sequence[str], sampling: Sampling, end_points: EndPoints, seed: int
) -> Drawn:
    """Draw what is measured, the first picture from `seed`; the processes of a launch share it out."""
    pictures = image_generator.draw(prompts, range(seed, seed + len(prompts)), sampling)
    several = [prompt for prompt in prompts[:PROMPTS] for _ in range(NOISES)]
    noises = image_generator.draw(several, range(seed, seed + len(several)), sampling)
    return Drawn(pictures, noises.reshape(-1, NOISES, *noises.shape[1:]), end_points)


def measure(drawn: Drawn, prompts: Sequence[str], suite: Suite, seed: int) -> dict[str, Figure]:
    """Figures of what was drawn, by name; `seed` is the bootstrap's."""
    metrics, end_points = suite.metrics, drawn.end_points
    figures = evaluate_pictures(drawn.pictures, prompts, metrics, suite.reference, end_points, seed)
    figures |= with_teacher_floors(figures, prompts, metrics, end_points, seed)
    return {**figures, **diversity(suite.features, drawn.several, seed, floor=suite.real_diversity)}


def with_teacher_floors(
    figures: Mapping[str, Figure], prompts: Sequence[str], metrics: Sequence[Metric], end_points: EndPoints, seed: int
) -> dict[str, Figure]:
    """The distances between sets to the teacher's, each with what the teacher itself gets from other noise."""
    if end_points.same is None:
        return {}
    sets = [metric for metric in metrics if metric.against == "real"]
    own = evaluate_pictures(end_points.same, prompts, sets, None, EndPoints(other=end_points.other), seed)
    return {name: replace(figures[name], floor=floor.value) for name, floor in own.items()}


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
    precision: torch.dtype,
    compiled: bool,
    batch: int | None,
    out: Path,
) -> Mapping[str, Figure]:
    """Measure a pipeline folder or a LoRA on it; write figures.json and return the figures by name.

    The processes of a launch share the drawing out; the main one measures, and the others return nothing. FD
    needs at least 500 pictures on both sides and is left out below.

    Args:
        teacher: pipeline folder that draws.
        lora: a student on it, or None.
        real: folder of real pictures; None for Emoji-8.
        reference: pipeline folder whose end points from the same noise are compared with; None for none.
        reference_sampling: how it draws them.
        precision: type that the denoisers are kept and compute in.
        compiled: compile them.
        batch: pictures that they draw at once; None for what a small GPU has room for.
        out: folder for figures.json.
    """
    image_generator = load_image_generator(teacher, lora, device, precision=precision, compiled=compiled, batch=batch)
    tell_cut(image_generator.backbone, prompts)
    n, size = len(prompts), sampling.size[0] if sampling.size else image_generator.backbone.picture_size
    teller = None
    if reference is not None:
        teller = load_image_generator(reference, None, device, precision=precision, compiled=compiled, batch=batch)
    end_points = EndPoints()
    if teller is not None:
        same, other = (teller.draw(prompts, range(first, first + n), reference_sampling) for first in (seed, seed + n))
        end_points = EndPoints(same, other)
    drawn = draw_all(image_generator, prompts, sampling, end_points, seed)

    def measured() -> Mapping[str, Figure]:
        features = Features(Lite0Backbone(), out / "features")
        suite = (
            folder_suite(real, n, size, seed, features) if real else world("real").suite(prompts, size, seed, features)
        )
        figures = measure(drawn, prompts, suite, seed)
        name = f"{lora.stem if lora else teacher.name} {sampling.steps} steps"
        scale = detail_scale(suite.reference.some(SCALED, seed), seed)
        save_figures(out / "figures.json", {name: figures, **scale})
        return figures

    return on_main(measured)()
