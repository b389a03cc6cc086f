"""The YAML file that `fewstep init` writes, with its commands in comments."""

from __future__ import annotations

import shlex
from typing import NamedTuple

from fewstep.distillation.presets import BATCH, GIB, SYNTHESIZED_AT_ONCE, Model, Plan, drawing, phases


class Names(NamedTuple):
    """The names that a preset's file refers to.

    Attributes:
        model: the model's own, as `fewstep init` takes it.
        teacher: folder, file or hub id of the checkpoint.
        data: folder of pictures, or file of prompts.
        file: the preset's file.
    """

    model: str
    teacher: str
    data: str
    file: str

    @property
    def run(self) -> str:
        """Run folder of its commands."""
        return f"runs/{self.model}"

    @property
    def drawn(self) -> str:
        """Folder of the set that the teacher draws."""
        return f"runs/{self.model}-set"


def commands(model: Model, plan: Plan, names: Names, memory: int) -> list[str]:
    """Return the command lines of a preset's run, in order; `sample` where it fits on the same GPU."""
    teacher, omega = shlex.quote(names.teacher), sum(model.guidance) / 2 if model.embedded else 7.0
    draw = (
        f"fewstep synthesize --prompt-file {shlex.quote(names.data)} --out {names.drawn} --teacher {teacher} "
        f"-s precision=bf16 -s batch={SYNTHESIZED_AT_ONCE} -s guidance.low={omega:g} -s guidance.high={omega:g}"
    )
    distill = f"fewstep distill --config {shlex.quote(names.file)} --out {names.run}"
    sample = f'fewstep sample "an octopus" --lora {names.run}/student --teacher {teacher} --precision bf16'
    return [
        *([draw] if plan.source == "set" else []),
        f"{distill} --dry-run",
        distill,
        *([sample] if drawing(model) * GIB <= memory * 1e9 else []),
    ]


def preset_yaml(model: Model, plan: Plan, names: Names, memory: int) -> str:
    """Return the text of a preset's file."""
    held = phases(model, plan)
    parts = ", ".join(f"{name} {size:.1f}" for name, size in held.items())
    low, high = model.guidance
    source = {
        "pictures": (names.data, "folder of captioned pictures, or webdataset shards"),
        "set": (names.drawn, "what `fewstep synthesize` draws from the prompts; 2,000 or more"),
        "rollout": (names.data, "prompts, one a line; 2,000 or more"),
    }[plan.source]
    steps = commands(model, plan, names, memory)
    rollout = ["  start: rollout  # each sample starts on up to 8 of the teacher's steps from noise"]
    offload = f"  offload: true  # blocks of the frozen network in main memory, {2 * model.weights / 1e9:.0f} GB"
    elsewhere = [
        f"# The LoRA is in {names.run}/student. Draw with it in ComfyUI, or in diffusers with offloading:",
        f"# `fewstep sample` holds {drawing(model):.0f} GiB, the encoders among them.",
    ]
    lines = [
        f"# {model.name} to a LoRA for 4 steps (TCD), on a GPU of {memory} GB. Memory of each phase on paper, of",
        f"# {memory * 1e9 / GIB:.1f} GiB: {parts}.",
        *(f"#   {line}" for line in steps),
        *([] if "fewstep sample" in steps[-1] else elsewhere),
        "# The dry run counts memory and times a step on your machine; a stopped run resumes with the same command.",
        "recipe: tcd",
        f"teacher: {_quoted(names.teacher)}  # diffusers folder, single file or hub id, trained at {model.size} pixels",
        "method:",
        f"  guidance: {{low: {low:g}, high: {high:g}}}  # omega, diffusers' guidance_scale less 1; the mean is learned",
        *(rollout if plan.source == "rollout" else []),
        "student:",
        f"  rank: {plan.rank}",
        f"  base: {plan.base}",
        f"  checkpointing: {str(plan.checkpointing).lower()}  # true saves memory and takes a quarter more time",
        *([offload] if plan.offload else []),
        "data:",
        f"  source: {_quoted(source[0])}  # {source[1]}",
        f"  encoder_precision: {plan.encoder_precision}",
        "loop:",
        "  steps: 3000",
        f"  batch: {BATCH}",
        f"  accumulate: {BATCH // plan.micro_batch}  # micro-batches of {plan.micro_batch}",
        "  precision: bf16",
        f"  validate_every: {500 if plan.validates else 'null  # its pictures would not fit'}",
        "optim: {lr: 1.0e-4, warmup: 100}",
        "sampling: {steps: 4}",
        *(["validation: {count: 32}"] if plan.validates else []),
    ]
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    """Return a text as a YAML scalar."""
    return "'" + text.replace("'", "''") + "'"
