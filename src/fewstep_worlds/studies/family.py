"""`fewstep world family`: every recipe distilled from the bundled teacher at equal training cost, sampled and measured.

Costs are network evaluations: a forward pass counts as one, a backward pass as two. Stored trajectories cost the
evaluations of their solver. All samplers are then compared on one student. A stopped run is resumed.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fewstep.common.choices import CALLS
from fewstep.common.config import validate
from fewstep.common.defaults import world
from fewstep.common.errors import UserError
from fewstep.common.files import write_text
from fewstep.diffusion.config import Sampling
from fewstep.distillation.config import DistillConfig, resolve
from fewstep.distillation.distill import distill, shared_cache
from fewstep.methods.cost import step_cost
from fewstep_worlds.common.tables import markdown
from fewstep_worlds.report.claims import TEACHER_STEPS
from fewstep_worlds.report.results import Results, Row, save_results
from fewstep_worlds.report.tables import tables
from fewstep_worlds.studies.comparison import (
    Comparison,
    Entry,
    entries_at,
    student_entries,
    teacher_entry,
)
from fewstep_worlds.studies.settings import FamilyConfig
from fewstep_worlds.studies.students import (
    WIDER_SKIP,
    override_words,
    settings_table,
    student_config,
    students_omega,
)

STEPS = (1, 2, 4, 8, 20)
"""Counts at which recipes are compared."""
SAMPLER_STEPS = (4, 8, 20)
"""Counts at which samplers are compared."""
TSCD_STAGES = ", ".join(
    f"{{name: {m} segment{'s' if m > 1 else ''}, share: 0.25, method: {{segments: {m}, k: {8 // m}}}}}"
    for m in (8, 4, 2, 1)
)
CHANGES: Mapping[str, tuple[str, ...]] = {
    "ct": ("data.empty_prompts=0.1",),
    "decoupled-dmd": ("method.k=1",),
    "dmd2": ("method.k=1",),
    "ctm": ("data.empty_prompts=0.1", "method.target_decay=0.95"),
    "kd": ("method.k=49",),
    "mcm": ("method.k=2",),
    "pcm": ("method.k=2",),
    "shortcut": ("method.k=49",),
    "smd": ("method.k=1",),
    "tdm": ("method.k=1",),
    "tscd": (f"stages=[{TSCD_STAGES}]",),
}
"""Recipe -> its changes to the shared settings.

The shared k skips a fifth of the path, here a fifth of a segment. KD and shortcut models draw k from all lengths. A
target of decay .999 would not move in runs this short. Recipes without guidance train on the empty prompt too, so that
they can be sampled with guidance.
"""
SAMPLERS: Mapping[str, Mapping[str, object]] = {
    "SSS, gamma 0": {"gamma": 0.0},
    "SSS, gamma .3": {"gamma": 0.3},
    "SSS, gamma 1": {"gamma": 1.0},
    "SSS, gamma .3 in noise (CTM's rule)": {"gamma": 0.3, "gamma_law": "noise"},
    "SSS of second order, gamma 0": {"gamma": 0.0, "jump": "second_order"},
    "SSS of second order, gamma .3": {"gamma": 0.3, "jump": "second_order"},
    "multistep consistency": {"sampler": "lcm", "jump": "first_order"},
    "DDIM": {"sampler": "ddim"},
    "Euler": {"sampler": "euler"},
    "DPM-Solver++(2S)": {"sampler": "dpmpp_2s"},
    "SDE-DPM-Solver++(2M)": {"sampler": "sde_dpmpp_2m"},
}
"""Samplers of one TCF(1) student (TCD, section 4.3)."""


def trajectory_cost(config: DistillConfig) -> int:
    """Return the network evaluations of one stored trajectory: a solver step at each grid point, guided or not."""
    method = config.method
    return method.points * CALLS[method.solver] * method.guidance.branches


@dataclass(frozen=True)
class Share:
    """A recipe's use of the budget.

    Attributes:
        config: of the distillation.
        changes: its changes to the shared settings, as overrides.
        evaluations: network evaluations of the training, at most the budget.
    """

    config: DistillConfig
    changes: tuple[str, ...]
    evaluations: int

    def command(self, recipe: str, place: Path) -> str:
        """Return the command that distils the same student."""
        words = ["fewstep", "distill", "--recipe", recipe, "--config", "world/distill.yaml", "--out", str(place)]
        return shlex.join([*words, *(word for change in self.changes for word in ("-s", change))])


def share_of_budget(config: FamilyConfig, recipe: str) -> Share:
    """Return as many steps as the budget pays for; half of KD's budget pays for its trajectories.

    Raises:
        UserError: the budget pays for no step.
    """
    plain = student_config(recipe, CHANGES.get(recipe, ()))
    own, left = list(CHANGES.get(recipe, ())), config.evaluations
    if plain.method.start == "trajectory":
        count = max(1, config.evaluations // 2 // trajectory_cost(plain))
        own.append(f"data.trajectories={count}")
        left -= count * trajectory_cost(plain)
    a_step = step_cost(plain.method) * config.batch
    steps = int(left // a_step)
    if steps < 1:
        raise UserError(
            f"evaluations = {config.evaluations} does not pay for a step of {recipe}; "
            f"give at least {config.evaluations - left + math.ceil(a_step)}"
        )
    own += [f"loop.steps={steps}", f"loop.batch={config.batch}", f"loop.seed={config.seed}", f"optim.lr={config.lr}"]
    own.append("loop.validate_every=null")  # finished students are measured
    return Share(student_config(recipe, own), tuple(own), round(config.evaluations - left + steps * a_step))


def recipe_entries(recipe: str, student: Path, omega: float, seed: int) -> list[Entry]:
    """Return a student under its recipe's sampler; one trained without guidance is also sampled with it."""
    config = resolve(recipe)
    entries = student_entries(recipe, student, config.sampling, STEPS, seed)
    if config.method.guidance.convention == "none":
        guided = config.sampling.model_copy(update={"omega": omega})
        entries += student_entries(f"{recipe}, guided", student, guided, STEPS, seed)
    return entries


def sampler_entries(student: Path, seed: int) -> list[Entry]:
    """Return one TCF(1) student under every sampler of the family."""
    own = resolve("tcd").sampling.model_dump()
    return [
        entry
        for name, changes in SAMPLERS.items()
        for entry in entries_at(
            SAMPLER_STEPS, Entry(name, validate(Sampling, own | dict(changes) | {"steps": 4}), student, seed)
        )
    ]


def family(config: FamilyConfig, out: Path) -> Path:
    """Distil, sample and measure; write results.json and tables.md, and return the tables' path."""
    shares = {recipe: share_of_budget(config, recipe) for recipe in config.chosen}
    prompts = world().read_prompts("benchmark")[: config.prompts]
    comparison = Comparison(prompts, out, config.seed)
    omega = students_omega()
    teacher = teacher_entry(omega, TEACHER_STEPS, config.seed)
    rows: list[Row] = []
    for recipe, share in shares.items():
        student = distill(share.config, out / recipe, cache=out / "cache", shared=shared_cache(out))
        entries = recipe_entries(recipe, student, omega, config.seed)
        rows += comparison.measure_all(teacher, entries)[bool(rows) :]  # the teacher's row comes once
        if recipe == "tcd":
            by_sampler = comparison.measure_all(teacher, sampler_entries(student, config.seed))
    results = comparison.results(
        "The family on the bundled world",
        rows,
        shlex.join(["fewstep", "family", "--out", str(out), *override_words(config)]),
        {
            "seed": str(config.seed),
            "training": f"{config.evaluations} network evaluations a student, batch {config.batch}, lr {config.lr:g}",
        },
        [WIDER_SKIP],
    )
    save_results(out / "results.json", results)
    text = [settings_table(results.settings), tables(results, STEPS)]
    if "tcd" in shares:
        samplers = Results(title="Samplers of one TCF(1) student", rows=tuple(by_sampler), real=results.real)
        save_results(out / "samplers.json", samplers)
        text += [f"## {samplers.title}\n", tables(samplers, SAMPLER_STEPS)]
    text += ["## Commands\n", commands(shares, out)]
    write_text(out / "tables.md", "\n".join(text))
    return out / "tables.md"


def commands(shares: Mapping[str, Share], out: Path) -> str:
    """Return what each student cost and the command that trains it, as Markdown."""
    costs = [
        (recipe, f"{share.config.loop.steps}", f"{step_cost(share.config.method):g}", f"{share.evaluations}")
        for recipe, share in shares.items()
    ]
    lines = [markdown(["recipe", "steps", "evaluations a sample", "evaluations in all"], costs).rstrip()]
    lines += ["", "```sh"]
    lines += [share.command(recipe, out / recipe) for recipe, share in shares.items()]
    return "\n".join([*lines, "```"]) + "\n"
