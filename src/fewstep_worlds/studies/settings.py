"""Settings of the studies. Light: validated before torch is imported."""

from __future__ import annotations

from typing import Annotated, Literal, Self, get_args

from pydantic import Field, model_validator

from fewstep.common.config import Config
from fewstep.common.errors import did_you_mean
from fewstep.inference.multilingual.settings import AdapterConfig
from fewstep.methods.recipes import rows
from fewstep.training.config import LoopConfig, OptimConfig

Rate = Annotated[float, Field(gt=0)]
Omega = Annotated[float, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, le=89)]
"""Seeds from 90 on are for choosing settings."""


class DemoConfig(Config):
    """The demo's budget: small enough for ten minutes on two cores."""

    steps: int = Field(70, ge=1, description="optimiser steps of each student")
    batch: int = Field(64, ge=1, description="samples a step")
    lr: float = Field(1e-3, gt=0, description="learning rate of both students")
    prompts: int = Field(100, ge=100, description="prompts drawn and measured, at most those of the world's list")
    gamma: float = Field(0.2, ge=0, le=1, description="TCD's gamma at every step count")
    shown: int = Field(8, ge=1, description="prompts in the sheets of pictures")
    seed: Seed = Field(0, description="seed of training and of the noise, 0 to 89")


class ChineseConfig(Config):
    """Chinese prompts beside English ones."""

    adapter: str = Field("", description="folder of an adapter; empty to train one from the bundled world's text pairs")
    lora: str = Field("tcd", description="student: tcd (bundled), a LoRA file or folder")
    steps: int = Field(4, ge=1, description="network calls of the student")
    teacher_steps: int = Field(25, ge=1, description="steps of the teacher, guided DDIM")
    prompts: int = Field(500, ge=20, description="prompts of each set, at most")
    shown: int = Field(8, ge=1, description="prompts in the picture grids")
    training: AdapterConfig = Field(AdapterConfig(), description="how an adapter is trained, where none is named")
    seed: Seed = Field(0, description="seed of the noise, 0 to 89")


class AddOnConfig(Config):
    """Training of one add-on on the base teacher."""

    steps: int = Field(500, ge=1, description="optimiser steps")
    batch: int = Field(32, ge=1, description="samples a step")
    lr: float = Field(3e-4, gt=0, description="learning rate")
    seed: Seed = Field(0, description="seed of the training, 0 to 89")

    @property
    def loop(self) -> LoopConfig:
        """The loop of the training."""
        return LoopConfig(
            steps=self.steps, batch=self.batch, seed=self.seed, save_every=100, log_every=20, precision="auto"
        )

    @property
    def optim(self) -> OptimConfig:
        """The optimiser of the training."""
        return OptimConfig(lr=self.lr, warmup=20, decay="cosine")


TaskName = Literal["community", "style", "edges", "shapes", "picture", "img2img", "inpainting", "super-resolution"]


class VersatilityConfig(Config):
    """Settings of the add-ons study: students that were not trained on them."""

    tasks: tuple[TaskName, ...] = Field(get_args(TaskName), min_length=1, description="rows of the table")
    tcd: str = Field("tcd", description="TCD student: tcd (bundled), a LoRA file or folder")
    tlcm: str = Field("", description="TLCM student: tlcm (bundled), a LoRA file or folder; empty to leave it out")
    steps: tuple[int, ...] = Field((2, 4, 8), description="network calls of the students")
    base_steps: int = Field(25, ge=1, description="steps of the base, guided DDIM")
    prompts: int = Field(96, ge=8, description="pictures drawn and measured with each")
    shown: int = Field(2, ge=1, le=8, description="pictures of each in the figure")
    community: AddOnConfig = Field(AddOnConfig(lr=2e-4), description="the fine-tuned checkpoint")
    style: AddOnConfig = Field(AddOnConfig(lr=1e-3), description="the style LoRA")
    edges: AddOnConfig = Field(AddOnConfig(steps=350, lr=5e-4), description="the ControlNet on edges")
    shapes: AddOnConfig = Field(AddOnConfig(steps=350, lr=5e-4), description="the ControlNet on silhouettes")
    picture: AddOnConfig = Field(AddOnConfig(lr=5e-4), description="the IP-Adapter")
    style_reader: AddOnConfig = Field(AddOnConfig(steps=300), description="the reader of the held-out style")
    seed: Seed = Field(0, description="seed of the noise, 0 to 89")


class FamilyConfig(Config):
    """All recipes at equal training cost."""

    recipes: tuple[str, ...] = Field((), description="recipes that are distilled; empty for all")
    evaluations: int = Field(60_000, ge=5_000, description="network evaluations that each student's training may take")
    batch: int = Field(64, ge=1, description="samples a step")
    lr: float = Field(1e-3, gt=0, description="learning rate of every student")
    prompts: int = Field(500, ge=500, description="prompts drawn and measured, at most those of the world's list")
    seed: Seed = Field(0, description="seed of training and of the noise, 0 to 89")

    @model_validator(mode="after")
    def _known(self) -> Self:
        known = rows()
        for recipe in self.recipes:
            if recipe not in known:
                raise ValueError(f"recipes = {list(self.recipes)}: no recipe {recipe!r}{did_you_mean(recipe, known)}")
        if len(set(self.recipes)) < len(self.recipes):
            raise ValueError(f"recipes = {list(self.recipes)} must be distinct")
        return self

    @property
    def chosen(self) -> tuple[str, ...]:
        """The recipes that are distilled."""
        return self.recipes or tuple(rows())


class TlcmConfig(Config):
    """TLCM's tables."""

    table: Literal[1, 2, 3] = Field(1, description="1: beside the teacher, LCM, TCD; 2: each ingredient; 3: p")
    seeds: tuple[Seed, ...] = Field((0, 1, 2), min_length=1, description="seeds of training and noise, 0 to 89")
    prompts: int = Field(1000, ge=500, description="prompts drawn and measured, at most those of the world's list")
    steps: tuple[int, ...] = Field((2, 3, 4, 5, 6, 8), min_length=1, description="steps of Table 1")
    p: tuple[int, ...] = Field((1, 2, 3, 4), min_length=1, description="teacher steps of Table 3")
    teacher_steps: int = Field(25, ge=1, description="steps of the teacher beside them")

    @model_validator(mode="after")
    def _legal(self) -> Self:
        for name, low, high in (("steps", 1, 8), ("p", 1, 99)):
            values = getattr(self, name)
            legal = sorted({min(max(value, low), high) for value in values})
            if list(values) != legal:
                raise ValueError(f"{name} = {list(values)} must rise within {low} to {high}")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds = {list(self.seeds)} must be distinct")
        return self


class BenchmarkConfig(Config):
    """The full benchmark."""

    steps: int = Field(300, ge=1, description="optimiser steps of each student")
    batch: int = Field(64, ge=1, description="samples a step")
    rates: tuple[Rate, ...] = Field(
        (3e-4, 1e-3, 3e-3), min_length=1, description="learning rates tried for both methods"
    )
    seeds: tuple[Seed, ...] = Field((0, 1, 2), min_length=1, description="seeds of training and noise, 0 to 89")
    prompts: int = Field(2000, ge=500, description="prompts drawn and measured, at most those of the world's list")
    omegas: tuple[Omega, ...] = Field(
        (1.0, 2.0, 3.0, 5.0, 8.0), min_length=1, description="guidance tried for the teacher"
    )
    gamma: float = Field(0.2, ge=0, le=1, description="TCD's gamma of the headline, at every step count")
    shown: int = Field(8, ge=1, description="prompts in the sheets of pictures")

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        for name in ("rates", "seeds", "omegas"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise ValueError(f"{name} = {list(values)} must be distinct")
        return self
