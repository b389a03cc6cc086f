"""`fewstep tlcm`: the TLCM paper's three tables on the bundled world, each by one command.

Table 1: TLCM at 2 to 8 calls beside the teacher at 25, LCM and TCD. Table 2: each ingredient added in turn. Table 3:
the teacher's steps p of the second stage. A student's stages are whole students of their own, from which the variants
start: what two rows share is trained once. Everything that was made is kept.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.backbones.teachers import teacher_path
from fewstep.common.config import merge, validate
from fewstep.common.files import atomic_write
from fewstep.common.provenance import hardware
from fewstep.diffusion.config import Sampling
from fewstep.diffusion.grid import inference_times
from fewstep.diffusion.schedule import scaled_linear
from fewstep.distillation.config import DistillConfig, resolve
from fewstep.distillation.distill import distill, shared_cache
from fewstep.distillation.stages import slug
from fewstep.methods.cost import step_cost
from fewstep.training.run_folder import check_same_run
from fewstep_worlds.common.location import root
from fewstep_worlds.emoji8 import dataset as emoji8
from fewstep_worlds.emoji8.config import OpinionConfig, TlcmConfig
from fewstep_worlds.emoji8.report.results import Results, Row, save_results
from fewstep_worlds.emoji8.report.tables import Place, gains, table1, table_blocks
from fewstep_worlds.emoji8.scorers.second_scorer import second_opinion
from fewstep_worlds.emoji8.scorers.text import BertStates
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
from fewstep_worlds.emoji8.studies.family import settings_table
from fewstep_worlds.emoji8.studies.students import METHODS, student_config

RATES = {"lcm": 3e-4, "tcd": 1e-3}
"""The learning rates that the benchmark chose for them on a validation list."""
FINAL = "TLCM"
FIRST_COLUMNS = ("agreement", "preference", "FD-Lite0", "KID-Lite0", "detail: edges")
"""What the paper's tables show, in our measures."""


@dataclass(frozen=True)
class Variant:
    """A student made from another one by a single stage.

    Attributes:
        label: in tables.
        stage: of the law, which it changes.
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
"""What `+ matching` starts from, with as many further updates of the student but by its own losses, and no matching."""
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
"""Table 2's rows; each stands on the one above but that `+ improved LCD` takes the place of `+ LCD over all times`."""


SEGMENTED = ("MLCD, single-step z", "+ perceptual distance", "MLCD, multistep z")
"""Rows of Table 2 whose students jump within segments: they are drawn without noise, too."""


def teacher_steps_variant(p: int) -> Variant:
    """Table 3's row of p teacher steps."""
    return Variant(f"p = {p}", "joined", "MLCD, multistep z", {"substeps": p})


@dataclass(frozen=True)
class Workshop:
    """The students of one seed, made when they are asked for."""

    law: DistillConfig
    seed: int
    out: Path

    @property
    def config(self) -> DistillConfig:
        """The whole run of this seed."""
        loop = self.law.loop.model_copy(update={"seed": self.seed})
        return self.law.model_copy(update={"loop": loop})

    def whole(self) -> Path:
        """The run folder of all stages, finished."""
        return self.finished(self.config, self.out / "tlcm")

    def finished(self, config: DistillConfig, folder: Path) -> Path:
        """The folder of a run, which is gone on with if it is not done yet; a finished one is not laid out again.

        Raises:
            UserError: it holds another run.
        """
        check_same_run(folder, config)
        if not (folder / "student").is_dir():
            distill(config, folder, cache=self.out.parent / "cache", shared=shared_cache(self.out.parent))
        return folder

    def stage(self, name: str) -> DistillConfig:
        """A stage's own config, sampled as the finished student."""
        names = [stage.name for stage in self.config.stages]
        own = self.config.each_stage()[names.index(name)]
        return own.model_copy(update={"sampling": self.config.sampling})

    def student(self, label: str) -> Path:
        """A row's student, trained if it is not there yet."""
        if label == FINAL:
            return self.whole() / "student"
        own = self.stage(STAGES[JOINED]).method.substeps
        label = JOINED if label == f"p = {own}" else label  # the law's own p is a stage of the whole run
        if label in STAGES:
            names = [stage.name for stage in self.config.stages]
            number = names.index(STAGES[label]) + 1
            return self.whole() / "stages" / slug(number, STAGES[label]) / "student"
        if label in RATES:
            return self.baseline(label)
        steps = label.removeprefix("p = ")
        asked = (teacher_steps_variant(int(steps)),) if steps != label else VARIANTS
        variant = next(variant for variant in asked if variant.label == label)
        config = self.stage(variant.stage)
        student = config.student.model_copy(update={"start": str(self.student(variant.start)) if variant.start else ""})
        words = merge(config.model_copy(update={"student": student}).model_dump(), {"method": dict(variant.changes)})
        changed = validate(DistillConfig, words)
        updates = config.loop.steps // config.method.student_every  # as many for the student, whatever its rhythm
        loop = changed.loop.model_copy(update={"steps": updates * changed.method.student_every})
        return self.finished(changed.model_copy(update={"loop": loop}), self.out / slug(0, label)) / "student"

    @property
    def evaluations(self) -> float:
        """Network evaluations of the whole run, a backward pass counted as two more."""
        return sum(stage.loop.steps * stage.loop.batch * step_cost(stage.method) for stage in self.config.each_stage())

    def baseline(self, recipe: str) -> Path:
        """LCM or TCD from pictures, for as many network evaluations as TLCM takes."""
        usual = student_config(recipe)
        steps = math.floor(self.evaluations / (step_cost(usual.method) * usual.loop.batch))
        changes = [
            f"loop.steps={steps}",
            f"loop.seed={self.seed}",
            f"optim.lr={RATES[recipe]}",
            "loop.validate_every=null",
        ]
        return self.finished(student_config(recipe, changes), self.out / recipe) / "student"


def law_of() -> DistillConfig:
    """TLCM under the bundled world's law, unwatched: its students are measured when they are done."""
    return resolve("tlcm", root() / "tlcm.yaml", ["loop.validate_every=null"])


def times_of(sampling: Sampling, steps: int) -> Tensor:
    """The times of so many calls."""
    return inference_times(scaled_linear(), steps, grid=sampling.grid, spacing=sampling.spacing)


def entries_of(config: TlcmConfig, table: int, shop: Workshop) -> list[Entry]:
    """What a table draws with, at one seed."""
    own = shop.config.sampling
    if table == 1:
        entries = student_entries(FINAL, shop.student(FINAL), own, config.steps, shop.seed)
        entries += student_entries(
            "TLCM without preference", shop.student("TLCM without preference"), own, config.steps, shop.seed
        )
        lists = own.model_copy(update={"spacing": "tlcm"})
        apart = [steps for steps in config.steps if not torch.equal(times_of(own, steps), times_of(lists, steps))]
        entries += student_entries("TLCM, the paper's times", shop.student(FINAL), lists, apart, shop.seed)
        for recipe, name in METHODS.items():
            sampling = resolve(recipe).sampling
            entries += student_entries(name, shop.student(recipe), sampling, [4], shop.seed)
        # at TLCM's own stochasticity, and the teacher in as few steps: what else could be drawn at that price
        stochastic = resolve("tcd").sampling.model_copy(update={"gamma": own.gamma})
        entries += student_entries(f"TCD, gamma {own.gamma:g}", shop.student("tcd"), stochastic, [4], shop.seed)
        return entries + solver_entries(shop.law.method.guidance.mean_omega, [3, 4], shop.seed, {"ddim": "DDIM"})
    labels = (*LADDER, CONTROL) if table == 2 else [f"p = {p}" for p in config.p]
    entries = [entry for label in labels for entry in student_entries(label, shop.student(label), own, [4], shop.seed)]
    if table == 2:  # jumps to a segment's edge were never trained to be noised again
        plain = own.model_copy(update={"gamma": 0.0})
        for label in SEGMENTED:
            entries += student_entries(f"{label}, gamma 0", shop.student(label), plain, [4], shop.seed)
    return entries


def compared(config: TlcmConfig, gamma: float) -> list[tuple[Place, Place]]:
    """Whose gain over whom a table is about."""
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


def changes(config: TlcmConfig) -> list[str]:
    """What a config changes in the defaults besides the table, as words of the command."""
    given, usual = config.model_dump(mode="json"), TlcmConfig().model_dump(mode="json")
    changed = {name: value for name, value in given.items() if value != usual[name] and name != "table"}
    return [word for name, value in changed.items() for word in ("-s", f"{name}={value}")]


def tlcm(config: TlcmConfig, out: Path) -> Path:
    """Train, draw and measure what the asked table needs; write it, and return its path."""
    law = law_of()
    prompts = emoji8.read_prompts("benchmark")[: config.prompts]
    bench = Bench.load(out / "features")
    opinion = second_opinion(OpinionConfig(), bench.features, BertStates(root() / "teacher"), out / "opinion")
    bench = replace(bench, others=(opinion,))
    studio = Studio(teacher_path(""), prompts, out / "pictures")
    omega = law.method.guidance.mean_omega
    judge = Judge(prompts, bench)
    rows: list[Row] = []
    for seed in config.seeds:
        shop = Workshop(law, seed, out / f"seed-{seed}")
        teacher = teacher_entry(omega, config.teacher_steps, seed)
        entries = entries_of(config, config.table, shop)
        diverse = [teacher, *(entry for entry in entries if entry.sampling.steps in (3, 4))]
        rows += contest(studio, judge, teacher, entries, diverse)
    made = Results(
        title=f"TLCM's Table {config.table} on the bundled world",
        rows=tuple(rows),
        real=judge.real(),
        prompts=tuple(prompts),
        settings={
            "command": shlex.join(
                ["fewstep", "tlcm", "--table", str(config.table), "--out", str(out), *changes(config)]
            ),
            "commit": ", ".join(sorted({row.commit for row in rows})),
            "hardware": hardware(),
            "prompts": f"{len(prompts)} open prompts (no style: several right pictures each)",
            "seeds": ", ".join(map(str, config.seeds)),
            "training": f"{shop.evaluations:.0f} network evaluations a whole student, no picture; LCM and TCD as many, "
            "from pictures",
            "teacher": f"{config.teacher_steps} steps of guided DDIM, omega {omega:g}",
            "precision": f"networks in {str(studio.precision).removeprefix('torch.')}, all alike",
        },
    )
    name = f"table-{config.table}"
    save_results(out / f"{name}.json", made)
    steps = config.steps if config.table == 1 else (4,)
    chosen = [metric for metric in FIRST_COLUMNS if metric in made.metrics]
    text = [settings_table(made.settings), *(table1(made, names, steps) for names in table_blocks(made, chosen))]
    text.append(gains(made, compared(config, law.sampling.gamma), ("agreement", "preference")))
    with atomic_write(out / f"{name}.md") as part:
        part.write_text("\n".join(text), encoding="utf-8")
    return out / f"{name}.md"
