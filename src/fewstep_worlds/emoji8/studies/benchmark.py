"""`fewstep benchmark`: the TCD paper's Table 1 and gamma figures on the bundled world, start to end.

Fair by construction: LCM and TCD see the same samples in the same order with the same batch, rank and guidance law,
and each takes the best of the same learning rates on a validation list; teacher rows stand at the students' mean
guidance and at the teacher's own best. Every stage keeps what it made, so a stopped benchmark goes on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from fewstep.backbones.teachers import teacher_path
from fewstep.common import core_yaml
from fewstep.common.files import atomic_write, write_json
from fewstep.common.provenance import hardware
from fewstep.evaluation.detail import detail_scale
from fewstep_worlds.emoji8 import dataset as emoji8
from fewstep_worlds.emoji8.config import BenchmarkConfig
from fewstep_worlds.emoji8.report.claims import TEACHER_STEPS, claims, claims_table
from fewstep_worlds.emoji8.report.curves import draw_curves, gamma_curves
from fewstep_worlds.emoji8.report.page import write_report
from fewstep_worlds.emoji8.report.results import Results, Row, save_results
from fewstep_worlds.emoji8.report.tables import STEPS, table1, table_blocks
from fewstep_worlds.emoji8.studies.comparison import (
    Bench,
    Entry,
    Judge,
    Studio,
    contest,
    measured,
    solver_entries,
    student_entries,
    teacher_entry,
)
from fewstep_worlds.emoji8.studies.demo import picture_grid
from fewstep_worlds.emoji8.studies.students import (
    METHODS,
    WIDER_SKIP,
    student_config,
    student_sampling,
    students_omega,
    train_student,
)

GAMMAS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
CHOOSING = 99
"""Seed of the noise from which rates, guidance and gammas are chosen; no result rests on it."""


def train(config: BenchmarkConfig, recipe: str, rate: float, seed: int, out: Path) -> Path:
    """Train one student, or return the finished one."""
    folder = out / "students" / f"{recipe}-{rate:g}-{seed}"
    return train_student(
        recipe,
        folder,
        out / "cache",
        steps=config.steps,
        batch=config.batch,
        lr=rate,
        seed=seed,
        save_every=100,
    )


def kid_of(row: Row) -> float:
    """A row's KID to real pictures."""
    return row.figures["KID-Lite0"].value


@dataclass(frozen=True)
class Stage:
    """A list of prompts with who draws them and who judges."""

    studio: Studio
    judge: Judge
    out: Path

    @classmethod
    def on(cls, prompts: Sequence[str], out: Path, bench: Bench) -> Stage:
        """Set up a stage for the bundled teacher on some prompts."""
        return cls(Studio(teacher_path(""), prompts, out / "pictures"), Judge(prompts, bench), out)

    def choose(self, name: str, candidates: Mapping[str, Sequence[Entry]]) -> str:
        """The candidate that is best by KID to real pictures; all figures are kept in <name>.json."""
        kids = {}
        for key, entries in tqdm(candidates.items(), desc=f"choosing {name}", unit="candidate"):
            kids[key] = [kid_of(measured(self.studio, self.judge, entry, None)) for entry in entries]
        best = best_by_rank(kids)
        write_json(self.out / f"{name}.json", {"kid": kids, "chosen": best, "n": len(self.studio.prompts)})
        return best


def best_by_rank(kids: Mapping[str, Sequence[float]]) -> str:
    """The candidate with the lowest mean rank over the columns, then with the lowest mean.

    KID at 2 calls is tens of times that at 8: a plain mean would choose for 2 calls alone.
    """
    columns = list(zip(*kids.values(), strict=True))

    def rank(key: str) -> tuple[float, float]:
        own = kids[key]
        places = [sorted(column).index(value) for column, value in zip(columns, own, strict=True)]
        return sum(places) / len(places), sum(own) / len(own)

    return min(kids, key=rank)


def choose_rate(config: BenchmarkConfig, recipe: str, stage: Stage) -> float:
    """The learning rate whose student of the first seed is best over all step counts."""
    candidates = {
        str(rate): student_entries(
            METHODS[recipe],
            train(config, recipe, rate, config.seeds[0], stage.out),
            student_sampling(recipe, config.gamma),
            STEPS,
            CHOOSING,
        )
        for rate in config.rates
    }
    return float(stage.choose(f"rate-{recipe}", candidates))


def choose_omega(config: BenchmarkConfig, stage: Stage) -> float:
    """The teacher's own best guidance, at its end points."""
    candidates = {str(omega): [teacher_entry(omega, TEACHER_STEPS, CHOOSING)] for omega in config.omegas}
    return float(stage.choose("omega-teacher", candidates))


def choose_gammas(student: Path, stage: Stage) -> dict[int, float]:
    """TCD's best gamma at each step count."""
    chosen = {}
    for steps in STEPS:
        candidates = {
            str(gamma): student_entries("TCD", student, student_sampling("tcd", gamma), [steps], CHOOSING)
            for gamma in GAMMAS
        }
        chosen[steps] = float(stage.choose(f"gamma-{steps}", candidates))
    return chosen


def headline_entries(
    config: BenchmarkConfig, students: Mapping[str, Path], gammas: Mapping[int, float], omega: float, seed: int
) -> list[Entry]:
    """Table 1 at one seed: solvers on the teacher, both students, TCD once more with its tuned gammas."""
    entries = solver_entries(omega, STEPS, seed)
    for recipe, method in METHODS.items():
        entries += student_entries(method, students[recipe], student_sampling(recipe, config.gamma), STEPS, seed)
    for steps in STEPS:
        tuned = student_sampling("tcd", gammas[steps])
        entries += student_entries("TCD, tuned gamma", students["tcd"], tuned, [steps], seed)
    return entries


def sweep_entries(student: Path, seed: int) -> list[Entry]:
    """The paper's Figures 5 and 6: every gamma at every step count."""
    return [
        entry
        for gamma in GAMMAS
        for entry in student_entries("TCD, gamma sweep", student, student_sampling("tcd", gamma), STEPS, seed)
    ]


def benchmark(config: BenchmarkConfig, out: Path) -> Path:
    """Run every stage that is not done yet; return the report's path."""
    law = student_config("tcd")
    bench = Bench.load(out / "features")
    validation = Stage.on(emoji8.read_prompts("validation"), out, bench)
    rates = {recipe: choose_rate(config, recipe, validation) for recipe in METHODS}
    with atomic_write(out / "config.yaml") as part:  # only now: a folder with students of another config was refused
        part.write_text(core_yaml.dump(config.model_dump(mode="json")), encoding="utf-8")
    best_omega = choose_omega(config, validation)
    first = config.seeds[0]
    tuning = Stage.on(emoji8.read_prompts("gamma"), out, bench)
    gammas = choose_gammas(train(config, "tcd", rates["tcd"], first, out), tuning)

    final = Stage.on(emoji8.read_prompts("benchmark")[: config.prompts], out, bench)
    mean_omega = students_omega()
    rows: list[Row] = []
    for seed in config.seeds:
        students = {recipe: train(config, recipe, rates[recipe], seed, out) for recipe in METHODS}
        teacher = teacher_entry(mean_omega, TEACHER_STEPS, seed)
        entries = headline_entries(config, students, gammas, mean_omega, seed)
        if best_omega != mean_omega:
            entries.append(teacher_entry(best_omega, TEACHER_STEPS, seed, f"teacher, omega {best_omega:g}"))
            entries += solver_entries(best_omega, STEPS, seed)
        diverse: list[Entry] = []
        if seed == first:
            diverse = [teacher, *(entry for entry in entries if entry.sampling.steps == 4)]
            entries += sweep_entries(students["tcd"], seed)
        rows += contest(final.studio, final.judge, teacher, entries, diverse)
        if seed == first:
            shown = [(_shown_name(entry, mean_omega), entry) for entry in diverse]
    results = Results(
        title="fewstep benchmark: Table 1 on the bundled world",
        rows=tuple(rows),
        real=final.judge.real(),
        scale=detail_scale(final.judge.reference.some(1000)),
        prompts=tuple(final.studio.prompts),
        settings={
            "command": f"fewstep benchmark --out {out}",
            "commit": ", ".join(sorted({row.commit for row in rows})),
            "hardware": hardware(),
            "prompts": f"{len(final.studio.prompts)} open prompts (no style: several right pictures each)",
            "seeds": ", ".join(map(str, config.seeds)),
            "training": f"{config.steps * config.batch} samples a student, batch {config.batch}; "
            f"the teacher's step skips k = {law.method.k} of {law.method.grid} grid points",
            "learning rates": ", ".join(f"{METHODS[r]} {rate:g}" for r, rate in rates.items())
            + f", each the best of {', '.join(f'{rate:g}' for rate in config.rates)} for validation",
            "students": f"LoRA of rank {law.student.rank}, guidance omega {law.method.guidance.low:g} to "
            f"{law.method.guidance.high:g} in training, averaged weights",
            "gamma": f"{config.gamma:g} at every step count",
            "precision": f"networks in {str(final.studio.precision).removeprefix('torch.')}, all methods alike",
            "teacher's guidance": f"omega {mean_omega:g} (the students' mean); best for validation {best_omega:g} "
            f"of {', '.join(f'{omega:g}' for omega in config.omegas)}",
            "tuned gamma": ", ".join(f"{gamma:g} at {steps} steps" for steps, gamma in gammas.items()),
        },
        caveats=(WIDER_SKIP,),
    )
    save_results(out / "results.json", results)
    write_tables(results, out)
    return write_report(out / "report.html", results, picture_grid(final.studio, shown, config.shown))


def _shown_name(entry: Entry, usual_omega: float) -> str:
    omega = entry.sampling.omega
    guided = f", omega {omega:g}" if omega not in (0, usual_omega) and "omega" not in entry.method else ""
    return f"{entry.method}, {entry.sampling.steps} steps{guided}"


def write_tables(results: Results, out: Path) -> None:
    """Write Table 1 and the claims as Markdown, and the gamma sweep as a picture."""
    tables = [table1(results, names) for names in table_blocks(results)]
    for name, text in (
        ("table.md", "\n".join(tables)),
        ("claims.md", claims_table(claims(results))),
    ):
        with atomic_write(out / name) as part:
            part.write_text(text, encoding="utf-8")
    with atomic_write(out / "gamma.webp") as part:
        draw_curves(results, gamma_curves(results), part, "webp", against="gamma")
