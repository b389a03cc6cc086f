"""The settings of a method: one row of the table of `docs/methods.md`. Read without torch.

`methods.consistency` is the loss that they fill in.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from fewstep.common.choices import (
    Compare,
    DistanceName,
    End,
    ExtraCondition,
    Follow,
    Form,
    Jump,
    Point,
    SolverName,
    SRule,
    Start,
    Target,
    Weight,
)
from fewstep.common.config import Config
from fewstep.common.errors import nearest_divisor
from fewstep.diffusion.config import GridSpec, Guidance, grid_size
from fewstep.methods.term_config import AdversarialConfig, MatchingConfig, RewardConfig, TangentConfig

REGRESSED = (("trajectory", "path"), ("simulation", "solver"), ("noise", "solver"))
"""Starts and next points of s = next."""
TO_THE_END = "needs jumps to the end point; use s = 'edge' and segments = 1"


class ConsistencyConfig(Config):
    """One row of the table of methods."""

    renamed = {"told": "extra_conditioning", "preference": "reward"}  # noqa: RUF012  (a class variable of the base)

    grid: GridSpec = Field(50, description="training grid: N points, or the points themselves, rising")
    grid_start: int | None = Field(
        None,
        ge=1,
        description="points of the grid at the first step of the run (or stage); they double up to all (iCT); null "
        "for all from the first step",
    )
    k: int = Field(1, ge=1, description="skip between t_{n+k} and t_n, in grid points (1 of 50 = 20 indices)")
    k_low: int | None = Field(None, ge=1, description="smallest skip, drawn up to k; null for k alone")
    substeps: int = Field(1, ge=1, description="solver steps between t_{n+k} and t_n")
    segments: int = Field(1, ge=1, description="M, segments of the grid; jumps stay inside one")
    s: SRule = Field("uniform", description="where jumps land: a rule of methods/times.py")
    inference_steps: tuple[int, int] = Field((4, 8), description="step counts whose times s = inference draws from")
    anchor: float = Field(
        0.0, ge=0, le=1, description="share of the samples of s = uniform with s = t_n, where the teacher is matched"
    )
    reach: float = Field(
        0.26, gt=0, le=1, description="largest distance of s = inference below t_n, as a share of the grid"
    )
    spread: float = Field(0.3, ge=0, le=1, description="s = inference shrinks s by up to this share, as gamma does")
    start: Start = Field(
        "data",
        description="where x_{t_n+k} comes from: data (noised), trajectory (the teacher's, stored), rollout (its steps "
        "from noise), student (own samples, noised), simulation (the student's steps from noise through the grid), "
        "noise",
    )
    rollout: int = Field(8, ge=1, description="R, teacher steps from noise to clean, where start = rollout")
    student_steps: int = Field(4, ge=1, description="q, jumps of each of the student's samples, where start = student")
    student_gamma: float = Field(
        0.0,
        ge=0,
        le=1,
        description="gamma of the student's steps, where start = simulation; 1 re-noises from the end point",
    )
    point: Point = Field(
        "solver",
        description="where x_{t_n} comes from: solver, path, self (own jump), stored; or a limit, in which k has no "
        "effect: eulerian (t_n -> t_{n+k} by the teacher) or lagrangian (t_n -> s by own jump)",
    )
    tangent: TangentConfig = Field(TangentConfig(), description="the limits")
    follow: Follow = Field(
        "teacher",
        description="whose steps lead to t_n: teacher, or start (the student that the run or stage starts from, frozen "
        "and unguided; its jumps may be long)",
    )
    jump: Jump = Field("first_order", description="skip (LCM's), cm_skip (CM's), first_order, second_order")
    r: float = Field(0.5, gt=0, le=1, description="mid-point of second_order, as a share of the step in log-SNR")
    form: Form = Field("x0", description="what second_order blends: x0 or eps predictions")
    extra_conditioning: tuple[ExtraCondition, ...] = Field(
        (), description="inputs of the network beside x, t and the prompt: s, w (omega)"
    )
    solver: SolverName = Field("ddim", description="the teacher's step: ddim, euler, heun, dpm_2, dpmpp_2s")
    guidance: Guidance = Field(Guidance(), description="of the teacher's step")
    target: Target = Field("self", description="self (the student under stop-gradient) or ema")
    target_decay: float = Field(0.95, gt=0, lt=1, description="decay of the ema target")
    compare: Compare = Field(
        "landing", description="where jumps are compared: landing, or end (the target continues both to it)"
    )
    distance: DistanceName = Field(
        "l2",
        description="l2, huber (element-wise), huber_norm, normalised (sCM's tangent), adaptive (MeanFlow's), "
        "features, latent_lpips",
    )
    huber_c: float = Field(
        1e-3,
        gt=0,
        description="c of huber, normalised and adaptive; huber_norm takes c times the root of the dimension",
    )
    adaptive_power: float = Field(0.5, ge=0, le=1, description="p of adaptive: its weight is 1/(|gap|^2 + c)^p")
    weight: Weight = Field(
        "none",
        description="divide the difference by the landing's derivative w.r.t. eps, x0, v or velocity; step: divide the "
        "loss by the step's width in noise level (iCT); learned: by its mean at each time (sCM)",
    )
    balance: Literal["fixed", "gradient"] = Field(
        "fixed", description="gradient: scale the other terms to the gradient norm of the consistency loss (CTM)"
    )
    consistency: float = Field(1.0, ge=0, description="weight of the consistency loss itself; 0 leaves the other terms")
    adversarial: AdversarialConfig = Field(AdversarialConfig(), description="a critic beside it")
    matching: MatchingConfig = Field(MatchingConfig(), description="distribution matching beside it")
    reward: RewardConfig = Field(RewardConfig(), description="a reward beside it")
    denoising: float = Field(
        0.0, ge=0, description="weight of the denoising loss: CTM's second term, or plain fine-tuning on its own"
    )
    end: End = Field("index0", description="the end point: clean (sigma = 0) or index0 (sigma = .029 on SD's path)")

    @field_validator("distance", mode="before")
    @classmethod
    def _current_distance(cls, value: Any) -> Any:
        """Read the distance under its old name."""
        return "latent_lpips" if value == "perceptual" else value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        """Refuse the first conflict of settings, a message that begins with the field."""
        checks = (
            *(self._grid_conflicts, self._jump_conflicts, self._points_conflicts, self._limit_conflicts),
            self._terms_conflicts,
        )
        for conflict in (message for check in checks for message in check()):
            raise ValueError(conflict)
        return self

    def _grid_conflicts(self) -> Iterator[str]:
        count, width = self.points, self.points // self.segments
        low, high = self.inference_steps
        if count < 2:
            yield f"grid = {self.grid} must have at least 2 points"
        if self.k >= count:
            yield f"k = {self.k} must be below the grid's {count} points"
        if self.k_low is not None and self.k_low > self.k:
            yield f"k_low = {self.k_low} must be at most k = {self.k}"
        divided = f"segments = {self.segments} must divide the grid's {count} points"
        if count % self.segments != 0:
            yield f"{divided}, e.g. {nearest_divisor(self.segments, count)}"
        if self.segments > 1 and self.k > width:
            yield f"k = {self.k} must be at most a segment's {width} points"
        if self.s == "inference" and not 1 <= low <= high <= count:
            yield f"inference_steps = [{low}, {high}] must rise within 1 to the grid's {count} points"
        if (self.start == "student" or self.matching.matched == "simulation") and self.student_steps > count:
            yield f"student_steps = {self.student_steps} must be at most the grid's {count} points"
        if self.grid_start is not None:
            doublings = [count >> i for i in range(count.bit_length()) if count % (1 << i) == 0]
            near = min(doublings, key=lambda points: abs(points - (self.grid_start or 0)))
            growing = f"grid_start = {self.grid_start}"
            if self.grid_start != near:
                yield f"{growing} must come to grid = {count} by doubling, e.g. {near}"
            for field, value in (("start", self.start), ("point", self.point)):
                if value in ("rollout", "simulation", "self"):  # they count steps between neighbours of the whole grid
                    yield f"{growing} cannot be used with {field} = {value!r}, which needs the whole grid"

    def _jump_conflicts(self) -> Iterator[str]:
        jump, skips = f"jump = {self.jump!r}", self.jump in ("skip", "cm_skip")
        anywhere = self.s != "edge" or self.segments != 1
        if skips and anywhere:
            yield f"{jump} only reaches the end point; use s = 'edge' and segments = 1"
        if skips and "s" in self.extra_conditioning:
            yield f"extra_conditioning = 's' has no effect with {jump}, which lands at the end point; remove it"
        if self.jump == "second_order" and self.end == "clean":
            yield f"{jump} has no mid-point onto clean data (sigma = 0); use end = 'index0'"
        if self.weight in ("none", "step", "learned"):
            return
        if self.jump != "first_order":
            yield f"weight = {self.weight!r} is the derivative of a first-order jump; use 'none' with {jump}"
        if self.compare != "landing":
            yield f"weight = {self.weight!r} is a landing's derivative; use 'none' with compare = {self.compare!r}"
        if self.distance == "features" or (self.distance == "latent_lpips" and self.weight != "x0"):
            yield f"weight = {self.weight!r} cannot be used with distance = {self.distance!r}; use 'none'"

    def _points_conflicts(self) -> Iterator[str]:
        point, start, width = f"point = {self.point!r}", f"start = {self.start!r}", self.points // self.segments
        guides = self.guidance.convention != "none"
        if self.point == "self":
            if self.jump in ("skip", "cm_skip"):
                yield f"{point} jumps to t_n, which jump = {self.jump!r} does not reach"
            # times fewer points above a segment's edge than k_low would never have a gradient
            if self.k > 1 and self.k_low != 1:
                yield f"k_low = {self.k_low} must be 1 with {point}"
            if 1 < self.k >= width:
                yield f"k = {self.k} must be below a segment's {width} points with {point}"
        if self.point == "stored" and (self.start, self.solver, self.substeps) != ("trajectory", "ddim", 1):
            yield f"{point} is one ddim step by stored outputs; use start = 'trajectory', solver = 'ddim', substeps = 1"
        if self.point == "path":
            if self.start not in ("data", "trajectory"):
                yield f"{point} has no path with {start}; use 'solver'"
            if self.substeps > 1:
                yield f"substeps = {self.substeps} has no effect with {point}; remove it"
            if self.start == "data" and guides:
                convention = f"guidance.convention = {self.guidance.convention!r}"
                yield f"{convention} has no teacher to guide with {point}; use 'none'"
        yield from self._follow_conflicts()
        if self.s == "next" and (self.start, self.point) not in REGRESSED:
            yield f"s = 'next' has no x_{{t_n}} to regress onto with {start}, {point}; use 'trajectory', 'path'"
        if self.start == "simulation" and self.student_gamma < 1 and self.jump in ("skip", "cm_skip"):
            yield f"{start} lands between, which jump = {self.jump!r} does not reach; use student_gamma = 1"
        if self.compare == "end" and self.target != "ema":
            yield f"compare = 'end' needs a frozen target, not target = {self.target!r}; use 'ema'"
        if "w" in self.extra_conditioning and not guides:
            yield "extra_conditioning = 'w' has no effect without guidance; remove it"

    def _follow_conflicts(self) -> Iterator[str]:
        if self.follow == "teacher":
            return
        follow = "follow = 'start'"
        if (self.jump, self.solver) != ("first_order", "ddim"):
            yield f"{follow} makes jumps of a student; use jump = 'first_order' and solver = 'ddim'"
        if self.start == "trajectory" or self.point == "path":
            yield f"{follow} has no effect with start = {self.start!r} and point = {self.point!r}; use 'teacher'"
        if self.extra_conditioning:
            yield f"{follow} has no inputs of extra_conditioning = {list(self.extra_conditioning)}; remove them"

    def _limit_conflicts(self) -> Iterator[str]:
        if self.anchor and self.s != "uniform":
            yield f"anchor = {self.anchor:g} has no effect with s = {self.s!r}; use 0"
        if not self.continuous:
            return
        point = f"with point = {self.point!r}"
        if self.start == "trajectory":
            yield f"start = 'trajectory' has no limit {point}; use 'data'"
        for field, only in (
            *(("jump", "first_order"), ("compare", "landing"), ("target", "self"), ("follow", "teacher")),
            ("substeps", 1),
        ):
            if getattr(self, field) != only:
                yield f"{field} = {getattr(self, field)!r} cannot be used {point}; use {only!r}"
        if self.weight not in ("none", "learned"):
            yield f"weight = {self.weight!r} cannot be used {point}, which compares outputs; use 'learned'"
        if self.distance in ("features", "latent_lpips"):
            yield f"distance = {self.distance!r} cannot be used {point}, which compares outputs; use 'l2'"
        if self.point == "lagrangian" and self.end == "clean":
            yield f"end = 'clean' is no time of the teacher, which is called where jumps land {point}; use 'index0'"

    def _terms_conflicts(self) -> Iterator[str]:
        critic, matching, start = self.adversarial, self.matching, f"start = {self.start!r}"
        guides = self.guidance.convention != "none"
        lasting = bool(self.denoising or matching.weight or self.reward.weight)
        others = lasting or bool(critic.weight)
        if not self.consistency and not others:
            yield "consistency = 0 leaves no loss without another term"
        if critic.weight and critic.start and not (self.consistency or lasting):
            yield f"adversarial.start = {critic.start:g} leaves no loss before it with consistency = 0; use 0"
        balanced = self.balance == "gradient"
        if balanced and not others:
            yield "balance = 'gradient' needs another term; use 'fixed'"
        if balanced and not self.consistency:
            yield "balance = 'gradient' needs consistency above 0; use 'fixed'"
        if self.denoising:
            denoising = f"denoising = {self.denoising:g}"
            if guides:
                yield f"{denoising} fits the data, which has no guidance; use guidance.convention = 'none'"
            if "s" not in self.extra_conditioning and not self.fine_tunes:
                yield f"{denoising} needs extra_conditioning = ['s'], for s = t"
            if self.start != "data":
                yield f"{denoising} needs data, which {start} does not have; use 0"
        if critic.weight and critic.real == "data":
            real = "adversarial.real = 'data'"
            if critic.noise == 0 and not self.compares_at_end:
                yield f"{real} needs adversarial.noise, or jumps compared at the end point; use 'target'"
            if self.start in ("trajectory", "rollout"):
                yield f"{real} cannot be used with {start}; use 'target'"
        if self.reward.weight and not self.compares_at_end:
            yield f"reward.weight = {self.reward.weight:g} {TO_THE_END}"
        yield from self._matching_conflicts()

    def _matching_conflicts(self) -> Iterator[str]:
        matching, start = self.matching, f"start = {self.start!r}"
        if not matching.weight:
            return
        simulates = matching.matched == "simulation"
        if simulates and (self.start != "noise" or self.jump in ("skip", "cm_skip") or self.student_steps < 2):
            yield "matching.matched = 'simulation' needs start = 'noise', jumps to any s and 2 student_steps or more"
        if not simulates and not self.compares_at_end and (matching.levels, self.jump) != ("jump", "first_order"):
            yield f"matching.weight = {matching.weight:g} {TO_THE_END}"
        if matching.fit == "sample" and self.start != "student":
            yield f"matching.fit = 'sample' needs start = 'student', not {start}; use 'landing'"
        if matching.omega and self.guidance.convention == "none":
            yield f"matching.omega = {matching.omega} needs guidance.convention other than 'none'; use 0"

    @property
    def fine_tunes(self) -> bool:
        """Whether the denoising loss is the only one: the diffusion model itself is trained, and no jump."""
        others = (self.consistency, self.adversarial.weight, self.matching.weight, self.reward.weight)
        return bool(self.denoising) and not any(others)

    @property
    def continuous(self) -> bool:
        """Whether the two jumps of a pair start infinitely near each other, or land so."""
        return self.point in ("eulerian", "lagrangian")

    @property
    def points(self) -> int:
        """Number of points of the training grid."""
        return grid_size(self.grid)

    def points_at(self, step: int, steps: int | None) -> int:
        """Return the number of points at a step of a run of `steps` steps; None for its end.

        N(k) = min(s_0 2^floor(k/K'), s_1), K' = floor(K/(log2(s_1/s_0) + 1)) (iCT, arXiv 2310.14189, table 1), without
        the paper's + 1: it counts the end point, this grid does not.
        """
        if self.grid_start is None or steps is None:
            return self.points
        return min(self.grid_start << (step // max(steps // self.grid_lengths, 1)), self.points)

    @property
    def grid_lengths(self) -> int:
        """Number of sizes that a growing grid has; 1 where it does not grow."""
        return (self.points // (self.grid_start or self.points)).bit_length()

    def phase(self, step: int, steps: int) -> tuple[int, bool]:
        """Return the number of grid points at a step, and whether the critic has started."""
        return self.points_at(step, steps), bool(self.adversarial.weight) and step / steps >= self.adversarial.start

    @property
    def rollout_steps(self) -> list[int]:
        """Teacher steps from noise to each point of the grid, where start = rollout.

        R - i for a point in the i-th of R equal parts of the grid, from the clean end: L = M - s (TLCM, arXiv
        2406.05768, algorithm 1).
        """
        return [self.rollout - index * self.rollout // self.points for index in range(self.points)]

    @property
    def student_every(self) -> int:
        """Steps of the run for one update of the student."""
        return self.matching.every if self.matching.weight else 1

    @property
    def compares_at_end(self) -> bool:
        """Whether jumps are compared at the end point, as terms on clean pictures need."""
        return self.compare == "end" or (self.s == "edge" and self.segments == 1)

    @property
    def matches_at_end(self) -> bool:
        """Whether what is matched lies at the end point."""
        return self.compares_at_end or self.matching.matched == "simulation"
