"""Every setting of a distillation. Light: it is read, and refused, before torch is imported."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from fewstep.config import Config, merge, parse_overrides, read_yaml, validate
from fewstep.names import (
    CALLS,
    Convention,
    DeviceName,
    DistanceName,
    End,
    Jump,
    Precision,
    SamplerName,
    SLaw,
    SolverName,
    Spacing,
    Target,
    omega_of,
)
from fewstep.recipes import read_recipe


class Sampling(Config):
    """How pictures are drawn. The same record stands in a recipe, a run's config and an exported file."""

    sampler: SamplerName = Field("sss", description="sss (TCD), lcm (multistep consistency), ddim, euler, dpmpp_2s")
    steps: int = Field(
        4,
        ge=1,
        description="network calls a picture; a guided one counts once, and dpmpp_2s saves its last where end = clean",
    )
    gamma: float = Field(0.3, ge=0, le=1, description="stochasticity of sss: 0 deterministic, 1 full re-noising")
    omega: float = Field(0.0, ge=0, description="guidance, (1 + omega) eps(c) - omega eps(null); 0 for a student")
    grid: int = Field(50, ge=1, description="points of the training grid that times are taken from")
    spacing: Spacing = Field("grid", description="grid (LCM's and TCD's rule) or trailing")
    end: End = Field("index0", description="end point: clean or index0; lcm always ends on clean data")

    @model_validator(mode="after")
    def _countable(self) -> Self:
        calls = CALLS[self.sampler]
        most = self.grid * calls
        if self.spacing == "grid" and self.steps > most:
            raise ValueError(
                f"steps = {self.steps} is out of range for grid = {self.grid}; the nearest legal one is {most}"
            )
        if self.steps % calls:
            raise ValueError(
                f"steps = {self.steps} network calls cannot be split into {self.sampler} steps of {calls}; "
                f"the nearest legal one is {self.steps + 1}"
            )
        return self


TEACHER_SAMPLING = Sampling(sampler="ddim", steps=50, omega=7.0, spacing="trailing", end="clean")
"""How a teacher is sampled where nothing else is said."""


class Guidance(Config):
    """The guidance of the teacher's step: scale ~ U[low, high], one draw a sample."""

    convention: Convention = Field("lcm", description="what the numbers mean: lcm (omega) or imagen (1 + omega)")
    low: float = Field(2.0, description="smallest scale")
    high: float = Field(14.0, description="largest scale")

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.high < self.low:
            raise ValueError(f"high = {self.high:g} is below low; the nearest legal one is {self.low:g}")
        return self

    @property
    def omegas(self) -> tuple[float, float]:
        """The range in the papers' convention."""
        return omega_of(self.low, self.convention), omega_of(self.high, self.convention)

    @property
    def mean_omega(self) -> float:
        """The guidance that a student which is not told omega learns, on average."""
        return sum(self.omegas) / 2


class ConsistencyConfig(Config):
    """One row of the table of methods."""

    grid: int = Field(50, ge=2, description="N, points of the training grid")
    k: int = Field(1, ge=1, description="skip between t_{n+k} and t_n, in grid points (1 of 50 = 20 indices)")
    s: SLaw = Field("uniform", description="where jumps land: zero (the end point) or uniform in [end, t_n]")
    jump: Jump = Field("first_order", description="skip (LCM's skip connection) or first_order (TCF(1))")
    solver: SolverName = Field("ddim", description="the teacher's step from t_{n+k} to t_n")
    guidance: Guidance = Field(Guidance(), description="of the teacher's step")
    target: Target = Field("self", description="self (the student under stop-gradient) or ema")
    target_decay: float = Field(0.95, gt=0, lt=1, description="decay of the ema target")
    distance: DistanceName = Field("l2", description="l2 or huber (element-wise pseudo-Huber)")
    huber_c: float = Field(1e-3, gt=0, description="c of the pseudo-Huber distance")
    end: End = Field("index0", description="the end point: clean (sigma = 0) or index0 (sigma = .029 on SD's path)")

    @model_validator(mode="after")
    def _legal(self) -> Self:
        if self.jump == "skip" and self.s != "zero":
            raise ValueError(
                f"s = {self.s!r} with jump = 'skip', which only reaches the end; the nearest legal s is 'zero'"
            )
        if self.k >= self.grid:
            raise ValueError(f"k = {self.k} must be below grid = {self.grid}; the nearest legal one is {self.grid - 1}")
        return self

    @property
    def calls(self) -> dict[str, int]:
        """Network evaluations of one sample in one step, by role; the teacher's include the null branch."""
        return {"student": 1, "target": 1, "teacher": 2 * CALLS[self.solver]}


class StudentConfig(Config):
    """What is trained."""

    kind: Literal["lora", "full"] = Field("lora", description="lora (adapters on the frozen teacher) or full")
    rank: int = Field(64, ge=1, description="rank of the LoRA matrices")
    alpha: float | None = Field(None, gt=0, description="LoRA alpha; null for the rank, i.e. scale 1")
    targets: tuple[str, ...] | None = Field(None, description="adapted layers; null for the backbone's list")
    checkpointing: bool = Field(False, description="gradient checkpointing: less memory, one more forward")

    @property
    def lora_alpha(self) -> float:
        """LoRA's alpha; the scale is alpha / rank."""
        return self.alpha if self.alpha is not None else float(self.rank)


class DataConfig(Config):
    """What the student sees."""

    source: str = Field("emoji8", description="emoji8, or a folder of captioned pictures")
    captions: int = Field(12, ge=1, description="captions a picture, drawn once and cached")
    empty_prompts: float = Field(0.0, ge=0, le=1, description="share of samples trained with the empty prompt")


def check_batch(batch: int, accumulate: int, processes: int = 1) -> None:
    """Refuse a batch that cannot be split over micro-batches and processes.

    Raises:
        ValueError: naming the nearest legal batch.
    """
    share = accumulate * processes
    if batch % share:
        below = batch // share * share
        legal = below if below and batch - below <= share // 2 else below + share
        over = f"accumulate = {accumulate}" + (f" x {processes} processes" if processes > 1 else "")
        raise ValueError(f"batch = {batch} is not a multiple of {over}; the nearest legal one is {legal}")


class LoopConfig(Config):
    """How long, how much at a time, how often."""

    steps: int = Field(1000, ge=1, description="optimiser steps")
    batch: int = Field(32, ge=1, description="samples per optimiser step, over all processes")
    accumulate: int = Field(1, ge=1, description="micro-batches per optimiser step")
    seed: int = Field(0, ge=0, le=2**63 - 1, description="seed of every random draw")
    precision: Precision = Field(
        "fp32", description="type of the networks: fp32, bf16, fp16, or auto (bf16 where the machine is fast at it)"
    )
    log_every: int = Field(10, ge=1, description="steps between log lines")
    save_every: int = Field(500, ge=1, description="steps between checkpoints")
    keep: int = Field(2, ge=1, description="checkpoints kept")
    watch_every: int | None = Field(None, ge=1, description="steps between quality checks; null for none")

    @model_validator(mode="after")
    def _whole(self) -> Self:
        check_batch(self.batch, self.accumulate)
        return self


class OptimConfig(Config):
    """AdamW and its learning-rate law."""

    lr: float = Field(1e-4, gt=0, description="peak learning rate")
    betas: tuple[float, float] = Field((0.9, 0.999), description="AdamW's moment decays")
    weight_decay: float = Field(0.0, ge=0, description="decoupled weight decay")
    eps: float = Field(1e-8, gt=0, description="AdamW's epsilon")
    warmup: int = Field(0, ge=0, description="steps of linear warm-up")
    decay: Literal["constant", "cosine", "linear", "cooldown"] = Field(
        "constant",
        description="law after the warm-up; cooldown = constant, then linear to 0 over the last fifth",
    )
    clip: float | None = Field(1.0, gt=0, description="largest global gradient norm; null for none")
    ema: float | None = Field(None, gt=0, lt=1, description="decay of the moving average; null for none")


class WatchConfig(Config):
    """Quality checks during training, every loop.watch_every steps."""

    prompts: str = Field("", description="prompt file or bundled list; empty for the data's own")
    count: int = Field(256, ge=16, description="pictures drawn at each check")
    seed: int = Field(1234, ge=0, le=2**62, description="seed of the first picture; the others count up")
    teacher_steps: int = Field(50, ge=1, description="steps of the teacher's end points")


class DistillConfig(Config):
    """Everything that decides a distillation run."""

    recipe: str = Field("tcd", description="name of the method's recipe")
    teacher: str = Field("", description="pipeline folder; empty for the bundled teacher")
    device: DeviceName = Field("auto", description="where to train")
    method: ConsistencyConfig = Field(ConsistencyConfig(), description="the objective")
    student: StudentConfig = Field(StudentConfig(), description="what is trained")
    data: DataConfig = Field(DataConfig(), description="what it sees")
    loop: LoopConfig = Field(LoopConfig(watch_every=500), description="how long")
    optim: OptimConfig = Field(OptimConfig(), description="how fast")
    sampling: Sampling = Field(Sampling(), description="how it will be sampled; travels with the student")
    watch: WatchConfig = Field(WatchConfig(), description="how it is judged on the way")

    @model_validator(mode="after")
    def _one_grid(self) -> Self:
        """A student is only asked for what it was trained on: law 1 of the architecture."""
        method, sampling = self.method, self.sampling
        if sampling.sampler not in ("sss", "lcm"):
            return self
        if sampling.spacing != "grid":
            raise ValueError(
                f"sampling.spacing = {sampling.spacing!r} takes times that are not trained; "
                "the nearest legal one is 'grid'"
            )
        if method.grid % sampling.grid:
            raise ValueError(
                f"sampling.grid = {sampling.grid} asks for times that method.grid = {method.grid} does not train; "
                f"the nearest legal one is {method.grid}"
            )
        if sampling.sampler == "sss" and sampling.end != method.end:
            raise ValueError(
                f"sampling.end = {sampling.end!r} is not the end point that is trained; "
                f"the nearest legal one is {method.end!r}"
            )
        return self


def resolve(
    recipe: str = "tcd",
    config: str | Path | None = None,
    overrides: str | Sequence[str] = (),
    teacher: str | Path = "",
) -> DistillConfig:
    """A recipe, then a YAML file over it, then dotted overrides over both, then the teacher if one is named.

    Raises:
        UserError: unknown recipe or key, or an illegal value.
    """
    changes = parse_overrides(overrides)
    if teacher:
        changes["teacher"] = str(teacher)
    if config is not None:
        changes = merge(read_yaml(config), changes)
    recipe = str(changes.get("recipe", recipe))  # a recipe that is named there brings its method along
    data = merge({"recipe": recipe}, read_recipe(recipe))
    return validate(DistillConfig, merge(data, {**changes, "recipe": recipe}))


def teacher_path(named: str | Path) -> Path:
    """The teacher's folder: the named one, or the bundled one for ""."""
    if named:
        return Path(named)
    from fewstep.world.location import root

    return root() / "teacher"
