"""`fewstep family`: every recipe distilled from the bundled teacher at equal training cost, and drawn with.

Costs are network evaluations: a forward pass counts as one, a backward pass as two more, stored trajectories with all
that it took to draw them. The samplers of the family follow on one student. What was made is kept: a stopped run goes
on.
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fewstep.backbones.teachers import teacher_path
from fewstep.common.choices import CALLS
from fewstep.common.config import validate
from fewstep.common.errors import UserError
from fewstep.common.files import atomic_write
from fewstep.common.provenance import hardware
from fewstep.diffusion.config import Sampling
from fewstep.distillation.config import DistillConfig, resolve
from fewstep.distillation.distill import distill, shared_cache
from fewstep.methods.cost import step_cost
from fewstep_worlds.emoji8 import dataset as emoji8
from fewstep_worlds.emoji8.config import FamilyConfig
from fewstep_worlds.emoji8.report.claims import TEACHER_STEPS
from fewstep_worlds.emoji8.report.results import Results, Row, save_results
from fewstep_worlds.emoji8.report.tables import table1, table_blocks
from fewstep_worlds.emoji8.studies.comparison import (
    Bench,
    Entry,
    Judge,
    Studio,
    contest,
    student_entries,
    teacher_entry,
)
from fewstep_worlds.emoji8.studies.students import WIDER_SKIP, student_config, students_omega

STEPS = (1, 2, 4, 8, 20)
"""Network calls at which recipes are compared."""
SAMPLER_STEPS = (4, 8, 20)
"""Network calls at which samplers are compared."""
TSCD_STAGES = ", ".join(
    f"{{name: {m} segment{'s' if m > 1 else ''}, share: 0.25, method: {{segments: {m}, k: {8 // m}}}}}"
    for m in (8, 4, 2, 1)
)
OWN: Mapping[str, tuple[str, ...]] = {
    "ct": ("data.empty_prompts=0.1",),
    "ctm": ("data.empty_prompts=0.1", "method.target_decay=0.95"),
    "kd": ("method.k=49",),
    "mcm": ("method.k=2",),
    "pcm": ("method.k=2",),
    "shortcut": ("method.k=49",),
    "tscd": (f"stages=[{TSCD_STAGES}]",),
}
"""What a recipe needs besides the bundled world's law.

That skips a fifth of the path, here a fifth of a segment; KD and shortcut models draw their skip from all lengths; a
target of decay .999 would not move in runs this short; and those that learn without guidance see the empty prompt, so
that it can be given when they draw.
"""
SAMPLERS: Mapping[str, Mapping[str, object]] = {
    "SSS, gamma 0": {"gamma": 0.0},
    "SSS, gamma .3": {"gamma": 0.3},
    "SSS, gamma 1": {"gamma": 1.0},
    "SSS, gamma .3 in noise (CTM's law)": {"gamma": 0.3, "gamma_law": "noise"},
    "SSS of second order, gamma 0": {"gamma": 0.0, "jump": "second_order"},
    "SSS of second order, gamma .3": {"gamma": 0.3, "jump": "second_order"},
    "multistep consistency": {"sampler": "lcm", "jump": "first_order"},
    "DDIM": {"sampler": "ddim"},
    "Euler": {"sampler": "euler"},
    "DPM-Solver++(2S)": {"sampler": "dpmpp_2s"},
    "SDE-DPM-Solver++(2M)": {"sampler": "sde_dpmpp_2m"},
}
"""What one TCF(1) student is drawn with (TCD, section 4.3)."""


def trajectory_cost(config: DistillConfig) -> int:
    """Network evaluations of one stored trajectory: a solver step at each grid point, guided if the recipe is."""
    method = config.method
    return method.points * CALLS[method.solver] * method.guidance.branches


@dataclass(frozen=True)
class Share:
    """What a recipe does with the budget.

    Attributes:
        config: as it is distilled.
        changes: what that changes in the recipe under the world's law, as overrides.
        evaluations: network evaluations that it takes, at most the budget.
    """

    config: DistillConfig
    changes: tuple[str, ...]
    evaluations: int

    def command(self, recipe: str, place: Path) -> str:
        """What distils the same student."""
        words = ["fewstep", "distill", "--recipe", recipe, "--config", "world/distill.yaml", "--out", str(place)]
        return shlex.join([*words, *(word for change in self.changes for word in ("-s", change))])


def share_of_budget(config: FamilyConfig, recipe: str) -> Share:
    """As many steps as the budget pays for; of KD's a half goes into its trajectories.

    Raises:
        UserError: it does not pay for one.
    """
    plain = student_config(recipe, OWN.get(recipe, ()))
    own, left = list(OWN.get(recipe, ())), config.evaluations
    if plain.method.start == "trajectory":
        count = max(1, config.evaluations // 2 // trajectory_cost(plain))
        own.append(f"data.trajectories={count}")
        left -= count * trajectory_cost(plain)
    a_step = step_cost(plain.method) * config.batch
    steps = int(left // a_step)
    if steps < 1:
        raise UserError(
            f"evaluations = {config.evaluations} does not pay for a step of {recipe}; "
            f"the nearest legal one is {config.evaluations - left + math.ceil(a_step)}"
        )
    own += [f"loop.steps={steps}", f"loop.batch={config.batch}", f"loop.seed={config.seed}", f"optim.lr={config.lr}"]
    own.append("loop.validate_every=null")  # they are measured when they are done
    return Share(student_config(recipe, own), tuple(own), round(config.evaluations - left + steps * a_step))


def recipe_entries(recipe: str, student: Path, omega: float, seed: int) -> list[Entry]:
    """A student under its recipe's own sampler; one that learnt without guidance is also guided when it draws."""
    config = resolve(recipe)
    sampling = config.sampling
    counts = [count for count in STEPS if count % sampling.calls_a_step == 0]
    entries = student_entries(recipe, student, sampling, counts, seed)
    if config.method.guidance.convention == "none":
        guided = sampling.model_copy(update={"omega": omega})
        entries += student_entries(f"{recipe}, guided", student, guided, counts, seed)
    return entries


def sampler_entries(student: Path, seed: int) -> list[Entry]:
    """One TCF(1) student under every sampler of the family, at equal network calls."""
    own = resolve("tcd").sampling.model_dump()
    return [
        Entry(name, validate(Sampling, own | dict(changes) | {"steps": steps}), student, seed)
        for name, changes in SAMPLERS.items()
        for steps in SAMPLER_STEPS
    ]


def family(config: FamilyConfig, out: Path) -> Path:
    """Distil, draw and measure; write results.json and tables.md, and return the tables' path."""
    shares = {recipe: share_of_budget(config, recipe) for recipe in config.chosen}
    prompts = emoji8.read_prompts("benchmark")[: config.prompts]
    judge = Judge(prompts, Bench.load(out / "features"), config.seed)
    studio = Studio(teacher_path(""), prompts, out / "pictures")
    omega = students_omega()
    with atomic_write(out / "prompts.txt") as part:
        part.write_text("\n".join(prompts) + "\n", encoding="utf-8")
    teacher = teacher_entry(omega, TEACHER_STEPS, config.seed)
    rows: list[Row] = []
    for recipe, share in shares.items():
        student = distill(share.config, out / recipe, cache=out / "cache", shared=shared_cache(out))
        entries = recipe_entries(recipe, student, omega, config.seed)
        rows += contest(studio, judge, teacher, entries)[bool(rows) :]  # the teacher's row comes once
        if recipe == "tcd":
            sampled = contest(studio, judge, teacher, sampler_entries(student, config.seed))
    made = Results(
        title="The family on the bundled world",
        rows=tuple(rows),
        real=judge.real(),
        prompts=tuple(prompts),
        settings={
            "command": shlex.join(["fewstep", "family", "--out", str(out), *_changes(config)]),
            "commit": ", ".join(sorted({row.commit for row in rows})),
            "hardware": hardware(),
            "prompts": f"{len(prompts)} open prompts (no style: several right pictures each)",
            "seed": str(config.seed),
            "training": f"{config.evaluations} network evaluations a student, batch {config.batch}, lr {config.lr:g}",
            "precision": f"networks in {str(studio.precision).removeprefix('torch.')}, all recipes alike",
        },
        caveats=(WIDER_SKIP,),
    )
    save_results(out / "results.json", made)
    text = [settings_table(made.settings), *(table1(made, names, STEPS) for names in table_blocks(made))]
    if "tcd" in shares:
        samplers = Results(title="Samplers of one TCF(1) student", rows=tuple(sampled), real=made.real)
        save_results(out / "samplers.json", samplers)
        text += [
            f"## {samplers.title}\n",
            *(table1(samplers, names, SAMPLER_STEPS) for names in table_blocks(samplers)),
        ]
    text += ["## Commands\n", commands(shares, out)]
    with atomic_write(out / "tables.md") as part:
        part.write_text("\n".join(text), encoding="utf-8")
    return out / "tables.md"


def _changes(config: FamilyConfig) -> list[str]:
    """What a config changes in the defaults, as words of the command."""
    given, usual = config.model_dump(mode="json"), FamilyConfig().model_dump(mode="json")
    changed = {key: value for key, value in given.items() if value != usual[key]}
    texts = {key: f"[{', '.join(value)}]" if isinstance(value, list) else value for key, value in changed.items()}
    return [word for key, value in texts.items() for word in ("-s", f"{key}={value}")]


def settings_table(settings: Mapping[str, str]) -> str:
    """What all rows share, as Markdown."""
    return "\n".join(["| setting | |", "| --- | --- |", *(f"| {k} | {v} |" for k, v in settings.items())]) + "\n"


def commands(shares: Mapping[str, Share], out: Path) -> str:
    """What each student cost, how to make it, and how to measure each row alone, as Markdown."""
    lines = ["| recipe | steps | evaluations a sample | evaluations in all |", "| --- | ---: | ---: | ---: |"]
    for recipe, share in shares.items():
        cost = f"{step_cost(share.config.method):g}"
        lines.append(f"| {recipe} | {share.config.loop.steps} | {cost} | {share.evaluations} |")
    lines += ["", "```sh", "# the students"]
    lines += [share.command(recipe, out / recipe) for recipe, share in shares.items()]
    omega = students_omega()
    for recipe in shares:
        student = out / recipe / "student"
        lines += ["", *_row_commands(recipe_entries(recipe, student, omega, 0), resolve(recipe).sampling, out)]
    if "tcd" in shares:
        student = out / "tcd" / "student"
        lines += ["", *_row_commands(sampler_entries(student, 0), resolve("tcd").sampling, out)]
    return "\n".join([*lines, "```"]) + "\n"


def _row_commands(entries: Sequence[Entry], own: Sampling, out: Path) -> list[str]:
    """One line a row: a loop over its columns, with what it changes in the student's own sampling."""
    rows: dict[str, list[Entry]] = {}
    for entry in entries:
        rows.setdefault(entry.method, []).append(entry)
    lines = []
    for name, row in rows.items():
        given, usual = row[0].sampling.model_dump(mode="json"), own.model_dump(mode="json")
        changed = [f"{key}={value}" for key, value in given.items() if key != "steps" and value != usual[key]]
        words = ["fewstep", "evaluate", "--prompt-file", str(out / "prompts.txt"), "--lora", str(row[0].lora)]
        words += [word for change in changed for word in ("-s", change)]
        counts = " ".join(str(entry.sampling.steps) for entry in row)
        place = shlex.quote(str(out / "rows" / re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")))
        lines.append(f"# {name}\nfor n in {counts}; do {shlex.join(words)} --steps $n --out {place}-$n; done")
    return lines
