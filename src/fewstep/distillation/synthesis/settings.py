"""Every setting of a synthesis. Light: read, and refused, before torch is imported."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from fewstep.common.choices import CALLS, DeviceName, End, Precision, SolverName
from fewstep.common.config import Config, parse_overrides, validate
from fewstep.diffusion.config import GridSpec, Guidance

Kind = Literal["latents", "trajectories"]
"""What is kept of a walk: its end point, or every point with what the teacher said there."""
Storage = Literal["fp16", "fp32"]
"""What tensors are stored in."""


class DrawnSettings(Config):
    """What of a synthesis decides its numbers; they stand in the record of the set."""

    kind: Kind = Field("latents", description="latents (end points), or trajectories (all points and predictions)")
    each: int = Field(1, ge=1, description="samples of each line of the prompt file")
    grid: GridSpec = Field(50, description="times of the walk, one solver step each: N points, or the points, rising")
    end: End = Field(
        "clean",
        description="where the walk ends: clean (sigma = 0), or trajectories' default, index0 (.029 on SD's path)",
    )
    solver: SolverName = Field("ddim", description="the teacher's step: ddim, euler, heun, dpm_2, dpmpp_2s")
    guidance: Guidance = Field(Guidance(low=7.0, high=7.0), description="of the teacher's step")
    empty_prompts: float = Field(0.0, ge=0, le=1, description="share of samples drawn with the empty prompt")
    seed: int = Field(0, ge=0, le=2**32 - 1, description="seed of every random draw")
    shard: int = Field(64, ge=1, description="samples a file")
    batch: int = Field(16, ge=1, description="samples at a time in the network, counted from each file's first")
    dtype: Storage = Field("fp16", description="type of the stored latents and predictions: fp16 or fp32")

    @model_validator(mode="before")
    @classmethod
    def _end_of_kind(cls, known: Any) -> Any:
        """Latents are data, and clean; trajectories end where most recipes' jumps do."""
        if isinstance(known, dict) and "end" not in known and known.get("kind") == "trajectories":
            return {**known, "end": "index0"}
        return known

    @model_validator(mode="after")
    def _points_rise(self) -> Self:
        if isinstance(self.grid, int):
            if self.grid < 1:
                raise ValueError(f"grid = {self.grid} has no points; the nearest legal one is 1")
        elif not self.grid or sorted(set(self.grid)) != list(self.grid):
            raise ValueError(f"grid = {list(self.grid)} does not rise; the nearest is {sorted(set(self.grid)) or 50}")
        return self

    @property
    def points(self) -> int:
        """N, the points of the grid, and the steps of a walk."""
        return self.grid if isinstance(self.grid, int) else len(self.grid)

    def evaluations(self, *, from_pure_noise: bool = False) -> int:
        """Network evaluations of one sample, both branches of a guided call counted.

        A step onto clean data or from pure noise is of first order. Trajectories keep what the network says without the
        prompt even where the walk itself has no guidance, which is one evaluation more a step.
        """
        first_order = (self.end == "clean") + from_pure_noise
        single = min(first_order, self.points)
        calls = CALLS[self.solver] * (self.points - single) + single
        beside = self.points if self.kind == "trajectories" and not self.guidance.guides else 0
        return calls * self.guidance.branches + beside


class SynthesisConfig(DrawnSettings):
    """A synthesis: what is drawn, by whom, where."""

    teacher: str = Field("", description="pipeline folder; empty for the bundled teacher")
    device: DeviceName = Field("auto", description="where to draw")
    precision: Precision = Field(
        "fp32", description="type of the network: fp32, bf16, fp16, or auto (bf16 where the machine is fast at it)"
    )

    @property
    def drawn(self) -> DrawnSettings:
        """What of it decides the numbers."""
        return DrawnSettings.model_validate(self.model_dump(include=set(DrawnSettings.model_fields)))


def resolve_synthesis(
    overrides: str | Sequence[str] = (), teacher: str | Path = "", kind: str | None = None
) -> SynthesisConfig:
    """Dotted overrides over the defaults, then teacher and kind if they are named.

    Raises:
        UserError: unknown key, or an illegal value.
    """
    named = {"teacher": str(teacher), "kind": kind}
    changes = parse_overrides(overrides, SynthesisConfig)
    return validate(SynthesisConfig, changes | {key: value for key, value in named.items() if value})
