"""`fewstep demo`: LCM and TCD distilled from the bundled teacher, sampled, measured and shown in minutes."""

from __future__ import annotations

import shlex
import sys
import time
from pathlib import Path

from fewstep.common.defaults import world
from fewstep.evaluation.limits import FD_FEWEST
from fewstep_worlds.report.claims import TEACHER_STEPS
from fewstep_worlds.report.page import write_report
from fewstep_worlds.report.results import save_results
from fewstep_worlds.studies.comparison import (
    SOLVER_NAMES,
    Comparison,
    solver_entries,
    student_entries,
    teacher_entry,
)
from fewstep_worlds.studies.settings import DemoConfig
from fewstep_worlds.studies.sheets import sheets
from fewstep_worlds.studies.students import (
    METHODS,
    WIDER_SKIP,
    student_config,
    student_sampling,
    students_omega,
    train_student,
)

SOLVERS = {solver: name for solver, name in SOLVER_NAMES.items() if solver != "euler"}
"""Euler is DDIM on these times; the benchmark shows it."""
STEPS = (2, 4, 8)
"""Network evaluations, and steps, of every row; the benchmark goes on to 20."""
CLOSED = 0.4
"""Share of DDIM's gap to the teacher that students of the demo's length are expected to close."""


def demo(config: DemoConfig, out: Path) -> Path:
    """Train, sample, measure and report; return the report's path. A stopped demo is resumed."""
    started = time.perf_counter()
    comparison = Comparison(world().read_prompts("benchmark")[: config.prompts], out, config.seed)
    students = {
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
    trained = time.perf_counter() - started
    omega = students_omega()
    entries = solver_entries(omega, STEPS, config.seed, SOLVERS)
    for recipe, method in METHODS.items():
        entries += student_entries(method, students[recipe], student_sampling(recipe, config.gamma), STEPS, config.seed)
    teacher = teacher_entry(omega, TEACHER_STEPS, config.seed)
    rows = comparison.measure_all(teacher, entries)
    samples = config.steps * config.batch
    shared = student_config("tcd")
    guidance = shared.method.guidance
    caveats = [
        f"This demo trains each student on {samples} samples; the benchmark trains far longer "
        "(docs/results/index.md). Its order of methods is a first impression.",
        WIDER_SKIP,
    ]
    if config.prompts < FD_FEWEST:
        caveats.append(
            f"With n = {config.prompts} FD would mostly measure its own bias (it needs {FD_FEWEST} pictures); KID is "
            "reported instead."
        )
    results = comparison.results(
        "fewstep demo",
        rows,
        f"fewstep demo --out {out}",
        {
            "seed": str(config.seed),
            "training": f"{samples} samples a student, batch {config.batch}, lr {config.lr:g}, "
            f"rank {shared.student.rank}; the teacher's step skips k = {shared.method.k} of {shared.method.grid} grid "
            "points",
            "guidance": f"omega {guidance.low:g} to {guidance.high:g} in training; teacher rows at the mean, {omega:g}",
            "gamma": f"{config.gamma:g} at every step count",
            "time": f"{trained:.0f} s for training, {time.perf_counter() - started:.0f} s in all (this run)",
        },
        caveats,
        scale=512,
    )
    save_results(out / "results.json", results)
    shown = sheets(comparison, teacher, entries, config.shown)
    command = sample_command(shown[0].prompts[0], students["tcd"], config.gamma)
    return write_report(out / "report.html", results, shown, command=command, closed=CLOSED)


def sample_command(prompt: str, student: Path, gamma: float) -> str:
    """Return the command that samples the new student as in the report's pictures."""
    fewstep = Path(sys.argv[0])
    name = str(fewstep) if fewstep.name == "fewstep" and ".venv" in fewstep.parts else "fewstep"
    words = ["sample", prompt, "--steps", "4", "--gamma", f"{gamma:g}", "--lora", str(student)]
    return shlex.join([name, *words, "--out", "picture.png"])
