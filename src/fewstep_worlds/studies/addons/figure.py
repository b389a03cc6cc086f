"""`fewstep world versatility`: add-ons trained on the base and used with students, as one figure and one table.

As in the TCD paper's Figure 7 and TLCM's section on versatility, each add-on is trained on the base and then used by
the base and by the students' LoRAs, with the same prompts and noise.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from fewstep.backbones.base import load_backbone
from fewstep.backbones.teachers import teacher_path
from fewstep.common.files import sha256, write_json, write_text
from fewstep.common.provenance import commit, hardware
from fewstep.evaluation.bootstrap import COVER, RESAMPLES, centred_interval, counts, paired_difference
from fewstep.evaluation.metric import Array, Figure
from fewstep.inference.image_grid import labelled_grid, save_image
from fewstep.students.resolve import student_place
from fewstep_worlds.common.tables import markdown
from fewstep_worlds.emoji8.metrics import agreement, lite0
from fewstep_worlds.studies.addons.context import Context
from fewstep_worlds.studies.addons.pipelines import Model, can_draw
from fewstep_worlds.studies.addons.tasks import GAMMAS, PICTURE_TASKS, STRENGTHS, TASKS, Task
from fewstep_worlds.studies.comparison import stored_pictures
from fewstep_worlds.studies.settings import VersatilityConfig
from fewstep_worlds.studies.students import students_omega


@dataclass(frozen=True)
class Cell:
    """A cell of the table.

    Attributes:
        task, model: row and column.
        value, without: mean of the effect's measure, with the add-on and without it.
        kept: (value - without) over the base's, with its interval over prompts; None for the base itself.
        beside: mean of the side effect's measure, with the add-on.
        change: its change from without the add-on, with its interval over prompts.
    """

    task: str
    model: str
    value: float
    without: float
    kept: Figure | None
    beside: float
    change: Figure


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
    made = [base, weights_in(model.lora), weights_in(task.add_on), given, STRENGTHS.get(task.name, 1.0)]
    if model.lora is not None:
        made.append(GAMMAS.get(task.name))
    known = [task.name, list(task.prompts), model.steps, model.scale, seed, *made]
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()[:20]


def measure(context: Context, names: Sequence[str]) -> tuple[list[Cell], list[tuple[str, np.ndarray]], dict[str, Task]]:
    """Make the add-ons, sample and measure every row; return cells, the figure's rows and the tasks."""
    models, folder, seed = columns(context.config), context.out / "pictures", context.config.seed
    cells, shown, tasks = [], [], {}
    with tqdm(total=len(names) * len(models), desc="versatility", unit="cell") as bar:
        for name in names:
            bar.set_postfix_str(f"{name}: making")
            task = tasks[name] = TASKS[name](context)
            sheets = [task.given]
            base_effect: Array | None = None
            for model in models:
                bar.set_postfix_str(f"{name}: {model.label}")
                bar.update()
                if not can_draw(model, STRENGTHS.get(name, 1.0)):
                    sheets.append(np.full_like(task.given, 255))
                    continue
                key = key_of(task, model, context.backbone.folder.identity(), seed)
                pictures = stored_pictures(folder, key, partial(task.draw, model))
                plain = stored_pictures(folder, f"{key}-without", partial(task.without, model))
                value, without, beside = task.effect(pictures), task.effect(plain), task.beside(pictures)
                effect = value - without
                kept = None if base_effect is None else kept_share(effect, base_effect, seed)
                base_effect = effect if base_effect is None else base_effect
                change = paired_difference(beside, task.beside(plain), seed)
                means = [float(x.mean()) for x in (value, without, beside)]
                cells.append(Cell(name, model.label, means[0], means[1], kept, means[2], change))
                sheets.append(pictures)
            for i in range(context.config.shown):
                label = f"{task.name}" if i == 0 else str(task.prompts[i])[:24]
                shown.append((label, np.stack([sheet[i] for sheet in sheets])))
    return cells, shown, tasks


def kept_text(cell: Cell) -> str:
    """Return a student's share with its interval; in brackets the effect itself, where there is no share."""
    if cell.kept is None:
        return f"({cell.value - cell.without:+.3f})"
    return f"{cell.kept.value:.2f} [{cell.kept.low:.2f}, {cell.kept.high:.2f}]"


def tables(cells: Sequence[Cell], tasks: Mapping[str, Task], labels: Sequence[str]) -> str:
    """Return all three tables with their captions, as Markdown."""
    by_place = {(cell.task, cell.model): cell for cell in cells}

    def table(measures: Callable[[Task], str], text: Callable[[Cell], str]) -> str:
        rows = [
            [task.name, measures(task)]
            + [text(by_place[name, label]) if (name, label) in by_place else "-" for label in labels]
            for name, task in tasks.items()
        ]
        return markdown(["add-on", "", *labels], rows, left=2 + len(labels)).rstrip()

    def effect_text(cell: Cell) -> str:
        return f"{cell.without:.3f} to {cell.value:.3f}"

    def beside_text(cell: Cell) -> str:
        change = cell.change
        return f"{cell.beside:.3f}, {change.value:+.3f} [{change.low:+.3f}, {change.high:+.3f}]"

    parts = [
        "Share of the base's effect that a student keeps, with 95 % intervals over prompts. In brackets: the effect.",
        table(lambda task: task.effect_name, kept_text),
        "The measure without the add-on and with it.",
        table(lambda task: task.effect_name, effect_text),
        "Side effect: its measure with the add-on, and the change from without it.",
        table(lambda task: task.beside_name, beside_text),
    ]
    return "\n\n".join(parts)


def versatility(config: VersatilityConfig, out: Path) -> Path:
    """Make the add-ons, sample and measure; write table.md, cells.json and figure.webp, and return the tables' path."""
    context = Context(
        config, out, load_backbone(teacher_path("")), agreement().scorer, lite0(out / "features", progress=False)
    )
    cells, shown, tasks = measure(context, list(TASKS))
    labels = [model.label for model in columns(config)]
    gammas = ", ".join(f"gamma {gamma:g} for {name}" for name, gamma in GAMMAS.items())
    note = (
        f"`fewstep world versatility` at commit {commit()}, {hardware()}; n = {config.prompts} prompts each, seed "
        f"{config.seed}, the same prompts and noise in a row; students with their own settings, but {gammas}. The "
        "effect is the measure with the add-on minus the measure without it; for "
        f"{', '.join(PICTURE_TASKS)}, minus that of the given picture. Given pictures are held out from the base, the "
        "students and the add-ons. A cell is empty where a strength leaves fewer times than calls. A student's effect "
        "is in brackets where the interval of the base's own effect contains 0."
    )
    text = "\n\n".join(["# Versatility", note, tables(cells, tasks, labels)])
    write_text(out / "table.md", text + "\n")
    write_json(out / "cells.json", {"note": note, "cells": [asdict(cell) for cell in cells]})
    save_image(labelled_grid(shown, ["given", *labels], 1), out / "figure.webp")
    return out / "table.md"
