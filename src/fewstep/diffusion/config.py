"""Settings of noise grids, guidance and sampling. Light: no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Self

from pydantic import AfterValidator, Field, field_validator, model_validator

from fewstep.common.choices import (
    CALLS,
    Convention,
    End,
    ExtraCondition,
    Form,
    GammaRule,
    Jump,
    SamplerName,
    Spacing,
    omega_of,
)
from fewstep.common.config import Config, as_pair
from fewstep.common.errors import UserError, nearest_divisor


def rising(grid: int | tuple[float, ...]) -> int | tuple[float, ...]:
    """Return a grid that has a point and rises.

    Raises:
        ValueError: it does not.
    """
    if grid_size(grid) < 1:
        raise ValueError("must have at least 1 point")
    if not isinstance(grid, int) and sorted(set(grid)) != list(grid):
        raise ValueError("must rise")
    return grid


GridSpec = Annotated[int | tuple[float, ...], AfterValidator(rising)]
"""A training grid: N points, or the points themselves, rising."""


def grid_size(grid: int | Sequence[float]) -> int:
    """Return the number of points of a grid."""
    return grid if isinstance(grid, int) else len(grid)


def check_indices(field: str, grid: int | Sequence[float], indices: int) -> None:
    """Refuse a grid that a schedule of `indices` training indices does not have.

    Raises:
        UserError: N does not divide the indices, or a point lies outside of them.
    """
    if isinstance(grid, int):
        if indices % grid:
            near = nearest_divisor(grid, indices)
            raise UserError(f"{field} = {grid} must divide the {indices} training indices, e.g. {near}")
    elif grid[0] < 0 or grid[-1] > indices - 1:
        raise UserError(f"{field} = {list(grid)} must lie within 0 .. {indices - 1}")


class Guidance(Config):
    """Guidance of the teacher's step: scale ~ U[low, high], one draw a sample."""

    convention: Convention = Field("lcm", description="what the numbers mean: lcm (omega), imagen (1 + omega), none")
    low: float = Field(2.0, description="smallest scale")
    high: float = Field(14.0, description="largest scale")

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.high < self.low:
            raise ValueError(f"high = {self.high:g} must be at least low = {self.low:g}")
        least = {"lcm": 0.0, "imagen": 1.0, "none": self.low}[self.convention]
        if self.low < least:
            raise ValueError(f"low = {self.low:g} must be at least {least:g} with convention = {self.convention!r}")
        return self

    @property
    def omegas(self) -> tuple[float, float]:
        """Range of omega, the papers' convention."""
        return omega_of(self.low, self.convention), omega_of(self.high, self.convention)

    @property
    def branches(self) -> int:
        """Network evaluations of one guided call."""
        return 2 if self.guides else 1

    @property
    def guides(self) -> bool:
        """Whether any sample is guided: not where omega is 0 for all."""
        return self.convention != "none" and self.omegas != (0.0, 0.0)

    @property
    def mean_omega(self) -> float:
        """Mean guidance, which a student without omega as an input learns."""
        return sum(self.omegas) / 2


class Sampling(Config):
    """Sampling settings. The same record is part of a recipe, a run's config and an exported file."""

    renamed = {"told": "extra_conditioning"}  # noqa: RUF012  (a class variable of the base)

    sampler: SamplerName = Field(
        "sss", description="sss (TCD), lcm (multistep consistency), ddim, euler, heun, dpm_2, dpmpp_2s, sde_dpmpp_2m"
    )
    steps: int = Field(
        4,
        ge=1,
        description="network calls a picture; a guided one counts once, and dpmpp_2s saves its last where end = clean",
    )
    gamma: float = Field(0.3, ge=0, le=1, description="stochasticity of sss: 0 deterministic, 1 full re-noising")
    gamma_law: GammaRule = Field("time", description="what gamma is linear in: time (TCD) or noise (CTM)")
    jump: Jump | None = Field(None, description="the student's jump; null: skip for lcm, else first_order")
    r: float = Field(0.5, gt=0, le=1, description="mid-point of a second-order jump")
    form: Form = Field("x0", description="what a second-order jump blends: x0 or eps predictions")
    extra_conditioning: tuple[ExtraCondition, ...] = Field(
        (), description="inputs of the network beside x, t and the prompt: s, w"
    )
    w: float | None = Field(None, ge=0, description="guidance omega that is given to a student with w as an input")
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
            raise ValueError("must be one side in pixels, e.g. 512, or [width, height]")
        return pair

    @model_validator(mode="after")
    def _countable(self) -> Self:
        calls, steps = self.calls_a_step, f"steps = {self.steps}"
        points = grid_size(self.grid)
        if self.spacing == "tlcm" and self.steps > 8 * calls:
            raise ValueError(f"{steps} must be at most {8 * calls} with spacing = 'tlcm'")
        if self.spacing == "grid" and self.steps > points * calls:
            raise ValueError(f"{steps} must be at most {points * calls} on a grid of {points} points")
        if self.steps % calls:
            raise ValueError(f"{steps} network calls must be a multiple of {calls} with sampler = {self.sampler!r}")
        if self.sampler == "sss" and self.step_jump in ("skip", "cm_skip"):
            raise ValueError(f"jump = {self.step_jump!r} only reaches the end point; use sampler = 'lcm'")
        if ("w" in self.extra_conditioning) != (self.w is not None):
            given = list(self.extra_conditioning)
            raise ValueError(f"w = {self.w} does not fit extra_conditioning = {given}; set both, or neither")
        return self

    @property
    def step_jump(self) -> Jump:
        """The jump, with its default filled in."""
        return self.jump or ("skip" if self.sampler == "lcm" else "first_order")

    @property
    def landing(self) -> End:
        """Where the last jump lands; LCM's own always lands on clean data."""
        return "clean" if self.step_jump == "skip" else self.end

    @property
    def calls_a_step(self) -> int:
        """Network calls of one step."""
        jumps = self.sampler in ("sss", "lcm")
        return 2 if jumps and self.jump == "second_order" else CALLS[self.sampler]


TEACHER_SAMPLING = Sampling(sampler="ddim", steps=50, omega=7.0, spacing="trailing", end="clean")
"""Default sampling of a teacher."""
