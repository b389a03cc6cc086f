"""Every setting of a distillation. Light: it is read, and refused, before torch is imported."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from fewstep.common.run_inputs import Content
from fewstep.common.config import Config, merge, parse_overrides, read_yaml, validate
from fewstep.training.config import LoopConfig, OptimConfig
from fewstep.methods.config import ConsistencyConfig, GridSpec
from fewstep.common.choices import CALLS, DeviceName, End, Form, GammaLaw, Jump, Kept, SamplerName, Spacing, Told
from fewstep.methods.latent_lpips.settings import PerceptualConfig
from fewstep.methods.recipes import read_recipe
from fewstep.distillation.stages import Stage, stage_configs


def as_pair(size: Any) -> Any:
    """Return a size of pictures as (width, height): 96, [96, 64] and "96x64" are understood; others as they are."""
    if isinstance(size, str):
        found = re.fullmatch(r"\s*(\d+)(?:\s*[x×,]\s*(\d+))?\s*", size)
        return (int(found[1]), int(found[2] or found[1])) if found else size
    return (size, size) if isinstance(size, int) and not isinstance(size, bool) else size


class Sampling(Config):
    """How pictures are drawn. The same record stands in a recipe, a run's config and an exported file."""

    sampler: SamplerName = Field(
        "sss", description="sss (TCD), lcm (multistep consistency), ddim, euler, heun, dpm_2, dpmpp_2s, sde_dpmpp_2m"
    )
    steps: int = Field(
        4,
        ge=1,
        description="network calls a picture; a guided one counts once, and dpmpp_2s saves its last where end = clean",
    )
    gamma: float = Field(0.3, ge=0, le=1, description="stochasticity of sss: 0 deterministic, 1 full re-noising")
    gamma_law: GammaLaw = Field("time", description="what gamma is linear in: time (TCD) or noise (CTM)")
    jump: Jump | None = Field(None, description="the student's jump; null: skip for lcm, else first_order")
    r: float = Field(0.5, gt=0, le=1, description="mid-point of a second-order jump")
    form: Form = Field("x0", description="what a second-order jump blends: x0 or eps predictions")
    told: tuple[Told, ...] = Field((), description="what the network is told beside x and t: s, w")
    w: float | None = Field(None, ge=0, description="guidance omega that a student which is told w stands for")
    omega: float = Field(0.0, ge=0, description="guidance, (1 + omega) eps(c) - omega eps(null); 0 for a student")
    grid: GridSpec = Field(50, description="training grid that times are taken from: N points, or the points")
    spacing: Spacing = Field("grid", description="grid (LCM's and TCD's rule), trailing, or tlcm (its own 2 to 8)")
    end: End = Field("index0", description="end point: clean or index0; the skip jump always ends on clean data")
    size: tuple[int, int] | None = Field(
        None, description="pixels, a side of a square or [width, height]; null for the trained size"
    )

    @field_validator("size", mode="before")
    @classmethod
    def _pair(cls, size: Any) -> Any:
        pair = as_pair(size)
        if pair is not None and not (isinstance(pair, list | tuple) and len(pair) == 2):
            raise ValueError("no size in pixels; give one side, e.g. 512, or [width, height]")
        return pair

    @model_validator(mode="after")
    def _countable(self) -> Self:
        calls = self.calls_a_step
        points = self.grid if isinstance(self.grid, int) else len(self.grid)
        if points < 1:
            raise ValueError(f"grid = {self.grid} has no points; the nearest legal one is 1")
        most = points * calls
        if self.spacing == "tlcm" and self.steps > 8 * calls:
            raise ValueError(
                f"steps = {self.steps} has no list of times in spacing = 'tlcm'; the nearest is {8 * calls}"
            )
        if self.spacing == "grid" and self.steps > most:
            raise ValueError(
                f"steps = {self.steps} is out of range for grid = {points}; the nearest legal one is {most}"
            )
        if self.steps % calls:
            raise ValueError(
                f"steps = {self.steps} network calls cannot be split into {self.sampler} steps of {calls}; "
                f"the nearest legal one is {self.steps + 1}"
            )
        if self.sampler == "sss" and self.step_jump in ("skip", "cm_skip"):
            raise ValueError(
                f"jump = {self.step_jump!r} only reaches the end point, sampler = 'sss' lands before it; "
                "the nearest legal jump is 'first_order'"
            )
        if ("w" in self.told) != (self.w is not None):
            raise ValueError(f"w = {self.w} for a network that is told {list(self.told)}; name both, or none")
        return self

    @property
    def step_jump(self) -> Jump:
        """The jump that is sampled with."""
        return self.jump or ("skip" if self.sampler == "lcm" else "first_order")

    @property
    def landing(self) -> End:
        """Where the last jump lands: LCM's own lands on clean data, whatever `end` says."""
        return "clean" if self.step_jump == "skip" else self.end

    @property
    def calls_a_step(self) -> int:
        """Network calls of one step."""
        jumps = self.sampler in ("sss", "lcm")
        return 2 if jumps and self.jump == "second_order" else CALLS[self.sampler]


TEACHER_SAMPLING = Sampling(sampler="ddim", steps=50, omega=7.0, spacing="trailing", end="clean")
"""How a teacher is sampled where nothing else is said."""


class StudentConfig(Config):
    """What is trained."""

    kind: Literal["lora", "full"] = Field("lora", description="lora (adapters on the frozen teacher) or full")
    rank: int = Field(64, ge=1, description="rank of the LoRA matrices")
    alpha: float | None = Field(None, gt=0, description="LoRA alpha; null for the rank, i.e. scale 1")
    targets: tuple[str, ...] | None = Field(None, description="adapted layers; null for the backbone's list")
    checkpointing: bool = Field(False, description="gradient checkpointing: less memory, one more forward")
    base: Kept = Field(
        "fp32", description="how frozen weights are kept: fp32, bf16, or 8bit, 4bit (their matrices, by bitsandbytes)"
    )
    teacher_precision: Literal["fp32", "bf16", "fp16"] | None = Field(
        None, description="type of the teacher's calls in a step: fp32, bf16 or fp16; null for loop.precision"
    )
    start: Annotated[str, Content("start")] = Field(
        "", description="a finished student to start from; empty for the teacher itself"
    )

    @property
    def lora_alpha(self) -> float:
        """LoRA's alpha; the scale is alpha / rank."""
        return self.alpha if self.alpha is not None else float(self.rank)


class DataConfig(Config):
    """What the student sees."""

    source: Annotated[str, Content("data")] = Field(
        "emoji8",
        description="emoji8, a folder of captioned pictures, or webdataset shards (.tar files, by paths or URLs); "
        "without pictures: captions (Emoji-8's), a prompt file, "
        "or a folder that `fewstep synthesize` wrote",
    )
    captions: int = Field(12, ge=1, description="captions a picture, drawn once and cached")
    trajectories: int = Field(2048, ge=1, description="teacher trajectories drawn and stored, where start = trajectory")
    size: int | None = Field(
        None, ge=8, description="pixels a side of what is learned, a square; null for the trained size"
    )
    buckets: bool = Field(False, description="pictures keep their aspect ratio: shapes of size x size pixels in all")
    empty_prompts: float = Field(0.0, ge=0, le=1, description="share of samples trained with the empty prompt")

    @field_validator("size", mode="before")
    @classmethod
    def _side(cls, size: Any) -> Any:
        pair = as_pair(size)
        if not isinstance(pair, list | tuple):
            return pair
        if len(pair) != 2 or pair[0] != pair[1]:
            raise ValueError("no square; give one side, and buckets = true for pictures of several shapes")
        return pair[0]


class WatchConfig(Config):
    """Quality checks during training, every loop.watch_every steps."""

    prompts: Annotated[str, Content("watched prompts")] = Field(
        "", description="prompt file or bundled list; empty for the data's own"
    )
    count: int = Field(256, ge=16, description="pictures drawn at each check")
    seed: int = Field(1234, ge=0, le=2**62, description="seed of the first picture; the others count up")
    teacher_steps: int = Field(50, ge=1, description="steps of the teacher's end points")


class LookConfig(PerceptualConfig):
    """The distance between latents that `method.distance = perceptual` looks through."""

    folder: Annotated[str, Content("perceptual distance")] = Field(
        "", description="of a finished one; empty to train one for this teacher beforehand"
    )


class DistillConfig(Config):
    """Everything that decides a distillation run."""

    recipe: str = Field("tcd", description="name of the method's recipe")
    teacher: Annotated[str, Content("teacher")] = Field(
        "", description="pipeline folder; empty for the bundled teacher"
    )
    device: DeviceName = Field("auto", description="where to train")
    method: ConsistencyConfig = Field(ConsistencyConfig(), description="the objective")
    student: StudentConfig = Field(StudentConfig(), description="what is trained")
    data: DataConfig = Field(DataConfig(), description="what it sees")
    loop: LoopConfig = Field(LoopConfig(watch_every=500), description="how long")
    optim: OptimConfig = Field(OptimConfig(), description="how fast")
    sampling: Sampling = Field(Sampling(), description="how it will be sampled; travels with the student")
    watch: WatchConfig = Field(WatchConfig(), description="how it is judged on the way")
    perceptual: LookConfig = Field(LookConfig(), description="the distance between latents, where it is asked for")
    stages: tuple[Stage, ...] = Field((), description="stages run one after another; empty for one run")

    @model_validator(mode="after")
    def _whole_stages(self) -> Self:
        """Each stage is a config of its own, refused here if it is illegal."""
        self.each_stage()
        return self

    def each_stage(self) -> list[DistillConfig]:
        """The configs of its stages; itself where it has none."""
        return stage_configs(self, self.stages, self.loop.steps) if self.stages else [self]

    @model_validator(mode="before")
    @classmethod
    def _sized(cls, data: Any) -> Any:
        """What is learned at a size is drawn at it."""
        if not isinstance(data, dict):
            return data
        seen, sampling = data.get("data"), data.get("sampling") or {}
        size = seen.get("size") if isinstance(seen, dict) else getattr(seen, "size", None)
        if size and isinstance(sampling, dict) and not sampling.get("size"):
            return {**data, "sampling": {**sampling, "size": size}}
        return data

    @model_validator(mode="after")
    def _trained_for(self) -> Self:
        check_trained(self.method, self.sampling)
        check_grown(self.method, self.loop)
        self._check_engine()
        return self

    def _check_engine(self) -> None:
        """What does not go together in how a step is computed."""
        loop = self.loop

        def refuse(wrong: bool, asked: str, beside: str, nearest: object) -> None:
            if wrong:
                raise ValueError(f"{asked} does not go with {beside}; the nearest legal one is {nearest!r}")

        narrow = self.student.base == "bf16" and loop.precision == "fp32"
        refuse(narrow, "loop.precision = 'fp32'", "student.base = 'bf16'", "bf16")
        taught = self.student.teacher_precision
        asked = f"student.teacher_precision = {taught!r}"
        refuse(self.student.base == "bf16" and taught == "fp32", asked, "student.base = 'bf16'", "bf16")
        critic = self.method.adversarial
        # what is run again in a backward pass does not have R1's attention, the one with a second derivative
        again = bool(critic.weight and critic.r1) and self.student.checkpointing
        refuse(again, "student.checkpointing = True", f"method.adversarial.r1 = {critic.r1}", False)
        if loop.shard:
            split = "loop.shard = True"
            refuse(loop.compile, "loop.compile = True", split, False)
            refuse(self.student.base != "fp32", f"student.base = {self.student.base!r}", split, "fp32")
            refuse(taught is not None, asked, split, None)  # blocks are gathered in one type
            refuse(self.optim.kind != "adamw", f"optim.kind = {self.optim.kind!r}", split, "adamw")
            refuse(self.method.balance == "gradient", "method.balance = 'gradient'", split, "fixed")


def check_trained(method: ConsistencyConfig, sampling: Sampling, path: str = "vp") -> None:
    """A student is only asked for what it was trained on: law 1 of the architecture.

    What `fewstep sample` is told afterwards is free: a TCF(1) student under second-order jumps, or a solver.

    Raises:
        ValueError: naming the nearest legal setting.
    """
    if set(sampling.told) != set(method.told):
        raise ValueError(
            f"sampling.told = {list(sampling.told)} is not what the network is trained with; "
            f"the nearest legal one is {list(method.told)}"
        )
    if sampling.sampler not in ("sss", "lcm"):
        return
    if sampling.spacing == "trailing":
        raise ValueError(
            f"sampling.spacing = {sampling.spacing!r} takes times that are not trained; the nearest legal one is 'grid'"
        )
    nested = path != "ve" and method.s != "inference"  # else a coarser grid asks for other times than the finer one
    asks: GridSpec = 8 if sampling.spacing == "tlcm" else sampling.grid
    if not _within(asks, method.grid, nested):
        named = "sampling.spacing = 'tlcm'" if sampling.spacing == "tlcm" else f"sampling.grid = {sampling.grid}"
        legal = "'grid'" if sampling.spacing == "tlcm" else method.grid
        raise ValueError(
            f"{named} asks for times that method.grid = {method.grid} does not train; the nearest legal one is {legal}"
        )
    asked: dict[str, tuple[object, object]] = {"jump": (sampling.step_jump, method.jump)}
    if method.jump == "second_order":
        asked |= {"r": (sampling.r, method.r), "form": (sampling.form, method.form)}
    if method.jump != "skip":
        asked["end"] = (sampling.end, method.end)
    for field, (value, trained) in asked.items():
        if value != trained:
            raise ValueError(
                f"sampling.{field} = {value!r} is not the {NAMES.get(field, field)} that is trained; "
                f"the nearest legal one is {trained!r}"
            )


NAMES = {"end": "end point"}


def check_grown(method: ConsistencyConfig, loop: LoopConfig) -> None:
    """Refuse a run that ends before its growing grid is whole: sampling would use times that are not trained.

    Raises:
        ValueError: naming the least number of steps.
    """
    if loop.steps < method.grid_lengths:
        raise ValueError(
            f"loop.steps = {loop.steps} ends before method.grid_start = {method.grid_start} has grown to the grid of "
            f"{method.points}; the nearest legal one is {method.grid_lengths}"
        )


def _within(asked: GridSpec, trained: GridSpec, nested: bool) -> bool:
    """Whether every time of one grid is a time of the other; `nested`: grids of N points hold those of N's divisors."""
    if isinstance(asked, int) and isinstance(trained, int):
        return trained % asked == 0 if nested else trained == asked
    return asked == trained


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
    changes = parse_overrides(overrides, DistillConfig)
    if teacher:
        changes["teacher"] = str(teacher)
    if config is not None:
        changes = merge(read_yaml(config, DistillConfig), changes)
    recipe = str(changes.get("recipe", recipe))  # a recipe that is named there brings its method along
    data = merge({"recipe": recipe}, read_recipe(recipe, DistillConfig))
    return validate(DistillConfig, merge(data, {**changes, "recipe": recipe}))


def teacher_path(named: str | Path) -> Path:
    """The teacher's folder: the named one (a folder, or a hub id), or the bundled one for "".

    Raises:
        UserError: as `teachers.teacher_folder`.
    """
    if named:
        from fewstep.backbones.teachers import teacher_folder

        return teacher_folder(named)
    from fewstep_worlds.emoji8.location import root

    return root() / "teacher"
