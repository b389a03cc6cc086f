"""The settings of the terms of a method's loss, and of the limits of its pairs. Read without torch."""

from __future__ import annotations

import math
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from fewstep.common.choices import (
    AdversarialKind,
    Coordinates,
    Derivative,
    Levels,
    Matched,
    Normaliser,
)
from fewstep.common.config import Config
from fewstep.common.run_inputs import Content

DEFAULT_S0 = {"world": 1.0, "mps": 16.0}
"""s0 by scorer: a cosine of 1, which is never reached, and TLCM's (arXiv 2406.05768, section 3.3)."""


class AdversarialConfig(Config):
    """A critic beside the consistency loss (CTM, PCM, TDD, TLCM)."""

    weight: float = Field(0.0, ge=0, description="weight of the adversarial term; 0 for none")
    kind: AdversarialKind = Field("hinge", description="hinge or nonsaturating")
    real: Literal["data", "target"] = Field(
        "data", description="what is real: the data (the student's own samples, where start = student), or the target's"
    )
    noise: float = Field(
        0.0,
        ge=0,
        le=1,
        description="the critic's inputs are noised up to this share of the way to the segment's upper edge",
    )
    start: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="share of the run's (or stage's) steps before the critic is trained and enters the student's loss",
    )
    clip: tuple[float, float] = Field(
        (0.01, 10.0), description="range of the term's factor with balance = gradient, before its weight"
    )
    r1: float = Field(0.0, ge=0, description="weight of R1, the squared gradient of the critic on real points")
    lr: float = Field(1e-4, gt=0, description="the critic's learning rate")
    every: int = Field(1, ge=1, description="steps for one update of the critic")

    @property
    def reads_data(self) -> bool:
        """Whether the critic is trained on data."""
        return bool(self.weight) and self.real == "data"

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        low, high = self.clip
        if not 0 <= low <= high:
            raise ValueError(f"clip = [{low:g}, {high:g}] must be two numbers from 0, rising")
        return self


class MatchingConfig(Config):
    """Distribution matching: the gap of two scores, the teacher's and a fake one that follows the student."""

    weight: float = Field(0.0, ge=0, description="weight of the distribution matching term; 0 for none")
    normaliser: Normaliser = Field(
        "dmd",
        description="divisor of the gap of both x0: dmd (mean |x0 - real x0|), score (as in KL's gradient), none",
    )
    low: float = Field(0.02, ge=0, le=1, description="least noise at which scores are compared, as a share of T")
    high: float = Field(0.98, ge=0, le=1, description="most noise, as a share of T")
    levels: Levels = Field(
        "all", description="noise levels of the gap: all, or jump (those that the jump crosses, from s to t_{n+k}; TDM)"
    )
    omega: float | None = Field(
        None, ge=0, description="guidance of the real score; null for the guidance of the teacher's step"
    )
    guidance_levels: Levels | None = Field(
        None, description="noise levels of guidance as a term of its own (Decoupled DMD); null for a guided real score"
    )
    matched: Matched = Field(
        "landing",
        description="what is matched: landing, or simulation (the end of student_steps jumps, where start = noise; the "
        "first one has no gradient; DP-DMD)",
    )
    distance: Literal["l2", "huber_norm"] = Field(
        "l2", description="l2, whose gradient is the gap, or huber_norm (TDM), whose gradient has its direction"
    )
    fit: Literal["landing", "sample"] = Field(
        "landing",
        description="what the fake score is fitted to: landing (of one jump, DMD2), or sample (of the student's "
        "jumps, where start = student; TLCM)",
    )
    every: int = Field(5, ge=1, description="updates of the fake score for one of the student")
    lr: float = Field(1e-5, gt=0, description="learning rate of the fake score")

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.high < self.low:
            raise ValueError(f"high = {self.high:g} must be at least low = {self.low:g}")
        return self


class RewardConfig(Config):
    """A differentiable scorer of pictures and prompts."""

    weight: float = Field(0.0, ge=0, description="weight of the reward term; 0 for none")
    scorer: Annotated[str, Content("scorer")] = Field(
        "world", description="world (the bundled one), or NAME:FOLDER, e.g. pickscore:weights/pickscore"
    )
    s0: float | None = Field(None, description="score to reach with the right prompt; null for the scorer's default")
    s1: float = Field(0.0, description="score not to exceed with a wrong prompt")
    tile: int | None = Field(
        None, ge=128, description="pixels a side of the tiles that pictures are decoded in; null for whole pictures"
    )

    @property
    def aim(self) -> float:
        """Return s0, by default the scorer's own; nan if that is unknown."""
        return DEFAULT_S0.get(self.scorer.partition(":")[0], math.nan) if self.s0 is None else self.s0

    @model_validator(mode="after")
    def _on_its_scale(self) -> Self:
        if self.weight and math.isnan(self.aim):
            raise ValueError(f"s0 = None has no default for scorer = {self.scorer!r}; set a score on its scale")
        return self


class TangentConfig(Config):
    """The limits of a pair, where point = eulerian or lagrangian."""

    coordinates: Coordinates = Field(
        "linear", description="linear (eps - x0 on a straight path) or trig (v on TrigFlow's circle)"
    )
    warmup: float = Field(0.0, ge=0, le=1, description="share of the run's steps over which the derivative comes in")
    most: float = Field(1.0, ge=0, le=1, description="weight of the derivative after the warm-up (AYF: .99)")
    derivative: Derivative = Field(
        "auto",
        description="forward (forward mode; attention by the math kernel), finite (central differences), or auto: "
        "forward mode where every operation of the network has it, which fused attention has not",
    )
    width: float = Field(
        0.001, gt=0, le=0.1, description="half of a finite difference's width, in the coordinates' time"
    )
