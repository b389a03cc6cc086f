"""`fewstep demo`: LCM and TCD really distilled from the bundled teacher, drawn, measured and shown in minutes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from pydantic import Field

from fewstep.config import Config
from fewstep.evaluation.detail import detail_scale
from fewstep.evaluation.report import write_report
from fewstep.evaluation.results import Results, save_results
from fewstep.settings import resolve, teacher_path
from fewstep.world import emoji8
from fewstep.world.contest import (
    Bench,
    Entry,
    Judge,
    Studio,
    contest,
    solver_entries,
    student_entries,
    teacher_entry,
)
from fewstep.world.students import METHODS, STEPS, students_omega, train_student


class DemoConfig(Config):
    """The demo's budget: small enough for ten minutes on two cores."""

    steps: int = Field(120, ge=1, description="optimiser steps of each student")
    batch: int = Field(64, ge=1, description="samples a step")
    lr: float = Field(1e-3, gt=0, description="learning rate of both students")
    prompts: int = Field(128, ge=100, description="open prompts drawn and measured")
    gamma: float = Field(0.2, ge=0, le=1, description="TCD's gamma at every step count")
    shown: int = Field(10, ge=1, description="prompts in the picture grid")
    seed: int = Field(0, ge=0, description="seed of training and of the noise")


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
    students = train_students(config, out)
    trained = time.perf_counter() - started
    prompts = emoji8.read_prompts("benchmark")[: config.prompts]
    studio = Studio(teacher_path(""), prompts, out / "pictures")
    judge = Judge(prompts, Bench.load(out / "features"), config.seed)
    omega = students_omega()
    entries = solver_entries(omega, STEPS, config.seed)
    for recipe, method in METHODS.items():
        sampling = resolve(recipe).sampling.model_copy(update={"gamma": config.gamma})
        entries += student_entries(method, students[recipe], sampling, STEPS, config.seed)
    teacher = teacher_entry(omega, 50, config.seed)
    rows = contest(studio, judge, teacher, entries)
    samples = config.steps * config.batch
    results = Results(
        title="fewstep demo",
        rows=tuple(rows),
        real=judge.real(),
        scale=detail_scale(judge.reference.pictures[:512]),
        prompts=tuple(prompts),
        settings={
            "command": f"fewstep demo --out {out}",
            "prompts": f"{len(prompts)} open prompts (no style: several right pictures each)",
            "seed": str(config.seed),
            "training": f"{samples} samples a student, {trained:.0f} s for both",
            "time": f"{time.perf_counter() - started:.0f} s in all",
        },
        caveats=(
            f"This demo trains each student on {samples} samples; the benchmark trains far longer "
            "(docs/results.md). Read its order of methods as a first look.",
            f"With n = {len(prompts)} FD would mostly measure its own bias (at least 500 pictures are asked for): "
            "KID stands in its place.",
        ),
    )
    save_results(out / "results.json", results)
    four = [(f"{entry.method}, 4 steps", entry) for entry in entries if entry.sampling.steps == 4]
    chosen = [(f"teacher, {teacher.sampling.steps} steps", teacher), *four]
    return write_report(out / "report.html", results, picture_grid(studio, chosen, config.shown))


def picture_grid(studio: Studio, chosen: Sequence[tuple[str, Entry]], shown: int) -> list[tuple[str, np.ndarray]]:
    """The first prompts by each of the named entries: what the report shows."""
    return [(name, studio.pictures(entry)[:shown]) for name, entry in chosen]
