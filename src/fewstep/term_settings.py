"""Settings of the terms that may stand beside the consistency loss. Light."""

from __future__ import annotations

import math
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from fewstep.common.run_inputs import Content
from fewstep.common.config import Config
from fewstep.common.choices import AdversarialKind, Normaliser


class AdversarialConfig(Config):
    """A critic beside the consistency loss (CTM, PCM, TDD, TLCM)."""

    weight: float = Field(0.0, ge=0, description="weight of the adversarial term; 0 for none")
    kind: AdversarialKind = Field("hinge", description="hinge or nonsaturating")
    real: Literal["data", "target"] = Field(
        "data", description="what is real: the data (the student's own samples, where start = student), or the target's"
    )
    noise: float = Field(
        0.0, ge=0, le=1, description="the critic sees points noised up to this share of what lies above in the segment"
    )
    start: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="share of the run's (or stage's) steps without a critic: until then it is neither trained nor in "
        "the student's loss",
    )
    clip: tuple[float, float] = Field(
        (0.01, 10.0), description="range of the factor that balance = gradient gives the term, before its weight"
    )
    r1: float = Field(0.0, ge=0, description="weight of R1, the squared gradient of the critic on real points")
    lr: float = Field(1e-4, gt=0, description="the critic's learning rate")
    every: int = Field(1, ge=1, description="steps between two of the critic's")

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        low, high = self.clip
        if not 0 <= low <= high:
            legal = sorted((max(low, 0.0), max(high, 0.0)))
            raise ValueError(f"clip = [{low:g}, {high:g}] is no range above 0; the nearest legal one is {legal}")
        return self


class MatchingConfig(Config):
    """Distribution matching: the gap of two scores, the teacher's and a fake one that follows the student."""

    weight: float = Field(0.0, ge=0, description="weight of the distribution matching term; 0 for none")
    normaliser: Normaliser = Field(
        "dmd",
        description="what the gap of both x0 is divided by: dmd (mean |x0 - real x0|), score (its KL's own law), none",
    )
    low: float = Field(0.02, ge=0, le=1, description="least noise at which scores are compared, as a share of T")
    high: float = Field(0.98, ge=0, le=1, description="most noise, as a share of T")
    omega: float | None = Field(
        None, ge=0, description="guidance of the real score; null for that of the teacher's step"
    )
    fit: Literal["landing", "sample"] = Field(
        "landing",
        description="what the fake score is fitted to: landing (of one jump, DMD2), or sample (the student's own, of "
        "several jumps, where start = student; TLCM)",
    )
    every: int = Field(5, ge=1, description="steps of the fake score for one of the student, by all its terms")
    lr: float = Field(1e-5, gt=0, description="learning rate of the fake score")

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.high < self.low:
            raise ValueError(f"high = {self.high:g} is below low; the nearest legal one is {self.low:g}")
        return self


KNOWN_AIMS = {"world": 1.0, "mps": 16.0}
"""s0 by scorer: a cosine of 1, which is never reached, and TLCM's."""


class PreferenceConfig(Config):
    """A differentiable scorer of pictures and prompts."""

    weight: float = Field(0.0, ge=0, description="weight of the preference term; 0 for none")
    scorer: Annotated[str, Content("scorer")] = Field(
        "world", description="world (the bundled one), or NAME:FOLDER, e.g. pickscore:weights/pickscore"
    )
    s0: float | None = Field(
        None, description="score to reach with the own prompt; null for the scorer's own, if known"
    )
    s1: float = Field(0.0, description="score not to exceed with a wrong prompt")

    @property
    def aim(self) -> float:
        """s0: as named, or as is known of the scorer (TLCM's 16 is on MPS's scale)."""
        known = KNOWN_AIMS.get(self.scorer.partition(":")[0], math.nan)
        return known if self.s0 is None else self.s0

    @model_validator(mode="after")
    def _on_its_scale(self) -> Self:
        if self.weight and math.isnan(self.aim):
            raise ValueError(
                f"s0 is left out, and of scorer = {self.scorer!r} no score to aim at is known; name one on its scale"
            )
        return self
