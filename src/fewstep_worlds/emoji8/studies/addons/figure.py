"""`fewstep versatility`: add-ons of the ecosystem on students that never saw them, as one figure and one table.

As the TCD paper's Figure 7 and TLCM's section on versatility: each add-on is made on the base, then drawn with by the
base and by the students' LoRAs, at the same prompts and noise.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from fewstep.backbones.base import load_backbone
from fewstep.backbones.teachers import teacher_path
from fewstep.common.files import atomic_write, sha256, write_json
from fewstep.common.provenance import commit, hardware
from fewstep.common.tensors import load_tensors, save_tensors
from fewstep.evaluation.bootstrap import COVER, RESAMPLES, centred_interval, counts, paired_difference
from fewstep.evaluation.metric import Array, Figure
from fewstep.inference.image_grid import labelled_grid, save_image
from fewstep.students.resolve import student_place
from fewstep_worlds.emoji8.config import VersatilityConfig
from fewstep_worlds.emoji8.metrics import lite0
from fewstep_worlds.emoji8.studies.addons.context import Workshop
from fewstep_worlds.emoji8.studies.addons.pipelines import Who, can_draw
from fewstep_worlds.emoji8.studies.addons.tasks import AFTER_A_PICTURE, GAMMAS, STRENGTHS, TASKS, Task
from fewstep_worlds.emoji8.studies.students import students_omega


@dataclass(frozen=True)
class Cell:
    """One place of the table.

    Attributes:
        task, who: row and column.
        value, without: the mean of what the effect is measured in, with the add-on and without it.
        kept: (value - without) over the base's, with its interval over prompts; None for the base itself.
        beside: the mean of what must not be lost for it, with the add-on.
        change: what it is more than without the add-on, with its interval over prompts.
    """

    task: str
    who: str
    value: float
    without: float
    kept: Figure | None
    beside: float
    change: Figure


def columns(config: VersatilityConfig) -> list[Who]:
    """The base, then each student at each number of calls."""
    found = [Who("base", None, config.base_steps, 1 + students_omega())]
    for name, lora in (("TCD", config.tcd), ("TLCM", config.tlcm)):
        if lora:
            found += [Who(name, student_place(lora), steps) for steps in config.steps]
    return found


def kept_share(own: Array, base: Array, seed: int) -> Figure | None:
    """mean(own)/mean(base) of two effects [N], with a 95 % interval over draws of the same N prompts.

    None where the base itself has no effect that its interval tells from none: there is nothing to keep.
    """
    drawn = counts(len(own), RESAMPLES, seed, "kept")
    gain = float(base.mean())
    low, _ = centred_interval(gain, (drawn @ base) / len(own))
    if low <= 0:
        return None
    with np.errstate(divide="ignore", invalid="ignore"):  # a few resamples of a faint effect have none at all
        shares = (drawn @ own) / (drawn @ base)
    # not moved to the value, as means are: a ratio's resamples lie about it unevenly
    low, high = (float(end) for end in np.nanquantile(shares, [(1 - COVER) / 2, (1 + COVER) / 2]))
    return Figure(float(own.mean() / gain), low, high, len(own))


def weights_in(place: Path | None) -> str:
    """Fingerprint of the weights of a student or an add-on, a file or a folder; empty for none."""
    if place is None:
        return ""
    return sha256(*sorted(place.rglob("*.safetensors") if place.is_dir() else [place]))


def key_of(task: Task, who: Who, base: str, seed: int) -> str:
    """What decides the pictures of a cell, hashed; `base` is the pipeline's identity."""
    given = hashlib.sha256(task.given.tobytes()).hexdigest()
    made = [base, weights_in(who.lora), weights_in(task.add_on), given, STRENGTHS.get(task.name, 1.0)]
    if who.lora is not None:
        made.append(GAMMAS.get(task.name))
    known = [task.name, list(task.prompts), who.steps, who.scale, seed, *made]
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()[:20]


def kept_pictures(path: Path, draw: Callable[[], np.ndarray]) -> np.ndarray:
    """Pictures from a file; drawn and written if there is none yet."""
    if path.is_file():
        held: np.ndarray = load_tensors(path)["pictures"].numpy()
        return held
    made = draw()
    with atomic_write(path) as part:
        save_tensors(part, {"pictures": torch.from_numpy(np.ascontiguousarray(made))})
    return made


def measure(shop: Workshop, names: Sequence[str]) -> tuple[list[Cell], list[tuple[str, np.ndarray]], dict[str, Task]]:
    """Make, draw and measure every row; the cells, the figure's rows, the tasks."""
    who, held = columns(shop.config), shop.out / "pictures"
    cells, shown, tasks = [], [], {}
    with tqdm(total=len(names) * len(who), desc="versatility", unit="cell") as bar:
        for name in names:
            bar.set_postfix_str(f"{name}: making")
            task = tasks[name] = TASKS[name](shop)
            drawn = [task.given]
            reference: Array | None = None
            for one in who:
                bar.set_postfix_str(f"{name}: {one.label}")
                bar.update()
                if not can_draw(one, STRENGTHS.get(name, 1.0)):
                    drawn.append(np.full_like(task.given, 255))
                    continue
                key = key_of(task, one, shop.backbone.folder.identity(), shop.config.seed)
                pictures = kept_pictures(held / f"{key}.safetensors", partial(task.draw, one))
                plain = kept_pictures(held / f"{key}-without.safetensors", partial(task.without, one))
                value, before = task.effect(pictures), task.effect(plain)
                effect = value - before
                kept = None if reference is None else kept_share(effect, reference, shop.config.seed)
                reference = effect if reference is None else reference
                beside, unchanged = task.beside(pictures), task.beside(plain)
                change = paired_difference(beside, unchanged, shop.config.seed)
                means = [float(x.mean()) for x in (value, before, beside)]
                cells.append(Cell(name, one.label, means[0], means[1], kept, means[2], change))
                drawn.append(pictures)
            for i in range(shop.config.shown):
                label = f"{task.name}" if i == 0 else str(task.prompts[i])[:24]
                shown.append((label, np.stack([pictures[i] for pictures in drawn])))
    return cells, shown, tasks


def by_place(cells: Sequence[Cell]) -> dict[tuple[str, str], Cell]:
    """The cells by row and column."""
    return {(cell.task, cell.who): cell for cell in cells}


def table(
    cells: Sequence[Cell],
    tasks: Mapping[str, Task],
    labels: Sequence[str],
    what: Callable[[Task], str],
    words: Callable[[Cell], str],
) -> str:
    """Markdown: a row for each task, with `what` it is about and the `words` for each cell."""
    found = by_place(cells)
    lines = [f"| add-on | | {' | '.join(labels)} |", "| --- " * (2 + len(labels)) + "|"]
    for name, task in tasks.items():
        row = [words(found[name, label]) if (name, label) in found else "-" for label in labels]
        lines.append("| " + " | ".join([task.name, what(task), *row]) + " |")
    return "\n".join(lines)


def kept_words(cell: Cell) -> str:
    """A student's share with its interval; in brackets the effect itself, of the base or where no share can be told."""
    if cell.kept is None:
        return f"({cell.value - cell.without:+.3f})"
    return f"{cell.kept.value:.2f} [{cell.kept.low:.2f}, {cell.kept.high:.2f}]"


def effect_words(cell: Cell) -> str:
    """The measure without the add-on and with it."""
    return f"{cell.without:.3f} to {cell.value:.3f}"


def beside_words(cell: Cell) -> str:
    """What must not be lost, and how far it moved."""
    change = cell.change
    return f"{cell.beside:.3f}, {change.value:+.3f} [{change.low:+.3f}, {change.high:+.3f}]"


def tables(cells: Sequence[Cell], tasks: Mapping[str, Task], labels: Sequence[str]) -> str:
    """All three tables with what they say, as Markdown."""
    parts = [
        "Kept: a student's share of the base's effect, which stands in brackets, with 95 % intervals over prompts.",
        table(cells, tasks, labels, lambda task: task.effect_name, kept_words),
        "The measure without the add-on and with it, drawn by the same.",
        table(cells, tasks, labels, lambda task: task.effect_name, effect_words),
        "Beside it, what must not be lost: with the add-on, and what that is more than without it.",
        table(cells, tasks, labels, lambda task: task.beside_name, beside_words),
    ]
    return "\n\n".join(parts)


def versatility(config: VersatilityConfig, out: Path) -> Path:
    """Make the add-ons, draw, measure; writes table.md, cells.json and figure.webp, and returns the tables' path."""
    from fewstep_worlds.emoji8.metrics import agreement

    shop = Workshop(
        config, out, load_backbone(teacher_path("")), agreement().scorer, lite0(out / "features", progress=False)
    )
    cells, shown, tasks = measure(shop, list(TASKS))
    labels = [who.label for who in columns(config)]
    gammas = ", ".join(f"gamma {gamma:g} for {name}" for name, gamma in GAMMAS.items())
    note = (
        f"`fewstep versatility` at commit {commit()}, {hardware()}; n = {config.prompts} prompts each, seed "
        f"{config.seed}, the same prompts and noise in a row; students as their files say, but {gammas}. An effect is "
        "what pictures with the add-on have more than pictures without it, drawn by the same; for "
        f"{', '.join(AFTER_A_PICTURE)} more than what is given has. Pictures that are given are held out: neither the "
        "base nor a student nor an add-on has learned from them. No cell where a strength leaves fewer times than "
        "calls; a student's effect in brackets where the base's own cannot be told from none."
    )
    text = "\n\n".join(["# Versatility", note, tables(cells, tasks, labels)])
    with atomic_write(out / "table.md") as part:
        part.write_text(text + "\n", encoding="utf-8")
    write_json(out / "cells.json", {"note": note, "cells": [asdict(cell) for cell in cells]})
    save_image(labelled_grid(shown, ["given", *labels], 1), out / "figure.webp")
    return out / "table.md"
