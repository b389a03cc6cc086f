"""The settings of a distillation. Light: no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from fewstep.common.choices import DeviceName
from fewstep.common.config import Config, merge, parse_overrides, read_yaml, validate
from fewstep.common.errors import UserError
from fewstep.common.run_inputs import Content
from fewstep.data.config import DataConfig
from fewstep.diffusion.config import GridSpec, Sampling
from fewstep.distillation.latent_lpips.settings import LatentLpipsTrainConfig
from fewstep.distillation.stages import Stage, StagedConfig
from fewstep.methods.config import ConsistencyConfig
from fewstep.methods.recipes import read_recipe, recipe_name
from fewstep.training.config import LoopConfig, OptimConfig, StudentConfig

SMALL, FEW = 256, 32
"""Pixels a side above which validation draws few pictures, and how many: their teacher takes minutes for 256."""


class ValidationConfig(Config):
    """Validation during training, every loop.validate_every steps."""

    prompts: Annotated[str, Content("watched prompts")] = Field(
        "", description="prompt file or bundled list; empty for the data's own"
    )
    count: int = Field(256, ge=16, description="pictures drawn at each validation; above 256 pixels 32 if omitted")
    seed: int = Field(1234, ge=0, le=2**62, description="seed of the first picture; the others count up")
    beside: Annotated[str, Content("beside")] = Field(
        "", description="a finished student, whose LoRA is added and whose settings are used to draw; empty for none"
    )
    teacher_steps: int = Field(50, ge=1, description="steps of the teacher's end points")
    scorer: Annotated[str, Content("held-out scorer")] = Field(
        "", description="a scorer that the training does not see, whose mean is reported: world or NAME:FOLDER"
    )
    alarms: bool = Field(True, description="warn of saturation, collapse and the like, and keep best/ as it was")


class LatentLpipsConfig(LatentLpipsTrainConfig):
    """The network of `method.distance = latent_lpips`, and how it is trained."""

    folder: Annotated[str, Content("perceptual distance")] = Field(
        "", description="of a finished one; empty to train one for this teacher beforehand"
    )


class DistillConfig(StagedConfig):
    """All settings of a distillation run."""

    renamed = {"watch": "validation", "perceptual": "latent_lpips"}  # noqa: RUF012  (a class variable of the base)

    recipe: str = Field("tcd", description="name of the method's recipe; several, comma-separated, follow each other")
    teacher: Annotated[str, Content("teacher")] = Field(
        "", description="pipeline folder; empty for the bundled teacher"
    )
    device: DeviceName = Field("auto", description="where to train")
    method: ConsistencyConfig = Field(ConsistencyConfig(), description="the objective")
    student: StudentConfig = Field(StudentConfig(), description="the trained weights")
    data: DataConfig = Field(default_factory=DataConfig, description="the training data")
    loop: LoopConfig = Field(LoopConfig(validate_every=500), description="steps, batches and checkpoints")
    optim: OptimConfig = Field(OptimConfig(), description="the optimiser")
    sampling: Sampling = Field(Sampling(), description="how the student is sampled; saved with it")
    validation: ValidationConfig = Field(ValidationConfig(), description="validation during training")
    latent_lpips: LatentLpipsConfig = Field(
        LatentLpipsConfig(), description="training of the latent LPIPS distance, where method.distance names it"
    )
    stages: tuple[Stage, ...] = Field((), description="stages run one after another; empty for one run")

    @model_validator(mode="after")
    def _whole_stages(self) -> Self:
        """Check the config of each stage."""
        self.each_stage()
        return self

    @model_validator(mode="before")
    @classmethod
    def _sized(cls, data: Any) -> Any:
        """Sample at the size of the training pictures unless another is named."""
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
        reward = self.method.reward
        if reward.weight and reward.scorer == self.validation.scorer:
            raise ValueError(f"validation.scorer = {reward.scorer!r} is the reward that is trained; name another one")
        return self

    def _check_engine(self) -> None:
        """Refuse settings of a step's computation that exclude each other."""
        loop = self.loop

        def refuse(wrong: bool, setting: str, other: str, remedy: object) -> None:
            if wrong:
                raise ValueError(f"{setting} does not go with {other}; use {remedy!r}")

        beside = f"validation.beside = {self.validation.beside!r}"
        if self.validation.beside:
            refuse(self.student.base in ("8bit", "4bit"), f"student.base = {self.student.base!r}", beside, "bf16")
            refuse(loop.shard, "loop.shard = True", beside, False)
            refuse(self.student.kind == "full", "student.kind = 'full'", beside, "lora")
        narrow = self.student.base == "bf16" and loop.precision == "fp32"
        refuse(narrow, "loop.precision = 'fp32'", "student.base = 'bf16'", "bf16")
        precision = self.student.teacher_precision
        teacher = f"student.teacher_precision = {precision!r}"
        refuse(self.student.base == "bf16" and precision == "fp32", teacher, "student.base = 'bf16'", "bf16")
        critic = self.method.adversarial
        # recomputed blocks do not use the attention with a second derivative, which R1 needs
        again = bool(critic.weight and critic.r1) and self.student.checkpointing
        refuse(again, "student.checkpointing = True", f"method.adversarial.r1 = {critic.r1}", False)
        if self.method.continuous:
            limit = f"method.point = {self.method.point!r}"  # a derivative is computed in fp32
            refuse(self.student.base != "fp32", f"student.base = {self.student.base!r}", limit, "fp32")
            if self.method.tangent.derivative != "finite":
                derivative = f"method.tangent.derivative = {self.method.tangent.derivative!r}"
                refuse(loop.shard, derivative, "loop.shard = True", "finite")
                refuse(loop.compile, derivative, "loop.compile = True", "finite")
        if self.student.offload:
            apart = "student.offload = True"
            refuse(not self.student.checkpointing, "student.checkpointing = False", apart, True)
            refuse(self.student.base == "8bit", "student.base = '8bit'", apart, "4bit")  # its layers keep the matrix
            refuse(loop.shard, apart, "loop.shard = True", False)
            refuse(loop.compile, "loop.compile = True", apart, False)
            refuse(bool(self.validation.beside), apart, beside, False)
            tangent = f"method.tangent.derivative = {self.method.tangent.derivative!r}"
            forward = self.method.continuous and self.method.tangent.derivative != "finite"
            refuse(forward, tangent, apart, "finite")
        if loop.shard:
            split = "loop.shard = True"
            refuse(loop.compile, "loop.compile = True", split, False)
            refuse(self.student.base != "fp32", f"student.base = {self.student.base!r}", split, "fp32")
            refuse(precision is not None, teacher, split, None)  # blocks are gathered in one type
            refuse(self.optim.kind != "adamw", f"optim.kind = {self.optim.kind!r}", split, "adamw")
            refuse(self.method.balance == "gradient", "method.balance = 'gradient'", split, "fixed")


def check_trained(method: ConsistencyConfig, sampling: Sampling, path: str = "vp") -> None:
    """Refuse default sampling settings that the student is not trained for (rule 1 in docs/architecture.md).

    `fewstep sample` may use others: a TCF(1) student under second-order jumps, or a solver.

    Raises:
        ValueError: naming a setting that is trained.
    """
    if set(sampling.extra_conditioning) != set(method.extra_conditioning):
        raise ValueError(
            f"sampling.extra_conditioning = {list(sampling.extra_conditioning)} differs from training; "
            f"use {list(method.extra_conditioning)}"
        )
    if sampling.sampler not in ("sss", "lcm"):
        return
    if sampling.spacing == "trailing":
        raise ValueError(f"sampling.spacing = {sampling.spacing!r} has times that are not trained; use 'grid'")
    nested = path != "ve" and method.s != "inference"  # else a coarser grid has times that the finer one lacks
    sampled: GridSpec = 8 if sampling.spacing == "tlcm" else sampling.grid
    if not within(sampled, method.grid, nested):
        named = "sampling.spacing = 'tlcm'" if sampling.spacing == "tlcm" else f"sampling.grid = {sampling.grid}"
        legal = "'grid'" if sampling.spacing == "tlcm" else method.grid
        raise ValueError(f"{named} has times that method.grid = {method.grid} does not train; use {legal}")
    pairs: dict[str, tuple[object, object]] = {"jump": (sampling.step_jump, method.jump)}
    if method.jump == "second_order":
        pairs |= {"r": (sampling.r, method.r), "form": (sampling.form, method.form)}
    if method.jump != "skip":
        pairs["end"] = (sampling.end, method.end)
    for field, (value, trained) in pairs.items():
        if value != trained:
            raise ValueError(
                f"sampling.{field} = {value!r} is not the {NAMES.get(field, field)} that is trained; use {trained!r}"
            )


def guided_at(omega: float, recipe: DistillConfig) -> dict[str, Any]:
    """Return the changes to a recipe for a teacher that is sampled at `omega`.

    A range of guidance becomes omega / 2 to 3 omega / 2, whose mean is omega; a single value becomes omega. A recipe
    that trains without guidance and samples with it, samples at omega.
    """
    own = recipe.method.guidance
    if not own.guides:
        return {"sampling": {"omega": omega}} if recipe.sampling.omega else {}
    width = 0.0 if own.low == own.high else 0.5
    plus = 1.0 if own.convention == "imagen" else 0.0
    guidance = {"low": omega * (1 - width) + plus, "high": omega * (1 + width) + plus}
    return {"method": {"guidance": guidance}, **({"sampling": {"w": omega}} if recipe.sampling.w is not None else {})}


NAMES = {"end": "end point"}


def check_grown(method: ConsistencyConfig, loop: LoopConfig) -> None:
    """Refuse a run that ends before its growing grid is whole: sampling would use times that are not trained.

    Raises:
        ValueError: naming the least number of steps.
    """
    if loop.steps < method.grid_lengths:
        raise ValueError(
            f"loop.steps = {loop.steps} ends before method.grid_start = {method.grid_start} has grown to the grid of "
            f"{method.points}; must be at least {method.grid_lengths}"
        )


def within(sampled: GridSpec, trained: GridSpec, nested: bool) -> bool:
    """Return whether one grid's times are in the other; `nested`: a grid of N points holds those of N's divisors."""
    if isinstance(sampled, int) and isinstance(trained, int):
        return trained % sampled == 0 if nested else trained == sampled
    return sampled == trained


def resolve(
    recipe: str = "tcd",
    config: str | Path | None = None,
    overrides: str | Sequence[str] = (),
    teacher: str | Path = "",
    omega: float | None = None,
    side: int | None = None,
) -> DistillConfig:
    """Merge a recipe, a YAML file over it, dotted overrides over both, and the teacher if one is named.

    Args:
        omega: the teacher's own guidance, for `guided_at` where no method.guidance is given; None for the recipe's.
        side: pixels a side that the teacher was trained at; above `SMALL`, validation draws `FEW` pictures where no
            validation.count is given.

    Raises:
        UserError: unknown recipe or key, or an illegal value.
    """
    changes = parse_overrides(overrides, DistillConfig)
    if teacher:
        changes["teacher"] = str(teacher)
    if config is not None:
        changes = merge(read_yaml(config, DistillConfig), changes)
    named = str(changes.get("recipe", recipe))  # a recipe named there replaces the argument's
    names = [recipe_name(name.strip()) for name in named.split(",")]
    data = chained(names)
    for part, keys in {key: set(changes.get(key, {})) - {"size"} for key in ("method", "sampling")}.items():
        if names[1:] and keys:
            key = min(keys)
            remedy = f"use stages.{names[-1]}.{part}.{key}"
            raise UserError(f"{part}.{key} has no effect with several recipes; {remedy}", field=f"{part}.{key}")
    if omega is not None and "guidance" not in changes.get("method", {}):
        data = merge(data, guided_at(omega, validate(DistillConfig, {**data, "stages": ()} if names[1:] else data)))
        for stage in data["stages"] if names[1:] else ():
            stage["method"] = guided_at(omega, resolve(stage["recipe"])).get("method", {})
    changes = {**changes, "recipe": ",".join(names)}
    resolved = validate(DistillConfig, merge(data, changes))
    if (resolved.data.size or side or 0) <= SMALL:
        return resolved
    return validate(DistillConfig, merge(merge({"validation": {"count": FEW}}, data), changes))


def chained(names: Sequence[str]) -> dict[str, Any]:
    """Return the settings of recipes that follow each other, each from the student of the one before, in equal shares.

    Method and sampling outside of the stages are the last one's, all else the first one's. A single recipe keeps
    stages of its own.

    Raises:
        UserError: no such recipe.
    """
    first, last = (read_recipe(name, DistillConfig) for name in (names[0], names[-1]))
    if len(names) == 1:
        return {"recipe": names[0], **first}
    own: dict[str, Any] = {key: last[key] for key in ("method", "sampling") if key in last}
    stages = [{"name": name, "recipe": name, "share": 1.0, "method": {}} for name in names]
    return {**first, **own, "recipe": ",".join(names), "stages": stages}
