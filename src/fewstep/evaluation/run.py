"""`fewstep evaluate`: any pipeline folder, any LoRA, a prompt file and a folder of real pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
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
from fewstep.evaluation.metric import Figure, Metric, Pictures
from fewstep.evaluation.standard.loader import DIVERSITY, Loader, load_metrics
from fewstep.evaluation.standard.registry import Chosen, Column
from fewstep.evaluation.sweep import Cell, write_sweep
from fewstep.inference.generator import ImageGenerator

SCALED = 512
"""Real pictures that are blurred and noised for the scale of detail."""


@dataclass(frozen=True)
class Plan:
    """What is measured on each set of pictures.

    Attributes:
        metrics: of single pictures, and distances from real pictures.
        to_teacher: distances from the teacher's pictures of other noise.
        reference: real pictures; None where nothing is compared with them.
        diversity: features that diversity is measured by, and its name; None leaves it out.
        real_diversity: of real pictures of the same prompts, if known.
        columns: name of a figure -> its column, of standard metrics.
        scale: whether detail is also measured on blurred and noised copies.
    """

    metrics: list[Metric]
    to_teacher: list[Metric]
    reference: Reference | None
    diversity: tuple[Features, str] | None
    real_diversity: float | None = None
    columns: Mapping[str, Column] | None = None
    scale: bool = False


def reference_of(files: Sequence[Path], n: int, size: int, seed: int) -> Reference:
    """Return real pictures of files; with some for the floor where there are more than twice `n` of them."""
    pool = np.stack([read_picture(file, size) for file in files])
    return Reference.split(pool, n, seed) if len(pool) > 2 * n else Reference(pool)


def usual_plan(real: Sequence[Path] | None, prompts: Sequence[str], size: int, seed: int, out: Path) -> Plan:
    """Return the metrics that need no weights but the bundled ones."""
    features, n = Features(Lite0Features(), out / "features"), len(prompts)
    if real:
        reference = reference_of(real, n, size, seed)
        metrics = standard_suite(features, min(n, len(reference.pictures)), reference.pictures)
        suite = Suite(reference, metrics, features)
    else:
        suite = world("real").suite(prompts, seed, features)
    sets = [metric for metric in suite.metrics if metric.identity.against == "real"]
    named = (features, "diversity-Lite0")
    return Plan(suite.metrics, sets, suite.reference, named, suite.real_diversity, scale=True)


def chosen_plan(
    chosen: Sequence[Chosen],
    real: Sequence[Path] | None,
    prompts: Sequence[str],
    size: int,
    seed: int,
    loader: Loader,
) -> Plan:
    """Return the chosen metrics, with real pictures if one needs them or a folder of them is given."""
    found = load_metrics(chosen, loader)
    reference = None
    if real:
        reference = reference_of(real, len(prompts), size, seed)
    elif any(each.to_real for each in chosen):
        reference = world("real").suite(prompts, seed, Features(Lite0Features(), loader.cache)).reference
    several = (found.diversity, DIVERSITY) if found.diversity else None
    return Plan(found.metrics, found.to_teacher, reference, several, columns=found.columns)


def measure(
    plan: Plan, pictures: Pictures, noises: Pictures | None, prompts: Sequence[str], ends: TeacherPictures, seed: int
) -> dict[str, Figure]:
    """Return the figures of one set of pictures, and of several noises of a prompt."""
    same, other = TeacherPictures(same=ends.same), TeacherPictures(other=ends.other)
    figures = evaluate_pictures(pictures, prompts, plan.metrics, plan.reference, same, seed)
    figures |= evaluate_pictures(pictures, prompts, plan.to_teacher, None, other, seed)
    if ends.same is not None:  # the floor of a set's distance to the teacher: the teacher's own, from other noise
        own = evaluate_pictures(ends.same, prompts, plan.to_teacher, None, other, seed)
        figures |= {name: replace(figures[name], floor=floor.value) for name, floor in own.items()}
    if plan.diversity and noises is not None:
        features, name = plan.diversity
        several = noises.reshape(-1, NOISES, *noises.shape[1:])
        figures |= diversity(features, several, seed, floor=plan.real_diversity, name=name)
    return figures


def with_split(figure: Figure, split: str) -> Figure:
    """Return a figure whose record names the split."""
    return replace(figure, identity=figure.identity and replace(figure.identity, split=split or None))


def evaluate_generator(
    generator: ImageGenerator,
    prompts: Sequence[str],
    *,
    name: str,
    real: Sequence[Path] | None,
    samplings: Sequence[Sampling],
    reference: tuple[ImageGenerator, Sampling] | None,
    seed: int,
    out: Path,
    chosen: Sequence[Chosen] = (),
    split: str = "",
) -> Mapping[str, Mapping[str, Figure]]:
    """Measure a teacher or a student in one or several settings; write figures.json and return the figures by row.

    The processes of a launch share the generation; the main one measures, and the others return nothing. Several
    settings also give table.md and curves.png. Without chosen metrics FD needs at least 500 pictures on both sides and
    is left out below.

    Args:
        name: of the teacher or student in figures.json.
        real: files of real pictures; None for the bundled world's.
        samplings: settings that pictures are drawn with, one after another.
        reference: teacher whose end points from the same noise are compared with, and its sampling; None for none.
        out: folder for figures.json.
        chosen: standard metrics; empty for those that need no further weights.
        split: what the user calls prompts and real pictures.
    """
    print_cut_prompts(generator.backbone, prompts)
    n, size = len(prompts), samplings[0].size[0] if samplings[0].size else generator.backbone.picture_size
    usual, device = not chosen, generator.backbone.device
    ends = TeacherPictures()
    if reference is not None and (usual or any(each.to_teacher for each in chosen)):
        teacher, theirs = reference
        same = teacher.draw(prompts, range(seed, seed + n), theirs) if usual else None
        ends = TeacherPictures(same, teacher.draw(prompts, range(seed + n, seed + 2 * n), theirs))
    repeated = [prompt for prompt in prompts[:PROMPTS] for _ in range(NOISES)]

    @cache
    def plan() -> Plan:
        if usual:
            return usual_plan(real, prompts, size, seed, out)
        return chosen_plan(chosen, real, prompts, size, seed, Loader(device, out / "features"))

    def figures_of(pictures: Pictures, noises: Pictures | None) -> dict[str, Figure]:
        found = measure(plan(), pictures, noises, prompts, ends, seed)
        return {key: with_split(figure, split) for key, figure in found.items()}

    cells = []
    for sampling in samplings:
        pictures = generator.draw(prompts, range(seed, seed + n), sampling)
        noises = None
        if usual or any(each.metric.of == "noises" for each in chosen):
            noises = generator.draw(repeated, range(seed, seed + len(repeated)), sampling)
        figures = on_main_process(figures_of)(pictures, noises)
        cells.append(Cell(sampling.steps, sampling.gamma if sampling.sampler == "sss" else None, figures))

    def save() -> dict[str, Mapping[str, Figure]]:
        gammas = len({cell.gamma for cell in cells}) > 1
        rows = {f"{name} {cell.label(gammas)}": cell.figures for cell in cells}
        reference = plan().reference
        scale = detail_scale(reference.some(SCALED, seed), seed) if plan().scale and reference else {}
        save_figures(out / "figures.json", {**rows, **scale})
        if len(cells) > 1 or not usual:
            write_sweep(out, cells, plan().columns)
        return rows

    return on_main_process(save)()
