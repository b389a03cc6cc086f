"""`fewstep world versatility`: add-ons trained on the base and used with students, as one figure and one table.

As in the TCD paper's Figure 7 and TLCM's section on versatility, each add-on is trained on the base and then used by
the base and by the students' LoRAs, with the same prompts and noise.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np

from fewstep.backbones.base import load_backbone
from fewstep.backbones.teachers import teacher_path
from fewstep.common.device import pick_device
from fewstep.common.files import sha256, write_json, write_text
from fewstep.common.messages import Bar
from fewstep.common.provenance import commit, hardware
from fewstep.evaluation.bootstrap import COVER, RESAMPLES, centred_interval, counts, paired_difference
from fewstep.evaluation.metric import Array, Figure
from fewstep.inference.image_grid import labelled_grid, save_image
from fewstep.students.resolve import student_place
from fewstep_worlds.common.location import root
from fewstep_worlds.common.tables import markdown
from fewstep_worlds.studies.addons import measures
from fewstep_worlds.studies.addons.pipelines import Model, can_draw
from fewstep_worlds.studies.addons.scenes import load_encoder, load_reader, pictures_of
from fewstep_worlds.studies.addons.tasks import TASKS, Study, Task, bare
from fewstep_worlds.studies.comparison import stored_pictures
from fewstep_worlds.studies.settings import VersatilityConfig
from fewstep_worlds.studies.students import students_omega


@dataclass(frozen=True)
class Cell:
    """One sampler with one add-on.

    Attributes:
        task, model: their names.
        value, without: mean of the effect's measure, with the add-on and without it.
        kept: (value - without) over the base's, with its interval over prompts; None for the base itself.
        beside: mean of the side effect's measure, with the add-on.
        change: its change from without the add-on, with its interval over prompts.
        distance: mean distance to the base's pictures with the add-on; None for the base itself.
        distance_without: the same of pictures without it; None for the base and where the given picture is meant.
    """

    task: str
    model: str
    value: float
    without: float
    kept: Figure | None
    beside: float
    change: Figure
    distance: float | None
    distance_without: float | None


def columns(config: VersatilityConfig) -> list[Model]:
    """Return the base, then each student at each number of calls."""
    found = [Model("base", None, config.base_steps, 1 + students_omega())]
    for name, lora in (("TCD", config.tcd), ("TLCM", config.tlcm)):
        if lora:
            found += [Model(name, student_place(lora), steps) for steps in config.steps]
    return found


def kept_share(own: Array, base: Array, seed: int) -> Figure | None:
    """Return mean(own)/mean(base) of two effects [N], with a 95 % interval over draws of the same N prompts.

    None where the interval of the base's own effect contains 0.
    """
    drawn = counts(len(own), RESAMPLES, seed, "kept")
    gain = float(base.mean())
    low, _ = centred_interval(gain, (drawn @ base) / len(own))
    if low <= 0:
        return None
    with np.errstate(divide="ignore", invalid="ignore"):  # a few resamples of a faint effect have no effect
        shares = (drawn @ own) / (drawn @ base)
    # not centred, unlike means: the resamples of a ratio are skewed
    low, high = (float(end) for end in np.nanquantile(shares, [(1 - COVER) / 2, (1 + COVER) / 2]))
    return Figure(float(own.mean() / gain), low, high, len(own))


def weights_in(place: Path | None) -> str:
    """Return a fingerprint of the weights of a student or an add-on, a file or a folder; empty for none."""
    if place is None:
        return ""
    return sha256(*sorted(place.rglob("*.safetensors") if place.is_dir() else [place]))


def key_of(task: Task, model: Model, base: str, seed: int) -> str:
    """Return a hash of all that decides the pictures of a cell; `base` is the pipeline's identity."""
    given = hashlib.sha256(task.given.tobytes()).hexdigest()
    made = [base, weights_in(model.lora), weights_in(task.add_on), given, task.kind, task.strength]
    known = [[prompt.text for prompt in task.prompts], model.steps, model.scale, seed, *made]
    known += [task.gamma] if model.lora else []
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()[:20]


def measure_task(study: Study, task: Task, models: Sequence[Model]) -> tuple[list[Cell], list[np.ndarray]]:
    """Sample and measure a row; return its cells, and the pictures of all models (white where one cannot draw)."""
    seed, base = study.config.seed, study.base.folder.identity()

    def drawn(task: Task, model: Model) -> np.ndarray:
        return stored_pictures(
            study.out / "pictures", key_of(task, model, base, seed), partial(study.draw, task, model)
        )

    cells: list[Cell] = []
    sheets: list[np.ndarray] = []
    first: tuple[Model, np.ndarray, np.ndarray, Array] | None = None
    for model in models:
        if not can_draw(model, task.strength or 1.0):
            sheets.append(np.full_like(task.given, 255))
            continue
        pictures = drawn(task, model)
        plain = task.given if task.from_given else drawn(bare(task), model)
        value, without, beside = task.effect[1](pictures), task.effect[1](plain), task.beside[1](pictures)
        effect, change = value - without, paired_difference(beside, task.beside[1](plain), seed)
        first = first or (model, pictures, plain, effect)
        of_student = model is not first[0]
        cells.append(
            Cell(
                task.name,
                model.label,
                float(value.mean()),
                float(without.mean()),
                kept_share(effect, first[3], seed) if of_student else None,
                float(beside.mean()),
                change,
                float(measures.distance(pictures, first[1]).mean()) if of_student else None,
                float(measures.distance(plain, first[2]).mean()) if of_student and not task.from_given else None,
            )
        )
        sheets.append(pictures)
    return cells, sheets


def interval(figure: Figure, form: str) -> str:
    """Return a figure with its interval."""
    return f"{figure.value:{form}} [{figure.low:{form}}, {figure.high:{form}}]"


def kept_text(cell: Cell) -> str:
    """Return a student's share with its interval; in brackets the effect itself, where there is no share."""
    return f"({cell.value - cell.without:+.3f})" if cell.kept is None else interval(cell.kept, ".2f")


def table(cells: Sequence[Cell], task: Task, real: np.ndarray) -> str:
    """Return a task's cells as Markdown, below the measures of the prompts' `real` scenes."""
    effect, beside = (f"{measure(real).mean():.3f}" for _, measure in (task.effect, task.beside))
    rows = [["real scenes", effect, "", beside, ""]]
    for cell in cells:
        distance = "" if cell.distance is None else f"{cell.distance:.3f}"
        distance += "" if cell.distance_without is None else f" ({cell.distance_without:.3f})"
        beside = f"{cell.beside:.3f}, {interval(cell.change, '+.3f')}"
        rows.append([cell.model, f"{cell.without:.3f} to {cell.value:.3f}", kept_text(cell), beside, distance])
    return markdown([task.name, task.effect[0], "share kept", task.beside[0], "distance to base"], rows).rstrip()


NOTE = """The base's add-ons with students that never saw them, in plain diffusers pipelines; scenes that nothing was
trained on, the same prompts and noise for all samplers. By column: the effect's measure without the add-on and with it;
the share of the base's effect that a student keeps, with 95 % intervals over prompts (in brackets the effect itself,
where there is no base to compare with or its interval contains 0); the side effect's measure with the add-on and its
change; the mean absolute difference from the base's pictures (in brackets the same without the add-on). Real scenes
have passed the base's autoencoder. Inpainting and super-resolution are compared with the given picture. Samplers are
left out that have fewer times below a strength than calls; super-resolution has gamma 0."""


def versatility(config: VersatilityConfig, out: Path) -> Path:
    """Make the add-ons, sample and measure; write table.md, cells.json and figure.webp, and return the tables' path."""
    device = pick_device("auto")
    reader, base = load_reader(root() / "reader").to(device), load_backbone(teacher_path(""), device)
    features = load_encoder(device) if "picture" in config.tasks else None
    study, models = Study(config, out, base, reader, features), columns(config)
    cells, shown, tables = [], [], []
    with Bar(config.tasks, desc="versatility", unit="add-on") as bar:
        for name in bar:
            bar.set_postfix_str(name)
            task = TASKS[name](study)
            own, sheets = measure_task(study, task, models)
            cells += own
            tables.append(table(own, task, study.restore(pictures_of(task.prompts))))
            for i in range(config.shown):
                label = task.name if i == 0 else task.prompts[i].text[:24]
                shown.append((label, np.stack([sheet[i] for sheet in (task.given, *sheets)])))
    run = f"Commit {commit()}, {hardware()}; n = {config.prompts} prompts, seed {config.seed}."
    write_text(out / "table.md", "\n\n".join(["# Versatility", f"{' '.join(NOTE.split())} {run}", *tables]) + "\n")
    write_json(out / "cells.json", {"run": run, "cells": [asdict(cell) for cell in cells]})
    save_image(labelled_grid(shown, ["given", *(model.label for model in models)], 1), out / "figure.webp")
    return out / "table.md"
