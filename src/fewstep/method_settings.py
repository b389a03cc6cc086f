"""The settings of a method: one row of the table of `docs/methods.md`. Light: refused before torch is imported.

Every recipe of the family fills in these choices and no others; what they mean together is `objectives.consistency`.
"""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from fewstep.config import Config
from fewstep.errors import nearest_divisor
from fewstep.names import (
    CALLS,
    CALLS_OF_JUMP,
    AdversarialKind,
    Compare,
    Convention,
    DistanceName,
    End,
    Form,
    Jump,
    Point,
    SLaw,
    SolverName,
    Start,
    Target,
    Told,
    Weight,
    omega_of,
)

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
        return 1 if self.convention == "none" else 2

    @property
    def mean_omega(self) -> float:
        """The guidance that a student which is not told omega learns, on average."""
        return sum(self.omegas) / 2


class AdversarialConfig(Config):
    """A critic beside the consistency loss (CTM, PCM, TDD)."""

    weight: float = Field(0.0, ge=0, description="weight of the adversarial term; 0 for none")
    kind: AdversarialKind = Field("hinge", description="hinge or nonsaturating")
    real: Literal["data", "target"] = Field("data", description="what is real: the data, or where the target lands")
    noise: float = Field(
        0.0, ge=0, le=1, description="the critic sees points noised up to this share of what lies above in the segment"
    )
    r1: float = Field(0.0, ge=0, description="weight of R1, the squared gradient of the critic on real points")
    lr: float = Field(1e-4, gt=0, description="the critic's learning rate")
    every: int = Field(1, ge=1, description="steps between two of the critic's")


class ConsistencyConfig(Config):
    """One row of the table of methods."""

    grid: GridSpec = Field(50, description="training grid: N points, or the points themselves, rising")
    k: int = Field(1, ge=1, description="skip between t_{n+k} and t_n, in grid points (1 of 50 = 20 indices)")
    k_low: int | None = Field(None, ge=1, description="smallest skip, drawn up to k; null for k alone")
    substeps: int = Field(1, ge=1, description="solver steps between t_{n+k} and t_n")
    segments: int = Field(1, ge=1, description="M, segments of the grid; jumps stay inside one")
    s: SLaw = Field("uniform", description="where jumps land: edge (of the segment), uniform, inference, next")
    inference_steps: tuple[int, int] = Field((4, 8), description="step counts whose times s = inference draws from")
    reach: float = Field(0.26, gt=0, le=1, description="how far below t_n s = inference looks, as a share of the grid")
    spread: float = Field(0.3, ge=0, le=1, description="s = inference shrinks s by up to this share, as gamma does")
    start: Start = Field("data", description="where x_{t_n+k} comes from: data (noised) or trajectory (the teacher's)")
    point: Point = Field("solver", description="where x_{t_n} comes from: solver (teacher's), path, self (own jump)")
    jump: Jump = Field("first_order", description="skip (LCM's), cm_skip (CM's), first_order, second_order")
    r: float = Field(0.5, gt=0, le=1, description="mid-point of second_order, as a share of the step in log-SNR")
    form: Form = Field("x0", description="what second_order blends: x0 or eps predictions")
    told: tuple[Told, ...] = Field((), description="what the network is told beside x and t: s, w (omega)")
    solver: SolverName = Field("ddim", description="the teacher's step: ddim, euler, heun, dpm_2, dpmpp_2s")
    guidance: Guidance = Field(Guidance(), description="of the teacher's step")
    target: Target = Field("self", description="self (the student under stop-gradient) or ema")
    target_decay: float = Field(0.95, gt=0, lt=1, description="decay of the ema target")
    compare: Compare = Field("landing", description="where: landing, or end (both pushed on by the target)")
    distance: DistanceName = Field("l2", description="l2, huber (element-wise), huber_norm (per sample), features")
    huber_c: float = Field(1e-3, gt=0, description="c of huber; huber_norm takes c times the root of the dimension")
    weight: Weight = Field("none", description="differences are divided by the pull of: none, eps, x0, v")
    balance: Literal["fixed", "gradient"] = Field(
        "fixed", description="gradient: the other terms pull as the consistency loss does, times their weights (CTM)"
    )
    consistency: float = Field(1.0, ge=0, description="weight of the consistency loss itself; 0 leaves the other terms")
    adversarial: AdversarialConfig = Field(AdversarialConfig(), description="a critic beside it")
    denoising: float = Field(0.0, ge=0, description="weight of the denoising loss, CTM's second term")
    end: End = Field("index0", description="the end point: clean (sigma = 0) or index0 (sigma = .029 on SD's path)")

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
        self._check_jump()
        self._check_sides()
        self._check_terms()
        return self

    def _check_jump(self) -> None:
        if self.jump in ("skip", "cm_skip") and (self.s != "edge" or self.segments != 1):
            raise ValueError(
                f"jump = {self.jump!r} only reaches the end point, not s = {self.s!r} in {self.segments} segments; "
                "the nearest legal jump is 'first_order'"
            )
        if self.jump in ("skip", "cm_skip") and "s" in self.told:
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
        if self.weight != "none":
            for field, value, fits in (
                ("jump", self.jump, self.jump == "first_order"),
                ("compare", self.compare, self.compare == "landing"),
                ("distance", self.distance, self.distance != "features"),
            ):
                if not fits:
                    raise ValueError(
                        f"weight = {self.weight!r} is a first-order jump's pull on where it lands, which {field} = "
                        f"{value!r} does not look at; the nearest legal weight is 'none'"
                    )

    def _check_sides(self) -> None:
        if self.start == "trajectory" and self.point != "path":
            raise ValueError("start = 'trajectory' stores the points themselves; the nearest legal point is 'path'")
        if self.s == "next" and (self.point, self.start) != ("path", "trajectory"):
            raise ValueError(
                f"s = 'next' regresses onto stored points, start = {self.start!r} has none; "
                "the nearest legal one is 'uniform'"
            )
        if self.point == "path" and self.start == "data" and self.guidance.convention != "none":
            raise ValueError(
                "point = 'path' on noised data has no teacher to guide; set guidance.convention = 'none' "
                "(the nearest legal one)"
            )
        if self.adversarial.real == "data" and self.adversarial.weight and self.adversarial.noise == 0:
            lands_clean = self.compare == "end" or (self.s == "edge" and self.segments == 1)
            if not lands_clean:
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
        if self.denoising and "s" not in self.told:
            raise ValueError("denoising needs a network that can be asked for s = t; the nearest legal told is ['s']")

    def _check_terms(self) -> None:
        others = bool(self.denoising or self.adversarial.weight)
        if not self.consistency and not others:
            raise ValueError("consistency = 0 leaves nothing to minimise; the nearest legal one is 1")
        if self.balance == "gradient" and not others:
            raise ValueError("balance = 'gradient' has no other term to balance; the nearest legal one is 'fixed'")
        if self.balance == "gradient" and not self.consistency:
            raise ValueError(
                "balance = 'gradient' beside consistency = 0 balances with nothing; the nearest is 'fixed'"
            )
        if self.start == "trajectory" and self.denoising:
            raise ValueError("denoising needs data, start = 'trajectory' has none; the nearest legal denoising is 0")
        if self.start == "trajectory" and self.adversarial.weight and self.adversarial.real == "data":
            raise ValueError(
                "adversarial.real = 'data' beside start = 'trajectory', which has none; the nearest legal is 'target'"
            )
        if "w" in self.told and self.guidance.convention == "none":
            raise ValueError("told = 'w' says which guidance was learnt, convention = 'none' has none; leave it out")
        if self.point == "path" and self.substeps > 1:
            raise ValueError(f"substeps = {self.substeps} of no solver: point = 'path'; the nearest legal one is 1")

    @property
    def points(self) -> int:
        """Points of the training grid."""
        return self.grid if isinstance(self.grid, int) else len(self.grid)

    @property
    def _jumps(self) -> dict[str, int]:
        """Network evaluations of both jumps of a pair, for one sample."""
        jump = CALLS_OF_JUMP[self.jump]
        teacher = self.substeps * CALLS[self.solver] * self.guidance.branches if self.point != "path" else 0
        target = 0 if self.s == "next" else jump * (1 + (self.point == "self"))
        pushed = 2 * jump if self.compare == "end" else 0
        return {"student": jump, "target": target + pushed, "teacher": teacher}

    @property
    def calls(self) -> dict[str, int]:
        """Network evaluations of one sample in one step, by role; the teacher's include the null branch.

        `features` are those of a frozen network's features, where a critic or the distance looks at them. What a
        critic's own step takes is `critic_calls`.
        """
        jumps = self._jumps
        features = bool(self.adversarial.weight) + 2 * (self.distance == "features")
        own = {**jumps, "student": jumps["student"] + bool(self.denoising)}
        return {**own, "features": features} if features else own

    @property
    def critic_calls(self) -> dict[str, int]:
        """Network evaluations of one sample in a step of the critic: the jumps again, and features of both points."""
        if not self.adversarial.weight:
            return {}
        jumps = self._jumps
        if self.adversarial.real == "target":
            return {**jumps, "features": 2}
        pushed = CALLS_OF_JUMP[self.jump] if self.compare == "end" else 0
        return {"student": jumps["student"], "target": pushed, "teacher": 0, "features": 2}

    @property
    def cost(self) -> float:
        """All network evaluations of one sample and step, a backward pass counted as two more."""
        with_gradient = self.calls["student"]
        with_gradient += bool(self.adversarial.weight) + (self.distance == "features")
        with_gradient += CALLS_OF_JUMP[self.jump] if self.compare == "end" else 0
        critic = sum(self.critic_calls.values()) + 2 * (self.adversarial.r1 > 0)
        return sum(self.calls.values()) + 2 * with_gradient + critic / self.adversarial.every
