"""`fewstep world benchmark`: the TCD paper's tables and gamma figures on the bundled world, start to end.

LCM, TCD and its other parameterisations train on the same samples in the same order with the same batch, rank and
guidance, each at the best of the same learning rates on a validation list. Teacher rows use the students' mean guidance
and the teacher's own best. The results of every stage are stored, so a stopped benchmark is resumed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from fewstep.common import core_yaml
from fewstep.common.defaults import world
from fewstep.common.files import atomic_write, write_json, write_text
from fewstep.common.messages import Bar
from fewstep_worlds.common.tables import best_by_rank
from fewstep_worlds.report.claims import TEACHER_STEPS, claims, claims_table
from fewstep_worlds.report.curves import draw_curves, gamma_curves
from fewstep_worlds.report.page import write_report
from fewstep_worlds.report.results import Row, save_results
from fewstep_worlds.report.tables import STEPS, tables
from fewstep_worlds.studies.comparison import (
    Comparison,
    Entry,
    solver_entries,
    student_entries,
    teacher_entry,
)
from fewstep_worlds.studies.settings import BenchmarkConfig
from fewstep_worlds.studies.sheets import COUNT, sheets
from fewstep_worlds.studies.students import (
    METHODS,
    PARAMETERISATIONS,
    WIDER_SKIP,
    student_config,
    student_sampling,
    students_omega,
    train_student,
)

GAMMAS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
RECIPES = {**METHODS, **PARAMETERISATIONS}
CHOOSING = 99
"""Seed of the noise for choosing rates, guidance and gammas; no result uses it."""


def train(config: BenchmarkConfig, recipe: str, rate: float, seed: int, out: Path) -> Path:
    """Train one student, or return the finished one."""
    folder = out / "students" / f"{recipe}-{rate:g}-{seed}"
    lengths = {"steps": config.steps, "batch": config.batch, "save_every": 100}
    return train_student(recipe, folder, out / "cache", lr=rate, seed=seed, **lengths)


def choose(comparison: Comparison, out: Path, name: str, candidates: Mapping[str, Sequence[Entry]]) -> str:
    """Return the candidate that is best by KID to real pictures; write all figures to <name>.json."""
    kids = {}
    for key, entries in Bar(candidates.items(), desc=f"choosing {name}", unit="candidate"):
        kids[key] = [comparison.measure(entry).figures["KID-Lite0"].value for entry in entries]
    best = best_by_rank(kids)
    write_json(out / f"{name}.json", {"kid": kids, "chosen": best, "n": len(comparison.store.prompts)})
    return best


def choose_rate(config: BenchmarkConfig, recipe: str, validation: Comparison, out: Path) -> float:
    """Return the learning rate whose student of the first seed is best over all step counts."""
    sampling = student_sampling(recipe, config.gamma)
    candidates = {
        str(rate): student_entries(
            RECIPES[recipe], train(config, recipe, rate, config.seeds[0], out), sampling, STEPS, CHOOSING
        )
        for rate in config.rates
    }
    return float(choose(validation, out, f"rate-{recipe}", candidates))


def headline_entries(
    config: BenchmarkConfig, students: Mapping[str, Path], gammas: Mapping[int, float], omega: float, seed: int
) -> list[Entry]:
    """Return Tables 1 and 2 at one seed: solvers on the teacher, all students, and TCD with its tuned gammas."""
    entries = solver_entries(omega, STEPS, seed)
    for recipe, method in RECIPES.items():
        counts = STEPS if recipe in METHODS else [COUNT]
        entries += student_entries(method, students[recipe], student_sampling(recipe, config.gamma), counts, seed)
    for steps in STEPS:
        tuned = student_sampling("tcd", gammas[steps])
        entries += student_entries("TCD, tuned gamma", students["tcd"], tuned, [steps], seed)
    return entries


def benchmark(config: BenchmarkConfig, out: Path) -> Path:
    """Run every stage that is not done yet; return the report's path."""
    validation = Comparison(world().read_prompts("validation"), out)
    rates = {recipe: choose_rate(config, recipe, validation, out) for recipe in RECIPES}
    write_text(
        out / "config.yaml", core_yaml.dump(config.model_dump(mode="json"))
    )  # only now: a folder with students of another config was refused
    ends = {str(omega): [teacher_entry(omega, TEACHER_STEPS, CHOOSING)] for omega in config.omegas}
    best_omega = float(choose(validation, out, "omega-teacher", ends))
    first = config.seeds[0]
    tcd = train(config, "tcd", rates["tcd"], first, out)

    def at_gammas(name: str, counts: Sequence[int], seed: int) -> dict[str, list[Entry]]:
        return {
            str(gamma): student_entries(name, tcd, student_sampling("tcd", gamma), counts, seed) for gamma in GAMMAS
        }

    tuning = Comparison(world().read_prompts("gamma"), out)
    gammas = {
        steps: float(choose(tuning, out, f"gamma-{steps}", at_gammas("TCD", [steps], CHOOSING))) for steps in STEPS
    }
    final = Comparison(world().read_prompts("benchmark")[: config.prompts], out)
    mean_omega = students_omega()
    rows: list[Row] = []
    for seed in config.seeds:
        students = {recipe: train(config, recipe, rates[recipe], seed, out) for recipe in RECIPES}
        teacher = teacher_entry(mean_omega, TEACHER_STEPS, seed)
        entries = headline_entries(config, students, gammas, mean_omega, seed)
        if best_omega != mean_omega:
            entries.append(teacher_entry(best_omega, TEACHER_STEPS, seed, f"teacher, omega {best_omega:g}"))
            entries += solver_entries(best_omega, STEPS, seed)
        diverse: list[Entry] = []
        if seed == first:
            diverse = [teacher, *(entry for entry in entries if entry.count("nfe") == COUNT)]
            shown = sheets(final, teacher, entries, config.shown)
            entries += [entry for own in at_gammas("TCD, gamma sweep", STEPS, seed).values() for entry in own]
        rows += final.measure_all(teacher, entries, diverse)
    own = student_config("tcd")
    results = final.results(
        "fewstep benchmark: the TCD paper's tables on the bundled world",
        rows,
        f"fewstep world benchmark --out {out}",
        {
            "seeds": ", ".join(map(str, config.seeds)),
            "training": f"{config.steps * config.batch} samples a student, batch {config.batch}; "
            f"the teacher's step skips k = {own.method.k} of {own.method.grid} grid points",
            "learning rates": ", ".join(f"{RECIPES[r]} {rate:g}" for r, rate in rates.items())
            + f", each the best of {', '.join(f'{rate:g}' for rate in config.rates)} for validation",
            "students": f"LoRA of rank {own.student.rank}, guidance omega {own.method.guidance.low:g} to "
            f"{own.method.guidance.high:g} in training, averaged weights",
            "gamma": f"{config.gamma:g} at every step count",
            "teacher's guidance": f"omega {mean_omega:g} (the students' mean); best for validation {best_omega:g} "
            f"of {', '.join(f'{omega:g}' for omega in config.omegas)}",
            "tuned gamma": ", ".join(f"{gamma:g} at {steps} steps" for steps, gamma in gammas.items()),
        },
        [WIDER_SKIP],
        scale=1000,
    )
    save_results(out / "results.json", results)
    write_text(out / "table.md", tables(results))
    write_text(out / "claims.md", claims_table(claims(results)))
    with atomic_write(out / "gamma.webp") as part:
        draw_curves(results, gamma_curves(results), part, "webp", against="gamma")
    return write_report(out / "report.html", results, shown)
