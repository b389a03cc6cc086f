"""Settings of the playground. Light: read before torch is imported."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from fewstep.common.choices import Prediction
from fewstep.common.config import Config, merge, parse_overrides, validate
from fewstep.diffusion.config import Guidance, Sampling
from fewstep.distillation.config import check_grown, check_trained
from fewstep.distillation.stages import Stage, stage_configs
from fewstep.methods.config import ConsistencyConfig
from fewstep.methods.recipes import read_recipe
from fewstep.training.config import LoopConfig, OptimConfig, StudentConfig

USUAL: dict[str, Prediction] = {"vp": "eps", "flow": "flow", "ve": "x0"}
"""What networks of each path say where nothing else is named."""
PathName = Literal["vp", "flow", "ve"]
"""Noise paths: Stable Diffusion's, rectified flow, EDM."""


class PlayConfig(Config):
    """One recipe in the plane."""

    recipe: str = Field("tcd", description="name of the method's recipe")
    method: ConsistencyConfig = Field(
        ConsistencyConfig(guidance=Guidance(convention="none")), description="the objective; there is no guidance here"
    )
    sampling: Sampling = Field(Sampling(), description="how it is sampled")
    path: PathName = Field("vp", description="noise path: vp, flow, ve")
    prediction: Prediction | None = Field(None, description="what the network says; null for eps, flow, x0 by the path")
    base: Literal["learned", "exact"] = Field(
        "learned", description="what the student starts from: a network that fits the teacher, or the exact teacher"
    )
    base_steps: int = Field(2000, ge=1, description="training steps of a learned base")
    student: StudentConfig = Field(StudentConfig(kind="full", rank=16), description="what is trained")
    width: int = Field(128, ge=8, description="hidden width of the student's network")
    count: int = Field(20_000, ge=100, description="training points")
    loop: LoopConfig = Field(
        LoopConfig(steps=3000, batch=256, log_every=100, save_every=3000, keep=1), description="how long"
    )
    optim: OptimConfig = Field(OptimConfig(lr=3e-4, decay="cosine", ema=0.99), description="how fast")
    stages: tuple[Stage, ...] = Field((), description="stages run one after another; empty for one run")
    steps: tuple[int, ...] = Field((1, 2, 4, 8, 20), description="step counts that are measured")
    gammas: tuple[float, ...] = Field((0.0, 0.2, 0.5), description="gamma of each measured row, where sss samples")
    shown: int = Field(4000, ge=100, description="points that are drawn for each figure")

    @model_validator(mode="after")
    def _playable(self) -> Self:
        for stage in self.each_stage():
            check_trained(stage.method, stage.sampling, self.path)
            check_grown(stage.method, stage.loop)
            if stage.method.distance == "features":
                raise ValueError(
                    "method.distance = 'features' asks for a network's features, the plane has none; "
                    "the nearest legal one is 'l2'"
                )
            if stage.method.guidance.convention != "none":
                raise ValueError(
                    "method.guidance asks for a prompt, the plane has none; the nearest convention is 'none'"
                )
        self._check_measured()
        return self

    def _check_measured(self) -> None:
        sampling = self.sampling
        if sampling.omega:
            raise ValueError(f"sampling.omega = {sampling.omega:g} asks for a prompt, the plane has none; it must be 0")
        points = sampling.grid if isinstance(sampling.grid, int) else len(sampling.grid)
        legal = sorted({min(max(count, 1), points) for count in self.steps}) or [1]
        if list(self.steps) != legal:
            raise ValueError(f"steps = {list(self.steps)} on a grid of {points} points; the nearest legal is {legal}")
        strengths = sorted({min(max(gamma, 0.0), 1.0) for gamma in self.gammas}) or [0.0]
        if list(self.gammas) != strengths:
            raise ValueError(f"gammas = {list(self.gammas)} must rise within 0 to 1; the nearest legal is {strengths}")
        if self.path == "flow" and self.says == "eps":
            raise ValueError(
                "prediction = 'eps' says nothing of x_0 where a flow starts; the nearest legal one is 'flow'"
            )

    @property
    def says(self) -> Prediction:
        """What the network says."""
        return self.prediction or USUAL[self.path]

    @property
    def base_config(self) -> BaseConfig:
        """How its learned base is trained."""
        loop = self.loop.model_copy(update={"steps": self.base_steps, "batch": 256, "accumulate": 1})
        return BaseConfig(path=self.path, prediction=self.says, width=self.width, count=self.count, loop=loop)

    def each_stage(self) -> list[PlayConfig]:
        """The configs of its stages; itself where it has none."""
        return stage_configs(self, self.stages, self.loop.steps) if self.stages else [self]


class BaseConfig(Config):
    """A diffusion model in the plane: what students start from."""

    path: PathName
    prediction: Prediction
    width: int
    count: int
    loop: LoopConfig
    optim: OptimConfig = OptimConfig(lr=2e-3, warmup=50, decay="linear", ema=0.99)


OWN: dict[str, object] = {"guidance": {"convention": "none"}, "target_decay": 0.95}
"""What of a recipe is laid aside in the plane: there is no prompt to guide by, and a run of a minute is too short for a
target that follows over thousands of steps."""


def resolve_play(recipe: str, overrides: str | Sequence[str] = ()) -> PlayConfig:
    """A recipe's method and sampling in the plane, then overrides.

    Raises:
        UserError: unknown recipe or key, or an illegal value.
    """
    changes = parse_overrides(overrides, PlayConfig)
    recipe = str(changes.get("recipe", recipe))
    given = read_recipe(recipe, PlayConfig)
    data: dict[str, Any] = {
        "recipe": recipe,
        **{key: given[key] for key in ("method", "sampling", "stages") if key in given},
    }
    return validate(PlayConfig, merge(merge(data, {"method": OWN}), {**changes, "recipe": recipe}))
