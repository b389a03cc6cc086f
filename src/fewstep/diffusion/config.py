"""Settings of noise grids, guidance and sampling. Light: no torch."""

from __future__ import annotations

from typing import Any, Self

from pydantic import Field, field_validator, model_validator

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

GridSpec = int | tuple[float, ...]
"""A training grid: N points, or the points themselves, rising."""


class Guidance(Config):
    """The guidance of the teacher's step: scale ~ U[low, high], one draw a sample."""

    convention: Convention = Field("lcm", description="what the numbers mean: lcm (omega), imagen (1 + omega), none")
    low: float = Field(2.0, description="smallest scale")
    high: float = Field(14.0, description="largest scale")

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.high < self.low:
            raise ValueError(f"high = {self.high:g} is below low; the nearest legal one is {self.low:g}")
        least = {"lcm": 0.0, "imagen": 1.0, "none": self.low}[self.convention]
        if self.low < least:
            raise ValueError(
                f"low = {self.low:g} turns away from the prompt in convention = {self.convention!r}; "
                f"the nearest legal one is {least:g}"
            )
        return self

    @property
    def omegas(self) -> tuple[float, float]:
        """The range in the papers' convention."""
        return omega_of(self.low, self.convention), omega_of(self.high, self.convention)

    @property
    def branches(self) -> int:
        """Network evaluations of one guided call."""
        return 2 if self.guides else 1

    @property
    def guides(self) -> bool:
        """Whether any sample is guided: none is where omega is 0 for all."""
        return self.convention != "none" and self.omegas != (0.0, 0.0)

    @property
    def mean_omega(self) -> float:
        """The guidance that a student which is not told omega learns, on average."""
        return sum(self.omegas) / 2


class Sampling(Config):
    """How pictures are drawn. The same record stands in a recipe, a run's config and an exported file."""

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
        (), description="what the network is told beside x and t: s, w"
    )
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
        if ("w" in self.extra_conditioning) != (self.w is not None):
            raise ValueError(
                f"w = {self.w} for a network that is told {list(self.extra_conditioning)}; name both, or none"
            )
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
