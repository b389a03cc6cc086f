"""`fewstep evaluate`: any pipeline folder, any LoRA, a prompt file and a folder of real pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from fewstep.backbones.lengths import print_cut_prompts
from fewstep.common.defaults import world
from fewstep.common.distributed import on_main_process
from fewstep.data.images import read_picture
from fewstep.diffusion.config import Sampling
from fewstep.evaluation.detail import detail_scale
from fewstep.evaluation.diversity import NOISES, PROMPTS, diversity
from fewstep.evaluation.evaluate import (
    Reference,
    Suite,
    TeacherPictures,
    evaluate_pictures,
    save_figures,
    standard_suite,
)
from fewstep.evaluation.features import Features
from fewstep.evaluation.lite0 import Lite0Features
from fewstep.evaluation.metric import Figure
from fewstep.inference.generator import ImageGenerator

SCALED = 512
"""Real pictures that are blurred and noised for the scale of detail."""


def folder_suite(files: Sequence[Path], n: int, size: int, seed: int, features: Features) -> Suite:
    """Return the suite of real pictures in files; with a floor where there are more than twice `n` of them."""
    pool = np.stack([read_picture(file, size) for file in files])
    reference = Reference.split(pool, n, seed) if len(pool) > 2 * n else Reference(pool)
    real = reference.pictures
    return Suite(reference, standard_suite(features, min(n, len(real)), real), features)


def evaluate_generator(
    generator: ImageGenerator,
    prompts: Sequence[str],
    *,
    name: str,
    real: Sequence[Path] | None,
    sampling: Sampling,
    reference: tuple[ImageGenerator, Sampling] | None,
    seed: int,
    out: Path,
) -> Mapping[str, Figure]:
    """Measure a teacher or a student; write figures.json and return the figures by name.

    The processes of a launch share the generation; the main one measures, and the others return nothing. FD needs at
    least 500 pictures on both sides and is left out below.

    Args:
        name: of the teacher or student in figures.json.
        real: files of real pictures; None for the bundled world's.
        reference: teacher whose end points from the same noise are compared with, and its sampling; None for none.
        out: folder for figures.json.
    """
    print_cut_prompts(generator.backbone, prompts)
    n, size = len(prompts), sampling.size[0] if sampling.size else generator.backbone.picture_size
    ends = TeacherPictures()
    if reference is not None:
        other, theirs = reference
        ends = TeacherPictures(*(other.draw(prompts, range(first, first + n), theirs) for first in (seed, seed + n)))
    pictures = generator.draw(prompts, range(seed, seed + n), sampling)
    repeated = [prompt for prompt in prompts[:PROMPTS] for _ in range(NOISES)]
    noises = generator.draw(repeated, range(seed, seed + len(repeated)), sampling)

    def measure() -> Mapping[str, Figure]:
        features = Features(Lite0Features(), out / "features")
        suite = folder_suite(real, n, size, seed, features) if real else world("real").suite(prompts, seed, features)
        figures = evaluate_pictures(pictures, prompts, suite.metrics, suite.reference, ends, seed)
        if ends.same is not None:  # the floor of a set's distance to the teacher: the teacher's own, from other noise
            sets = [metric for metric in suite.metrics if metric.identity.against == "real"]
            own = evaluate_pictures(ends.same, prompts, sets, None, TeacherPictures(other=ends.other), seed)
            figures |= {metric: replace(figures[metric], floor=floor.value) for metric, floor in own.items()}
        several = noises.reshape(-1, NOISES, *noises.shape[1:])
        figures |= diversity(features, several, seed, floor=suite.real_diversity)
        scale = detail_scale(suite.reference.some(SCALED, seed), seed)
        save_figures(out / "figures.json", {f"{name} {sampling.steps} steps": figures, **scale})
        return figures

    return on_main_process(measure)()
