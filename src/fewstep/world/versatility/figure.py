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
from fewstep.drawing import labelled_sheet, save_picture
from fewstep.evaluation.bootstrap import RESAMPLES, centred_interval, counts
from fewstep.evaluation.metric import Array, Figure
from fewstep.files import atomic_write, sha256, write_json
from fewstep.provenance import commit, hardware
from fewstep.settings import teacher_path
from fewstep.student_choice import student_place
from fewstep.tensors import load_tensors, save_tensors
from fewstep.world.measures import lite0
from fewstep.world.settings import VersatilityConfig
from fewstep.world.students import students_omega
from fewstep.world.versatility.studio import Who, can_draw
from fewstep.world.versatility.tasks import GAMMAS, STRENGTHS, TASKS, Task
from fewstep.world.versatility.workshop import Workshop


@dataclass(frozen=True)
class Cell:
    """One place of the table.

    Attributes:
        task, who: row and column.
        value, without: the mean of what the effect is measured in, with the add-on and without it.
        beside: the mean of what must not be lost for it.
        kept: (value - without) over the base's, with its interval over prompts; None for the base itself.
    """

    task: str
    who: str
    value: float
    without: float
    beside: float
    kept: Figure | None


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
    value = float(own.mean() / gain)
    return Figure(value, *centred_interval(value, (drawn @ own) / (drawn @ base)), len(own))


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
                means = [float(x.mean()) for x in (value, before, task.beside(pictures))]
                cells.append(Cell(name, one.label, means[0], means[1], means[2], kept))
                drawn.append(pictures)
            for i in range(shop.config.shown):
                label = f"{task.name}" if i == 0 else str(task.prompts[i])[:24]
                shown.append((label, np.stack([pictures[i] for pictures in drawn])))
    return cells, shown, tasks


def table(cells: Sequence[Cell], tasks: Mapping[str, Task], labels: Sequence[str]) -> str:
    """The cells as Markdown: the effect without the add-on and with the base, then what each student keeps of it."""
    found = by_place(cells)
    base, *students = labels
    head = f"| add-on | effect | without | {base} | " + " | ".join(students) + " |"
    lines = [head, "| --- " * (4 + len(students)) + "|"]
    for name, task in tasks.items():
        own = found[name, base]
        row = [task.name, task.effect_name, f"{own.without:.3f}", f"{own.value:.3f}"]
        for label in students:
            kept = found[name, label].kept if (name, label) in found else None
            row.append("-" if kept is None else f"{kept.value:.2f} [{kept.low:.2f}, {kept.high:.2f}]")
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def by_place(cells: Sequence[Cell]) -> dict[tuple[str, str], Cell]:
    """The cells by row and column."""
    return {(cell.task, cell.who): cell for cell in cells}


def beside_table(cells: Sequence[Cell], tasks: Mapping[str, Task], labels: Sequence[str]) -> str:
    """What must not be lost for the effects, as Markdown."""
    found = by_place(cells)
    lines = [f"| add-on | beside its effect | {' | '.join(labels)} |", "| --- " * (2 + len(labels)) + "|"]
    for name, task in tasks.items():
        row = [f"{found[name, label].beside:.3f}" if (name, label) in found else "-" for label in labels]
        lines.append("| " + " | ".join([task.name, task.beside_name, *row]) + " |")
    return "\n".join(lines)


def versatility(config: VersatilityConfig, out: Path) -> Path:
    """Make the add-ons, draw, measure; writes table.md, cells.json and figure.webp, and returns the table's path."""
    from fewstep.world.measures import agreement

    shop = Workshop(
        config, out, load_backbone(teacher_path("")), agreement().scorer, lite0(out / "features", progress=False)
    )
    cells, shown, tasks = measure(shop, list(TASKS))
    labels = [who.label for who in columns(config)]
    note = (
        f"`fewstep versatility` at commit {commit()}, {hardware()}; n = {config.prompts} prompts each, seed "
        f"{config.seed}, the same prompts and noise in a row. Students' cells: the share of the base's effect that is "
        "kept, with 95 % intervals over prompts; an effect is what pictures with the add-on have more than pictures "
        "without it, drawn by the same. None where the base's own effect cannot be told from none."
    )
    parts = ["# Versatility", table(cells, tasks, labels), note, beside_table(cells, tasks, labels)]
    text = "\n\n".join(parts)
    with atomic_write(out / "table.md") as part:
        part.write_text(text + "\n", encoding="utf-8")
    listed = [{**asdict(c), "kept": c.kept.to_dict() if c.kept else None} for c in cells]
    write_json(out / "cells.json", {"note": note, "cells": listed})
    save_picture(labelled_sheet(shown, ["given", *labels], 1), out / "figure.webp")
    return out / "table.md"
