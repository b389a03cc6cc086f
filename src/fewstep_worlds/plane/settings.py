"""Settings of the playground. Light: read before torch is imported."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from fewstep.common.choices import Prediction
from fewstep.common.config import Config, merge, parse_overrides, validate
from fewstep.diffusion.config import Guidance, Sampling
from fewstep.distillation.config import check_grown, check_trained
from fewstep.distillation.stages import Stage, StagedConfig
from fewstep.methods.config import ConsistencyConfig
from fewstep.methods.cost import step_cost
from fewstep.methods.recipes import read_recipe
from fewstep.training.config import LoopConfig, OptimConfig, StudentConfig

DEFAULT_PREDICTION: dict[str, Prediction] = {"vp": "eps", "flow": "flow", "ve": "x0"}
"""Path -> prediction type of its networks by default."""
PathName = Literal["vp", "flow", "ve"]
"""Noise paths: Stable Diffusion's, rectified flow, EDM."""


class PlaneConfig(StagedConfig):
    """A training of one recipe in the plane."""

    recipe: str = Field("tcd", description="name of the method's recipe")
    method: ConsistencyConfig = Field(
        ConsistencyConfig(guidance=Guidance(convention="none")), description="the method, without guidance"
    )
    sampling: Sampling = Field(Sampling(), description="how the student is sampled")
    path: PathName = Field("vp", description="noise path: vp, flow, ve")
    prediction: Prediction | None = Field(
        None, description="what the network predicts; null for the default of the path"
    )
    base: Literal["learned", "exact"] = Field(
        "learned", description="where the student starts: a network that fits the teacher, or the exact teacher"
    )
    base_steps: int = Field(2000, ge=1, description="training steps of a learned base")
    student: StudentConfig = Field(StudentConfig(kind="full", rank=16), description="trained weights")
    width: int = Field(128, ge=8, description="hidden width of the student's network")
    count: int = Field(20_000, ge=100, description="training points")
    loop: LoopConfig = Field(
        LoopConfig(steps=3000, batch=256, log_every=100, save_every=3000, keep=1), description="length of the training"
    )
    optim: OptimConfig = Field(OptimConfig(lr=3e-4, decay="cosine", ema=0.99), description="optimiser")
    stages: tuple[Stage, ...] = Field((), description="stages run one after another; empty for one run")
    steps: tuple[int, ...] = Field((1, 2, 4, 8, 20), description="step counts that are measured")
    gammas: tuple[float, ...] = Field((0.0, 0.2, 0.5), description="gammas that are measured, for the sampler sss")
    shown: int = Field(4000, ge=100, description="samples of each figure")

    @classmethod
    def parts_of(cls, recipe: str) -> dict[str, Any]:
        """Return what a stage takes of a recipe, with the plane's changes; the optimiser stays the plane's."""
        parts = super().parts_of(recipe)
        return {"method": merge(parts["method"], PLANE_CHANGES), "sampling": parts["sampling"]}

    @model_validator(mode="after")
    def _playable(self) -> Self:
        for stage in self.each_stage():
            check_trained(stage.method, stage.sampling, self.path)
            check_grown(stage.method, stage.loop)
            if stage.method.distance == "features":
                raise ValueError(
                    "method.distance = 'features' needs a network's features, which the plane lacks; use 'l2'"
                )
            if stage.method.guidance.convention != "none":
                raise ValueError(
                    f"method.guidance.convention = {stage.method.guidance.convention!r} needs prompts, which the plane "
                    "lacks; use 'none'"
                )
        self._check_measured()
        return self

    def _check_measured(self) -> None:
        sampling = self.sampling
        if sampling.omega:
            raise ValueError(f"sampling.omega = {sampling.omega:g} needs prompts, which the plane lacks; set it to 0")
        points = sampling.grid if isinstance(sampling.grid, int) else len(sampling.grid)
        if list(self.steps) != sorted({min(max(count, 1), points) for count in self.steps}) or not self.steps:
            raise ValueError(f"steps = {list(self.steps)} must rise within 1 to the grid's {points} points")
        if list(self.gammas) != sorted({min(max(gamma, 0.0), 1.0) for gamma in self.gammas}) or not self.gammas:
            raise ValueError(f"gammas = {list(self.gammas)} must rise within 0 to 1")
        if self.path == "flow" and self.prediction_type == "eps":
            raise ValueError("prediction = 'eps' does not determine x_0 where a flow starts; use 'flow'")

    @property
    def prediction_type(self) -> Prediction:
        """Prediction type of the network."""
        return self.prediction or DEFAULT_PREDICTION[self.path]

    @property
    def base_config(self) -> BaseConfig:
        """Settings of the learned base."""
        loop = self.loop.model_copy(update={"steps": self.base_steps, "batch": 256, "accumulate": 1})
        return BaseConfig(
            path=self.path, prediction=self.prediction_type, width=self.width, count=self.count, loop=loop
        )


class BaseConfig(Config):
    """A training of the diffusion model that students start from."""

    path: PathName
    prediction: Prediction
    width: int
    count: int
    loop: LoopConfig
    optim: OptimConfig = OptimConfig(lr=2e-3, warmup=50, decay="linear", ema=0.99)


PLANE_CHANGES: dict[str, object] = {
    "guidance": {"convention": "none"},
    "target_decay": 0.95,
    "matching": {"lr": 1e-3, "normaliser": "none"},
}
"""Changes to every recipe: the plane has no prompts, a run of a minute needs a faster EMA target and fake score, and
DMD's divisor, the mean over a picture's numbers, has no floor over two numbers: it is near 0 beside a mode."""


def resolve_plane(recipe: str, overrides: str | Sequence[str] = ()) -> PlaneConfig:
    """Return a recipe's settings in the plane, with overrides.

    Raises:
        UserError: unknown recipe or key, or an illegal value.
    """
    changes = parse_overrides(overrides, PlaneConfig)
    recipe = str(changes.get("recipe", recipe))
    given = read_recipe(recipe, PlaneConfig)
    data: dict[str, Any] = {
        "recipe": recipe,
        **{key: given[key] for key in ("method", "sampling", "stages") if key in given},
    }
    config = merge(merge(data, {"method": PLANE_CHANGES}), {**changes, "recipe": recipe})
    return validate(PlaneConfig, {**_measured(config), **config})


def equal_steps(config: PlaneConfig, evaluations: int) -> int:
    """Return the training steps that cost so many network evaluations, a backward pass being two; at least 1."""
    stages = config.each_stage()
    cost = sum(stage.loop.steps * stage.loop.batch * step_cost(stage.method) for stage in stages)
    return max(round(config.loop.steps * evaluations / cost), 1)


def _measured(config: dict[str, Any]) -> dict[str, Any]:
    """Return default step counts on a recipe's grid, and the gamma of a student that simulates: it has no other."""
    method, sampling = config.get("method", {}), config.get("sampling", {})
    grid = sampling.get("grid", Sampling().grid)
    points = grid if isinstance(grid, int) else len(grid)
    found: dict[str, Any] = {"steps": [n for n in PlaneConfig.model_fields["steps"].default if n <= points]}
    if method.get("start") in ("simulation", "noise") and "gamma" in sampling:
        found["gammas"] = [sampling["gamma"]]
    return found
