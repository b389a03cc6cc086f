"""`fewstep demo`: LCM and TCD really distilled from the bundled teacher, drawn, measured and shown in minutes."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fewstep.backbones.teachers import teacher_path
from fewstep.common.provenance import hardware
from fewstep.evaluation.detail import detail_scale
from fewstep.evaluation.limits import FD_FEWEST
from fewstep_worlds.emoji8 import dataset as emoji8
from fewstep_worlds.emoji8.config import DemoConfig
from fewstep_worlds.emoji8.report.claims import TEACHER_STEPS
from fewstep_worlds.emoji8.report.page import write_report
from fewstep_worlds.emoji8.report.results import Results, save_results
from fewstep_worlds.emoji8.report.tables import STEPS
from fewstep_worlds.emoji8.studies.comparison import (
    Bench,
    Entry,
    Judge,
    Studio,
    contest,
    solver_entries,
    student_entries,
    teacher_entry,
)
from fewstep_worlds.emoji8.studies.students import (
    METHODS,
    WIDER_SKIP,
    student_config,
    student_sampling,
    students_omega,
    train_student,
)


def train_students(config: DemoConfig, out: Path) -> dict[str, Path]:
    """Distil LCM and TCD for the demo's budget: same samples, batch, rank, guidance law and learning rate."""
    return {
        recipe: train_student(
            recipe,
            out / recipe,
            out / "cache",
            steps=config.steps,
            batch=config.batch,
            lr=config.lr,
            seed=config.seed,
            save_every=max(1, config.steps // 3),
        )
        for recipe in METHODS
    }


def demo(config: DemoConfig, out: Path) -> Path:
    """Train, draw, measure, report; return the report's path. A stopped demo goes on where it was."""
    started = time.perf_counter()
    prompts = emoji8.read_prompts("benchmark")[: config.prompts]
    judge = Judge(prompts, Bench.load(out / "features"), config.seed)  # what is missing is said before the training
    students = train_students(config, out)
    trained = time.perf_counter() - started
    studio = Studio(teacher_path(""), prompts, out / "pictures")
    omega = students_omega()
    entries = solver_entries(omega, STEPS, config.seed)
    for recipe, method in METHODS.items():
        entries += student_entries(method, students[recipe], student_sampling(recipe, config.gamma), STEPS, config.seed)
    teacher = teacher_entry(omega, TEACHER_STEPS, config.seed)
    rows = contest(studio, judge, teacher, entries)
    samples = config.steps * config.batch
    law = student_config("tcd")
    caveats = [
        f"This demo trains each student on {samples} samples; the benchmark trains far longer "
        "(docs/results/index.md). Read its order of methods as a first look.",
        WIDER_SKIP,
    ]
    if len(prompts) < FD_FEWEST:
        caveats.append(
            f"With n = {len(prompts)} FD would mostly measure its own bias (at least {FD_FEWEST} pictures are asked "
            "for): KID stands in its place."
        )
    results = Results(
        title="fewstep demo",
        rows=tuple(rows),
        real=judge.real(),
        scale=detail_scale(judge.reference.some(512)),
        prompts=tuple(prompts),
        settings={
            "command": f"fewstep demo --out {out}",
            "commit": ", ".join(sorted({row.commit for row in rows})),
            "hardware": hardware(),
            "prompts": f"{len(prompts)} open prompts (no style: several right pictures each)",
            "seed": str(config.seed),
            "training": f"{samples} samples a student, batch {config.batch}, lr {config.lr:g}, "
            f"rank {law.student.rank}; the teacher's step skips k = {law.method.k} of {law.method.grid} grid points",
            "guidance": f"omega {law.method.guidance.low:g} to {law.method.guidance.high:g} in training; "
            f"the teacher's rows at the mean, {omega:g}",
            "gamma": f"{config.gamma:g} at every step count",
            "precision": f"networks in {str(studio.precision).removeprefix('torch.')}, all methods alike",
            "time": f"{trained:.0f} s for training, {time.perf_counter() - started:.0f} s in all (this run)",
        },
        caveats=tuple(caveats),
    )
    save_results(out / "results.json", results)
    four = [(f"{entry.method}, 4 steps", entry) for entry in entries if entry.sampling.steps == 4]
    chosen = [(f"teacher, {teacher.sampling.steps} steps", teacher), *four]
    grid = picture_grid(studio, chosen, config.shown)
    return write_report(out / "report.html", results, grid, command=sample_command(students["tcd"], config.gamma))


def sample_command(student: Path, gamma: float) -> str:
    """How to draw with the student that was just trained, as the report's pictures are drawn."""
    fewstep = Path(sys.argv[0])
    name = str(fewstep) if fewstep.name == "fewstep" and ".venv" in fewstep.parts else "fewstep"
    words = ["sample", "a doggy, fluent 3d style", "--steps", "4", "--gamma", f"{gamma:g}", "--lora", str(student)]
    return shlex.join([name, *words, "--out", "doggy.png"])


def picture_grid(studio: Studio, chosen: Sequence[tuple[str, Entry]], shown: int) -> list[tuple[str, np.ndarray]]:
    """The first prompts by each of the named entries: what the report shows."""
    return [(name, studio.pictures(entry)[:shown]) for name, entry in chosen]
