"""`fewstep benchmark`: the TCD paper's Table 1 and gamma figures on the bundled world, start to end.

Fair by construction: LCM and TCD see the same samples in the same order with the same batch, rank and guidance law,
and each takes the best of the same learning rates on a validation list; teacher rows stand at the students' mean
guidance and at the teacher's own best. Every stage keeps what it made, so a stopped benchmark goes on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import Field

from fewstep import distillation
from fewstep.config import Config
from fewstep.evaluation.detail import detail_scale
from fewstep.evaluation.report import write_report
from fewstep.evaluation.results import Results, Row, save_results
from fewstep.files import read_json, write_json
from fewstep.settings import Sampling, resolve, teacher_path
from fewstep.world import emoji8
from fewstep.world.contest import (
    Entry,
    Judge,
    Studio,
    contest,
    solver_entries,
    student_entries,
    teacher_entry,
)
from fewstep.world.demo import METHODS, STEPS, WORLD_OVERRIDES, picture_grid
from fewstep.world.location import root

GAMMAS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)


class BenchmarkConfig(Config):
    """The full benchmark."""

    steps: int = Field(600, ge=1, description="optimiser steps of each student")
    batch: int = Field(64, ge=1, description="samples a step")
    rates: tuple[float, ...] = Field((3e-4, 1e-3, 3e-3), description="learning rates tried for both methods")
    seeds: tuple[int, ...] = Field((0, 1, 2), description="seeds of training and noise")
    prompts: int = Field(1000, ge=100, le=1000, description="open prompts drawn and measured")
    omegas: tuple[float, ...] = Field((1.0, 2.0, 3.0, 5.0, 8.0), description="guidance tried for the teacher")
    gamma: float = Field(0.2, ge=0, le=1, description="TCD's gamma of the headline, at every step count")
    shown: int = Field(12, ge=1, description="prompts in the picture grid")


def train(config: BenchmarkConfig, recipe: str, rate: float, seed: int, out: Path) -> Path:
    """Train one student, or return the finished one."""
    folder = out / "students" / f"{recipe}-{rate:g}-{seed}"
    changes = [
        f"loop.steps={config.steps}",
        f"loop.batch={config.batch}",
        f"loop.seed={seed}",
        "loop.save_every=200",
        f"optim.lr={rate}",
        *WORLD_OVERRIDES,
    ]
    return distillation.distill(resolve(recipe, None, changes), folder, cache=out / "cache")


def sampling_of(recipe: str, gamma: float) -> Sampling:
    """A recipe's own sampling with the benchmark's gamma."""
    return resolve(recipe).sampling.model_copy(update={"gamma": gamma})


def kid_of(row: Row) -> float:
    """A row's KID to real pictures."""
    return row.figures["KID-Lite0"].value


def choose(name: str, out: Path, candidates: Mapping[str, Sequence[Entry]], studio: Studio, judge: Judge) -> str:
    """The candidate with the lowest mean KID to real pictures; all figures are kept in <name>.json."""
    path = out / f"{name}.json"
    if not path.is_file():
        means = {}
        for key, entries in candidates.items():
            rows = [judge.row(entry, studio.prompts, studio.pictures(entry), None) for entry in entries]
            means[key] = sum(kid_of(row) for row in rows) / len(rows)
        write_json(path, {"kid": means, "chosen": min(means, key=lambda key: means[key])})
    return str(read_json(path)["chosen"])


def benchmark(config: BenchmarkConfig, out: Path) -> Path:
    """Run every stage that is not done yet; return the report's path."""
    teacher = teacher_path("")
    scorer = root() / "scorer"
    validation = Studio(teacher, emoji8.read_prompts("validation"), out / "pictures")
    judge = Judge(validation.prompts, scorer)

    def rate_entries(recipe: str, rate: float) -> list[Entry]:
        student = train(config, recipe, rate, config.seeds[0], out)
        return student_entries(recipe, student, sampling_of(recipe, config.gamma), STEPS, 99)

    rates = {
        recipe: float(
            choose(
                f"rate-{recipe}",
                out,
                {f"{r:g}": rate_entries(recipe, r) for r in config.rates},
                validation,
                judge,
            )
        )
        for recipe in METHODS
    }
    omegas = {f"{omega:g}": [teacher_entry(omega, 50, 99)] for omega in config.omegas}
    best_omega = float(choose("omega-teacher", out, omegas, validation, judge))
    tuning_judge = Judge(emoji8.read_prompts("gamma"), scorer)
    tuning = Studio(teacher, emoji8.read_prompts("gamma"), out / "pictures")
    first = train(config, "tcd", rates["tcd"], config.seeds[0], out)
    gammas = {
        steps: float(
            choose(
                f"gamma-{steps}",
                out,
                {f"{g:g}": student_entries("TCD", first, sampling_of("tcd", g), [steps], 99) for g in GAMMAS},
                tuning,
                tuning_judge,
            )
        )
        for steps in STEPS
    }
    studio = Studio(teacher, emoji8.read_prompts("benchmark")[: config.prompts], out / "pictures")
    full = Judge(studio.prompts, scorer)
    mean_omega = resolve("tcd").method.guidance.mean_omega
    rows: list[Row] = []
    shown: list[tuple[str, Entry]] = []
    for seed in config.seeds:
        students = {recipe: train(config, recipe, rates[recipe], seed, out) for recipe in METHODS}
        entries = solver_entries(mean_omega, STEPS, seed)
        for recipe, method in METHODS.items():
            entries += student_entries(method, students[recipe], sampling_of(recipe, config.gamma), STEPS, seed)
        for steps in STEPS:
            tuned = sampling_of("tcd", gammas[steps])
            entries += student_entries("TCD, tuned gamma", students["tcd"], tuned, [steps], seed)
        if seed == config.seeds[0]:
            entries += [
                entry
                for gamma in GAMMAS
                for entry in student_entries(
                    "TCD, gamma sweep", students["tcd"], sampling_of("tcd", gamma), STEPS, seed
                )
            ]
        if best_omega != mean_omega:
            best = f"teacher, omega {best_omega:g}"
            entries.append(teacher_entry(best_omega, 50, seed, best))
        reference = teacher_entry(mean_omega, 50, seed)
        four = [e for e in entries if e.sampling.steps == 4 and "sweep" not in e.method]
        first_seed = seed == config.seeds[0]
        rows += contest(studio, full, reference, entries, diverse=[reference, *four] if first_seed else [])
        if first_seed:
            shown = [("teacher, 50 steps", reference), *((f"{e.method}, 4 steps", e) for e in four)]
    results = Results(
        title="fewstep benchmark: Table 1 on the bundled world",
        rows=tuple(rows),
        real=full.real(),
        scale=detail_scale(full.reference.pictures[:1000]),
        prompts=tuple(studio.prompts),
        settings={
            "command": f"fewstep benchmark --out {out}",
            "prompts": f"{len(studio.prompts)} open prompts (no style: several right pictures each)",
            "seeds": ", ".join(map(str, config.seeds)),
            "training": f"{config.steps * config.batch} samples a student, batch {config.batch}",
            "learning rates": ", ".join(f"{METHODS[r]} {rate:g}" for r, rate in rates.items()),
            "teacher's guidance": f"omega {mean_omega:g} (the students' mean); best for validation {best_omega:g}",
            "tuned gamma": ", ".join(f"{gamma:g} at {steps} steps" for steps, gamma in gammas.items()),
        },
        caveats=(),
    )
    save_results(out / "results.json", results)
    return write_report(out / "report.html", results, picture_grid(studio, shown, config.shown))
