"""The settings of a synthesis. Light: no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from fewstep.common.choices import CALLS, DeviceName, End, Precision, SolverName
from fewstep.common.config import Config, parse_overrides, validate
from fewstep.diffusion.config import GridSpec, Guidance

Kind = Literal["latents", "trajectories"]
"""Stored of a trajectory: its end point, or every point with the network's outputs."""
Storage = Literal["fp16", "fp32"]
"""Type of the stored tensors."""


class DrawnSettings(Config):
    """The settings that decide the numbers of a set; they are a part of its record."""

    kind: Kind = Field("latents", description="latents (end points), or trajectories (all points and predictions)")
    each: int = Field(1, ge=1, description="samples of each line of the prompt file")
    grid: GridSpec = Field(
        50, description="times of a trajectory, one solver step each: N points, or the points, rising"
    )
    end: End = Field(
        "clean",
        description="where a trajectory ends: clean (sigma = 0), or trajectories' default, index0 (.029 on SD's path)",
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
        """Default to `clean` for latents, which are data, and to most recipes' end point for trajectories."""
        if isinstance(known, dict) and "end" not in known and known.get("kind") == "trajectories":
            return {**known, "end": "index0"}
        return known

    @property
    def points(self) -> int:
        """N, the number of points of the grid and of solver steps."""
        return self.grid if isinstance(self.grid, int) else len(self.grid)

    def evaluations(self, *, from_pure_noise: bool = False) -> int:
        """Return the network evaluations of one sample, both branches of a guided call counted.

        A step onto clean data or from pure noise is of first order. Trajectories without guidance take one evaluation
        more a step, for the output without the prompt.
        """
        first_order = (self.end == "clean") + from_pure_noise
        single = min(first_order, self.points)
        calls = CALLS[self.solver] * (self.points - single) + single
        beside = self.points if self.kind == "trajectories" and not self.guidance.guides else 0
        return calls * self.guidance.branches + beside


class SynthesisConfig(DrawnSettings):
    """All settings of a synthesis."""

    teacher: str = Field("", description="pipeline folder; empty for the bundled teacher")
    device: DeviceName = Field("auto", description="where to draw")
    precision: Precision = Field(
        "fp32", description="type of the network: fp32, bf16, fp16, or auto (bf16 where the machine is fast at it)"
    )

    @property
    def drawn(self) -> DrawnSettings:
        """The settings that decide the numbers."""
        return DrawnSettings.model_validate(self.model_dump(include=set(DrawnSettings.model_fields)))


def resolve_synthesis(
    overrides: str | Sequence[str] = (), teacher: str | Path = "", kind: str | None = None
) -> SynthesisConfig:
    """Merge dotted overrides, and teacher and kind if they are named, over the defaults.

    Raises:
        UserError: unknown key, or an illegal value.
    """
    named = {"teacher": str(teacher), "kind": kind}
    changes = parse_overrides(overrides, SynthesisConfig)
    return validate(SynthesisConfig, changes | {key: value for key, value in named.items() if value})
