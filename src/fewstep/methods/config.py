"""The settings of a method: one row of the table of `docs/methods.md`. Light: refused before torch is imported.

Every recipe of the family fills in these choices and no others; what they mean together is `objectives.consistency`.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from fewstep.common.choices import (
    AdversarialKind,
    Compare,
    DistanceName,
    End,
    ExtraCondition,
    Form,
    Jump,
    Normaliser,
    Point,
    SolverName,
    SRule,
    Start,
    Target,
    Weight,
)
from fewstep.common.config import Config
from fewstep.common.errors import nearest_divisor
from fewstep.common.run_inputs import Content
from fewstep.diffusion.config import GridSpec, Guidance


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


class RewardConfig(Config):
    """A differentiable scorer of pictures and prompts."""

    weight: float = Field(0.0, ge=0, description="weight of the reward term; 0 for none")
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


KNOWN_AIMS = {"world": 1.0, "mps": 16.0}
"""s0 by scorer: a cosine of 1, which is never reached, and TLCM's."""


class ConsistencyConfig(Config):
    """One row of the table of methods."""

    renamed = {"told": "extra_conditioning", "preference": "reward"}  # noqa: RUF012  (a class variable of the base)

    grid: GridSpec = Field(50, description="training grid: N points, or the points themselves, rising")
    grid_start: int | None = Field(
        None,
        ge=1,
        description="points of the grid when the run (or stage) starts; they double until all are there (iCT); null "
        "for all from the first step",
    )
    k: int = Field(1, ge=1, description="skip between t_{n+k} and t_n, in grid points (1 of 50 = 20 indices)")
    k_low: int | None = Field(None, ge=1, description="smallest skip, drawn up to k; null for k alone")
    substeps: int = Field(1, ge=1, description="solver steps between t_{n+k} and t_n")
    segments: int = Field(1, ge=1, description="M, segments of the grid; jumps stay inside one")
    s: SRule = Field("uniform", description="where jumps land: edge (of the segment), uniform, inference, next")
    inference_steps: tuple[int, int] = Field((4, 8), description="step counts whose times s = inference draws from")
    reach: float = Field(0.26, gt=0, le=1, description="how far below t_n s = inference looks, as a share of the grid")
    spread: float = Field(0.3, ge=0, le=1, description="s = inference shrinks s by up to this share, as gamma does")
    start: Start = Field(
        "data",
        description="where x_{t_n+k} comes from: data (noised), trajectory (the teacher's, stored), rollout (its steps "
        "from noise), student (own samples, noised)",
    )
    rollout: int = Field(8, ge=1, description="R, teacher steps from noise to clean, where start = rollout")
    student_steps: int = Field(4, ge=1, description="q, jumps of each of the student's samples, where start = student")
    point: Point = Field("solver", description="where x_{t_n} comes from: solver, path, self (own jump), stored")
    jump: Jump = Field("first_order", description="skip (LCM's), cm_skip (CM's), first_order, second_order")
    r: float = Field(0.5, gt=0, le=1, description="mid-point of second_order, as a share of the step in log-SNR")
    form: Form = Field("x0", description="what second_order blends: x0 or eps predictions")
    extra_conditioning: tuple[ExtraCondition, ...] = Field(
        (), description="what the network is told beside x and t: s, w (omega)"
    )
    solver: SolverName = Field("ddim", description="the teacher's step: ddim, euler, heun, dpm_2, dpmpp_2s")
    guidance: Guidance = Field(Guidance(), description="of the teacher's step")
    target: Target = Field("self", description="self (the student under stop-gradient) or ema")
    target_decay: float = Field(0.95, gt=0, lt=1, description="decay of the ema target")
    compare: Compare = Field("landing", description="where: landing, or end (both pushed on by the target)")
    distance: DistanceName = Field("l2", description="l2, huber (element-wise), huber_norm, features, latent_lpips")
    huber_c: float = Field(1e-3, gt=0, description="c of huber; huber_norm takes c times the root of the dimension")
    weight: Weight = Field(
        "none",
        description="eps, x0, v divide differences by the landing's derivative by them; step divides the loss by the "
        "step's width in noise level (iCT)",
    )
    balance: Literal["fixed", "gradient"] = Field(
        "fixed", description="gradient: the other terms pull as the consistency loss does, times their weights (CTM)"
    )
    consistency: float = Field(1.0, ge=0, description="weight of the consistency loss itself; 0 leaves the other terms")
    adversarial: AdversarialConfig = Field(AdversarialConfig(), description="a critic beside it")
    matching: MatchingConfig = Field(MatchingConfig(), description="distribution matching beside it")
    reward: RewardConfig = Field(RewardConfig(), description="a reward beside it")
    denoising: float = Field(0.0, ge=0, description="weight of the denoising loss, CTM's second term")
    end: End = Field("index0", description="the end point: clean (sigma = 0) or index0 (sigma = .029 on SD's path)")

    @field_validator("distance", mode="before")
    @classmethod
    def _current_distance(cls, value: Any) -> Any:
        """Read the distance under its old name."""
        return "latent_lpips" if value == "perceptual" else value

    @model_validator(mode="after")
    def _legal(self) -> Self:
        count = self.points
        if count < 2:
            raise ValueError(f"grid = {self.grid} has less than 2 points; the nearest legal one is 2")
        if self.k >= count:
            raise ValueError(f"k = {self.k} must be below grid = {count}; the nearest legal one is {count - 1}")
        if self.k_low is not None and self.k_low > self.k:
            raise ValueError(f"k_low = {self.k_low} is above k; the nearest legal one is {self.k}")
        if count % self.segments:
            legal = nearest_divisor(self.segments, count)
            raise ValueError(
                f"segments = {self.segments}: its edges are no points of the grid of {count}; the nearest is {legal}"
            )
        width = count // self.segments
        if self.segments > 1 and self.k > width:
            raise ValueError(f"k = {self.k} leaves a segment of {width} points; the nearest legal one is {width}")
        low, high = self.inference_steps
        if self.s == "inference" and not 1 <= low <= high <= count:
            legal_steps = sorted((min(max(low, 1), count), min(max(high, 1), count)))
            raise ValueError(f"inference_steps = [{low}, {high}] on {count} points; the nearest is {legal_steps}")
        if not isinstance(self.grid, int) and sorted(set(self.grid)) != list(self.grid):
            raise ValueError(f"grid = {list(self.grid)} does not rise; the nearest is {sorted(set(self.grid))}")
        self._check_growth()
        self._check_jump()
        self._check_sides()
        self._check_terms()
        return self

    def _check_growth(self) -> None:
        if self.grid_start is None:
            return
        legal = [self.points >> i for i in range(self.points.bit_length()) if self.points % (1 << i) == 0]
        if self.grid_start not in legal:
            near = min(legal, key=lambda count: abs(count - (self.grid_start or 0)))
            raise ValueError(
                f"grid_start = {self.grid_start} does not come to grid = {self.points} by doubling; the nearest legal "
                f"one is {near}"
            )
        for field, value in (("start", self.start), ("point", self.point)):
            if value in ("rollout", "self"):  # both count steps between neighbours of the whole grid
                raise ValueError(
                    f"grid_start = {self.grid_start} does not go with {field} = {value!r}, which needs the whole grid; "
                    "leave it out"
                )

    def _check_jump(self) -> None:
        if self.jump in ("skip", "cm_skip") and (self.s != "edge" or self.segments != 1):
            raise ValueError(
                f"jump = {self.jump!r} only reaches the end point, not s = {self.s!r} in {self.segments} segments; "
                "the nearest legal jump is 'first_order'"
            )
        if self.jump in ("skip", "cm_skip") and "s" in self.extra_conditioning:
            raise ValueError(f"told = 's' says nothing to jump = {self.jump!r}, whose s is the end point; leave it out")
        if self.jump == "second_order" and self.end == "clean":
            raise ValueError(
                "jump = 'second_order' has no mid-point onto clean data (sigma = 0); the nearest legal end is 'index0'"
            )
        if self.point == "self" and self.jump in ("skip", "cm_skip"):
            raise ValueError(
                f"point = 'self' asks jump = {self.jump!r} for t_n, which only reaches the end point; "
                "the nearest legal jump is 'first_order'"
            )
        if self.point == "self" and self.k > 1:
            width = self.points // self.segments
            if self.k_low != 1:
                raise ValueError(
                    f"k_low = {self.k_low} with point = 'self' leaves the times up to {self.k_low or self.k} points "
                    "above a segment's edge without gradient; the nearest legal one is 1"
                )
            if self.k >= width:
                raise ValueError(
                    f"k = {self.k} with point = 'self' leaves no second jump in a segment of {width} points, and so no "
                    f"gradient; the nearest legal one is {max(width - 1, 1)}"
                )
        if self.weight not in ("none", "step"):
            looks = self.distance != "features" and (self.distance != "latent_lpips" or self.weight == "x0")
            for field, value, fits in (
                ("jump", self.jump, self.jump == "first_order"),
                ("compare", self.compare, self.compare == "landing"),
                ("distance", self.distance, looks),
            ):
                if not fits:
                    raise ValueError(
                        f"weight = {self.weight!r} is a first-order jump's pull on where it lands, which {field} = "
                        f"{value!r} does not look at; the nearest legal weight is 'none'"
                    )

    def _check_sides(self) -> None:
        if self.point == "stored" and (self.start, self.solver, self.substeps) != ("trajectory", "ddim", 1):
            raise ValueError(
                f"point = 'stored' is one ddim step by predictions that start = {self.start!r}, solver = "
                f"{self.solver!r}, substeps = {self.substeps} do not have; the nearest legal point is 'solver'"
            )
        if self.point == "path" and self.start in ("rollout", "student"):
            raise ValueError(
                f"point = 'path' asks for a path through start = {self.start!r}, which has none; "
                "the nearest legal point is 'solver'"
            )
        if self.start == "student" and self.student_steps > self.points:
            raise ValueError(
                f"student_steps = {self.student_steps} on {self.points} points; the nearest legal one is {self.points}"
            )
        if self.s == "next" and self.start == "trajectory" and self.point != "path":
            raise ValueError(
                f"s = 'next' regresses onto stored points, not on point = {self.point!r}; the nearest legal is 'path'"
            )
        if self.s == "next" and self.start != "trajectory":
            raise ValueError(
                f"s = 'next' regresses onto stored points, start = {self.start!r} has none; "
                "the nearest legal one is 'uniform'"
            )
        if self.point == "path" and self.start == "data" and self.guidance.convention != "none":
            raise ValueError(
                "point = 'path' on noised data has no teacher to guide; set guidance.convention = 'none' "
                "(the nearest legal one)"
            )
        critic = self.adversarial
        if critic.weight and critic.real == "data" and critic.noise == 0 and not self.compares_at_end:
            raise ValueError(
                "adversarial.real = 'data' beside jumps that land before the end needs adversarial.noise; "
                "the nearest legal real is 'target'"
            )
        if self.compare == "end" and self.target != "ema":
            raise ValueError(
                "compare = 'end' pushes the student's jump on by frozen weights; the nearest legal target is 'ema'"
            )
        if self.denoising and self.guidance.convention != "none":
            raise ValueError(
                "denoising fits the data, which know no guidance; the nearest legal guidance.convention is 'none'"
            )
        if self.denoising and "s" not in self.extra_conditioning:
            raise ValueError("denoising needs a network that can be asked for s = t; the nearest legal told is ['s']")

    def _check_terms(self) -> None:
        critic = self.adversarial
        others = bool(self.denoising or critic.weight or self.matching.weight or self.reward.weight)
        if not self.consistency and not others:
            raise ValueError("consistency = 0 leaves nothing to minimise; the nearest legal one is 1")
        first = self.consistency or self.denoising or self.matching.weight or self.reward.weight
        if critic.weight and critic.start and not first:
            raise ValueError(
                f"adversarial.start = {critic.start:g} beside consistency = 0 leaves nothing to minimise until then; "
                "the nearest legal one is 0"
            )
        if self.balance == "gradient" and not others:
            raise ValueError("balance = 'gradient' has no other term to balance; the nearest legal one is 'fixed'")
        if self.balance == "gradient" and not self.consistency:
            raise ValueError(
                "balance = 'gradient' beside consistency = 0 balances with nothing; the nearest is 'fixed'"
            )
        if self.start != "data" and self.denoising:
            raise ValueError(f"denoising needs data, start = {self.start!r} has none; the nearest legal denoising is 0")
        if self.start in ("trajectory", "rollout") and self.adversarial.weight and self.adversarial.real == "data":
            raise ValueError(
                f"adversarial.real = 'data' beside start = {self.start!r}, which has none; the nearest is 'target'"
            )
        for name, weight in (("reward", self.reward.weight), ("matching", self.matching.weight)):
            if weight and not self.compares_at_end:
                raise ValueError(
                    f"{name} looks at where drawing ends, jumps to s = {self.s!r} in {self.segments} segments land "
                    "before it; the nearest legal s is 'edge', with segments = 1"
                )
        if self.matching.weight and self.matching.fit == "sample" and self.start != "student":
            raise ValueError(
                f"matching.fit = 'sample' needs start = 'student', start = {self.start!r} draws no samples of the "
                "student's; the nearest legal one is 'landing'"
            )
        if self.matching.weight and self.matching.omega and self.guidance.convention == "none":
            raise ValueError(
                f"matching.omega = {self.matching.omega:g} guides what guidance.convention = 'none' does not; "
                "the nearest legal one is 0"
            )
        if "w" in self.extra_conditioning and self.guidance.convention == "none":
            raise ValueError("told = 'w' says which guidance was learnt, convention = 'none' has none; leave it out")
        if self.point == "path" and self.substeps > 1:
            raise ValueError(f"substeps = {self.substeps} of no solver: point = 'path'; the nearest legal one is 1")

    @property
    def points(self) -> int:
        """Points of the training grid."""
        return self.grid if isinstance(self.grid, int) else len(self.grid)

    def points_at(self, step: int, steps: int | None) -> int:
        """Return the grid's points at a step of a run of `steps`; None for its end.

        N(k) = min(s_0 2^floor(k/K'), s_1), K' = floor(K/(log2(s_1/s_0) + 1)) (iCT, arXiv 2310.14189, table 1), without
        the paper's + 1: it counts the end point, this grid does not.
        """
        if self.grid_start is None or steps is None:
            return self.points
        return min(self.grid_start << (step // max(steps // self.grid_lengths, 1)), self.points)

    @property
    def grid_lengths(self) -> int:
        """Numbers of points that a growing grid takes; 1 where it does not grow."""
        return (self.points // (self.grid_start or self.points)).bit_length()

    def phase(self, step: int, steps: int) -> tuple[int, bool]:
        """Return what of a step depends on the run's length: the grid's points, and whether the critic has started."""
        return self.points_at(step, steps), bool(self.adversarial.weight) and step / steps >= self.adversarial.start

    @property
    def rollout_steps(self) -> list[int]:
        """Teacher steps from noise to each point of the training grid, where start = rollout (TLCM, algorithm 1).

        R - i for a point in the i-th of R equal parts of the grid, from the clean end: L = M - s.
        """
        return [self.rollout - index * self.rollout // self.points for index in range(self.points)]

    @property
    def student_every(self) -> int:
        """Steps between two of the student's."""
        return self.matching.every if self.matching.weight else 1

    @property
    def compares_at_end(self) -> bool:
        """Whether jumps are compared at the end point, where terms that look at pictures can see them."""
        return self.compare == "end" or (self.s == "edge" and self.segments == 1)
