"""`fewstep world tlcm`: the TLCM paper's three tables on the bundled world, each by one command.

Table 1: TLCM at 2 to 8 calls beside the teacher at 25, LCM and TCD. Table 2: each ingredient added in turn. Table 3:
the teacher's steps p of the second stage. A student's stages are whole students of their own, from which the variants
start: what two rows share is trained once. A stopped run is resumed.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.common.config import merge, validate
from fewstep.common.defaults import world
from fewstep.common.device import pick_device
from fewstep.common.files import write_text
from fewstep.diffusion.config import Sampling
from fewstep.diffusion.grid import inference_times
from fewstep.diffusion.schedule import scaled_linear
from fewstep.distillation.config import DistillConfig, resolve
from fewstep.distillation.distill import distill, shared_cache
from fewstep.distillation.stages import slug
from fewstep.methods.cost import step_cost
from fewstep.training.run_folder import check_same_run
from fewstep_worlds.common.tables import markdown
from fewstep_worlds.report.claims import COMPLEXITY
from fewstep_worlds.report.frame import tidy
from fewstep_worlds.report.results import Row, save_results
from fewstep_worlds.report.tables import Place, gains, tables
from fewstep_worlds.studies.comparison import (
    Comparison,
    Entry,
    solver_entries,
    student_entries,
    teacher_entry,
)
from fewstep_worlds.studies.preference import Preference
from fewstep_worlds.studies.settings import TlcmConfig
from fewstep_worlds.studies.students import METHODS, override_words, settings_table, student_config

RATES = {"lcm": 3e-4, "tcd": 1e-3}
"""The learning rates that the benchmark chose for them on a validation list."""
FINAL = "TLCM"


@dataclass(frozen=True)
class Variant:
    """A student made from another one by a single stage.

    Attributes:
        label: in tables.
        stage: of the whole run, which it changes.
        start: label of the student that it starts from; empty for the teacher.
        changes: to the stage's method.
    """

    label: str
    stage: str
    start: str = ""
    changes: Mapping[str, Any] = field(default_factory=dict)


JOINED = "+ improved LCD"
STAGES = {
    "MLCD, multistep z": "segments",
    JOINED: "joined",
    "+ preference": "preference",
    "+ adversarial (TLCM)": "matching",
}
"""Rows of Table 2 that are a stage's end of the whole run, from the first stage to the last."""
SINGLE = {"rollout": 1}
PLAIN = {"distance": "l2"}
WITHOUT_CRITIC = {"adversarial": {"weight": 0.0}}
CONTROL = "+ preference, trained on"
"""The start of `+ matching`, trained for as many further updates without matching."""
VARIANTS = (
    Variant("LCD, single-step z", "segments", changes={**SINGLE, **PLAIN, "segments": 1}),
    Variant("MLCD, single-step z", "segments", changes={**SINGLE, **PLAIN}),
    Variant("+ perceptual distance", "segments", changes=SINGLE),
    Variant("+ LCD over all times", "joined", "MLCD, multistep z", {"grid": 1000, "k": 125}),
    Variant("+ matching", "matching", "+ preference", WITHOUT_CRITIC),
    Variant(CONTROL, "matching", "+ preference", {"consistency": 1.0, "matching": {"weight": 0.0}, **WITHOUT_CRITIC}),
    Variant("TLCM without preference", "matching", JOINED, {"reward": {"weight": 0.0}}),
)
LADDER = (
    "LCD, single-step z",
    "MLCD, single-step z",
    "+ perceptual distance",
    "MLCD, multistep z",
    "+ LCD over all times",
    JOINED,
    "+ preference",
    "+ matching",
    "+ adversarial (TLCM)",
)
"""Table 2's rows. Each adds to the row above, except that `+ improved LCD` replaces `+ LCD over all times`."""


SEGMENTED = ("MLCD, single-step z", "+ perceptual distance", "MLCD, multistep z")
"""Rows of Table 2 whose students jump within segments. They are also sampled without noise."""


def teacher_steps_variant(p: int) -> Variant:
    """Return Table 3's row of p teacher steps."""
    return Variant(f"p = {p}", "joined", "MLCD, multistep z", {"substeps": p})


@dataclass(frozen=True)
class Students:
    """The students of one seed, trained when they are needed."""

    settings: DistillConfig
    seed: int
    out: Path

    @property
    def config(self) -> DistillConfig:
        """Settings of the whole run of this seed."""
        loop = self.settings.loop.model_copy(update={"seed": self.seed})
        return self.settings.model_copy(update={"loop": loop})

    def whole(self) -> Path:
        """Return the finished run folder of all stages."""
        return self.finished(self.config, self.out / "tlcm")

    def finished(self, config: DistillConfig, folder: Path) -> Path:
        """Return the folder of a finished run; an unfinished one is resumed.

        Raises:
            UserError: it holds another run.
        """
        check_same_run(folder, config)
        if not (folder / "student").is_dir():
            distill(config, folder, cache=self.out.parent / "cache", shared=shared_cache(self.out.parent))
        return folder

    def stage(self, name: str) -> DistillConfig:
        """Return a stage's own config, with the sampling of the whole run."""
        names = [stage.name for stage in self.config.stages]
        own = self.config.each_stage()[names.index(name)]
        return own.model_copy(update={"sampling": self.config.sampling})

    def student(self, label: str) -> Path:
        """Return a row's student, training it if necessary."""
        if label == FINAL:
            return self.whole() / "student"
        own = self.stage(STAGES[JOINED]).method.substeps
        label = JOINED if label == f"p = {own}" else label  # the recipe's own p is a stage of the whole run
        if label in STAGES:
            names = [stage.name for stage in self.config.stages]
            number = names.index(STAGES[label]) + 1
            return self.whole() / "stages" / slug(number, STAGES[label]) / "student"
        if label in RATES:
            return self.baseline(label)
        steps = label.removeprefix("p = ")
        candidates = (teacher_steps_variant(int(steps)),) if steps != label else VARIANTS
        variant = next(variant for variant in candidates if variant.label == label)
        config = self.stage(variant.stage)
        student = config.student.model_copy(update={"start": str(self.student(variant.start)) if variant.start else ""})
        words = merge(config.model_copy(update={"student": student}).model_dump(), {"method": dict(variant.changes)})
        changed = validate(DistillConfig, words)
        updates = config.loop.steps // config.method.student_every  # the same number for the student at every interval
        loop = changed.loop.model_copy(update={"steps": updates * changed.method.student_every})
        return self.finished(changed.model_copy(update={"loop": loop}), self.out / slug(0, label)) / "student"

    @property
    def evaluations(self) -> float:
        """Network evaluations of the whole run, a backward pass counted as two."""
        return sum(stage.loop.steps * stage.loop.batch * step_cost(stage.method) for stage in self.config.each_stage())

    def baseline(self, recipe: str) -> Path:
        """Train LCM or TCD on pictures, for as many network evaluations as TLCM takes."""
        usual = student_config(recipe)
        steps = math.floor(self.evaluations / (step_cost(usual.method) * usual.loop.batch))
        changes = [
            f"loop.steps={steps}",
            f"loop.seed={self.seed}",
            f"optim.lr={RATES[recipe]}",
            "loop.validate_every=null",
        ]
        return self.finished(student_config(recipe, changes), self.out / recipe) / "student"


def tlcm_settings() -> DistillConfig:
    """Return TLCM's settings on the bundled world, without validation: finished students are measured."""
    return resolve("tlcm", world().root() / "tlcm.yaml", ["loop.validate_every=null"])


def times_of(sampling: Sampling, steps: int) -> Tensor:
    """Return the times of so many calls."""
    return inference_times(scaled_linear(), steps, grid=sampling.grid, spacing=sampling.spacing)


def entries_of(config: TlcmConfig, table: int, students: Students) -> list[Entry]:
    """Return the rows of a table at one seed."""
    own = students.config.sampling
    if table == 1:
        entries = student_entries(FINAL, students.student(FINAL), own, config.steps, students.seed)
        entries += student_entries(
            "TLCM without preference", students.student("TLCM without preference"), own, config.steps, students.seed
        )
        lists = own.model_copy(update={"spacing": "tlcm"})
        apart = [steps for steps in config.steps if not torch.equal(times_of(own, steps), times_of(lists, steps))]
        entries += student_entries("TLCM, the paper's times", students.student(FINAL), lists, apart, students.seed)
        for recipe, name in METHODS.items():
            sampling = resolve(recipe).sampling
            entries += student_entries(name, students.student(recipe), sampling, [4], students.seed)
        # alternatives at the same cost: TCD at TLCM's own gamma, and the teacher in as few steps
        stochastic = resolve("tcd").sampling.model_copy(update={"gamma": own.gamma})
        entries += student_entries(f"TCD, gamma {own.gamma:g}", students.student("tcd"), stochastic, [4], students.seed)
        return entries + solver_entries(
            students.settings.method.guidance.mean_omega, [3, 4], students.seed, {"ddim": "DDIM"}
        )
    labels = (*LADDER, CONTROL) if table == 2 else [f"p = {p}" for p in config.p]
    entries = [
        entry for label in labels for entry in student_entries(label, students.student(label), own, [4], students.seed)
    ]
    if table == 2:  # jumps to a segment's edge were not trained with added noise
        plain = own.model_copy(update={"gamma": 0.0})
        for label in SEGMENTED:
            entries += student_entries(f"{label}, gamma 0", students.student(label), plain, [4], students.seed)
    return entries


def compared(config: TlcmConfig, gamma: float) -> list[tuple[Place, Place]]:
    """Return the pairs of rows whose difference a table shows."""
    if config.table == 3:
        return [((f"p = {p}", 4), (f"p = {before}", 4)) for before, p in pairwise(config.p)]
    if config.table == 2:
        segments, everywhere = "MLCD, multistep z", "+ LCD over all times"
        under = {JOINED: [segments, everywhere], "+ matching": ["+ preference", CONTROL]}
        steps = {after: under.get(after, [before]) for before, after in pairwise(LADDER)}
        return [((after, 4), (before, 4)) for after, below in steps.items() for before in below]
    others: list[Place] = [("teacher", config.teacher_steps), ("LCM", 4), ("TCD", 4)]
    beside: list[Place] = [*others, (f"TCD, gamma {gamma:g}", 4), ("DDIM", 4)]
    found: list[tuple[Place, Place]] = []
    for steps_ in (3, 4):
        own: list[Place] = [("TLCM, the paper's times", steps_), ("TLCM without preference", steps_)]
        found += [((FINAL, steps_), other) for other in (*beside, *own)]
        found += [(("TLCM without preference", steps_), other) for other in others[:2]]
    return found


def tlcm(config: TlcmConfig, out: Path) -> Path:
    """Train, sample and measure a table; write it, and return its path."""
    settings = tlcm_settings()
    prompts = world().read_prompts("benchmark")[: config.prompts]
    comparison = Comparison(prompts, out, others=[Preference(world().load_scorer(pick_device("auto")))])
    omega = settings.method.guidance.mean_omega
    rows: list[Row] = []
    for seed in config.seeds:
        students = Students(settings, seed, out / f"seed-{seed}")
        teacher = teacher_entry(omega, config.teacher_steps, seed)
        entries = entries_of(config, config.table, students)
        diverse = [teacher, *(entry for entry in entries if entry.sampling.steps in (3, 4))]
        rows += comparison.measure_all(teacher, entries, diverse)
    words = override_words(config, skip=["table"])
    results = comparison.results(
        f"TLCM's Table {config.table} on the bundled world",
        rows,
        shlex.join(["fewstep", "tlcm", "--table", str(config.table), "--out", str(out), *words]),
        {
            "seeds": ", ".join(map(str, config.seeds)),
            "training": f"{students.evaluations:.0f} network evaluations a whole student, no picture; LCM and TCD as "
            "many, from pictures",
            "teacher": f"{config.teacher_steps} steps of guided DDIM, omega {omega:g}",
        },
    )
    name = f"table-{config.table}"
    save_results(out / f"{name}.json", results)
    steps = config.steps if config.table == 1 else (4,)
    scored = results.of("prompt")
    differences = gains(tidy(results, "steps"), compared(config, settings.sampling.gamma), scored)
    head = ["prompt by prompt, 95 % intervals over prompts (by seed)", *differences.columns]
    text = [
        settings_table(results.settings),
        tables(results, steps, [*scored, *results.of("quality", "real"), COMPLEXITY]),  # the paper's columns
        markdown(head, differences.itertuples(name=None), len(head)),
    ]
    write_text(out / f"{name}.md", "\n".join(text))
    return out / f"{name}.md"
