"""Settings of the bundled world's commands. Light: validated before torch is imported."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from fewstep.common.config import Config
from fewstep.common.errors import did_you_mean
from fewstep.common.run_inputs import Content
from fewstep.inference.multilingual.settings import AdapterConfig
from fewstep.methods.recipes import rows
from fewstep.training.config import LoopConfig, OptimConfig
from fewstep_worlds.common.settings import AutoencoderShape, UnetShape

Rate = Annotated[float, Field(gt=0)]
Omega = Annotated[float, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, le=89)]
"""Seeds from 90 on are for choosing settings."""


class VaeConfig(AutoencoderShape):
    """The autoencoder: 64x64 pictures to 8x8 latents."""

    beta: float = Field(5e-4, ge=0, description="weight of the KL term, per latent number")
    l1: float = Field(0.1, ge=0, description="weight of the absolute error beside the squared one")
    loop: LoopConfig = LoopConfig(steps=2800, batch=16, save_every=200, validate_every=400, precision="bf16")
    optim: OptimConfig = OptimConfig(lr=6e-4, warmup=200, decay="cosine", ema=0.998, weight_decay=0.01)


class DecoderConfig(Config):
    """The decoder once more, alone, on noisy latents."""

    noise: float = Field(0.25, ge=0, description="largest standard deviation of the noise on latents")
    slopes: float = Field(1.0, ge=0, description="weight of the error of slopes beside that of pictures")
    loop: LoopConfig = LoopConfig(steps=2500, batch=16, save_every=250, validate_every=500, precision="bf16")
    optim: OptimConfig = OptimConfig(lr=5e-4, warmup=100, decay="cosine", ema=0.998, weight_decay=0.01)


class UnetConfig(UnetShape):
    """The denoiser: an eps-prediction UNet over 8x8 latents with cross-attention to the text states."""

    latent_channels: int = Field(16, ge=1, description="channels of a latent")
    text_width: int = Field(384, ge=1, description="width of the text states")
    captions: int = Field(12, ge=1, description="captions drawn once for each picture")
    start: Annotated[str, Content("start")] = Field(
        "", description="pipeline folder whose denoiser the training starts from; empty for none"
    )
    loop: LoopConfig = LoopConfig(
        steps=10000, batch=64, save_every=500, keep=3, validate_every=1000, log_every=50, precision="bf16"
    )
    optim: OptimConfig = OptimConfig(lr=5e-4, warmup=500, decay="cooldown", ema=0.9993, weight_decay=0.01)


class TeacherConfig(Config):
    """The bundled teacher's recipe."""

    text: str = Field("", description="folder with text_encoder/ and tokenizer/; empty for the bundled one")
    omega: float = Field(2.0, ge=0, description="default guidance of the teacher, in the papers' convention")
    autoencoder: str = Field("", description="folder of a finished AutoencoderKL to keep; empty to train one")
    vae: VaeConfig = Field(VaeConfig(), description="the autoencoder")
    unet: UnetConfig = Field(UnetConfig(), description="the denoiser")
    decoder: DecoderConfig = Field(DecoderConfig(), description="the autoencoder's decoder, after all else")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        ours, theirs = self.unet.latent_channels, self.vae.latent_channels
        if not self.autoencoder and ours != theirs:
            raise ValueError(
                f"unet.latent_channels = {ours} and vae.latent_channels = {theirs} differ; give both the same"
            )
        return self


class ScorerConfig(Config):
    """Shape of the scorer's trained parts."""

    channels: tuple[int, ...] = Field(default=(48, 80, 128), description="channels at 32x32, 16x16, 8x8")
    blocks: tuple[int, ...] = Field(default=(1, 2, 2), description="residual blocks at each resolution")
    groups: int = Field(default=16, ge=1, description="groups of the group norms")
    hidden: int = Field(default=384, ge=1, description="hidden width of the text head")
    width: int = Field(default=256, ge=1, description="width of the common space")


class AgreementConfig(Config):
    """Training of the scorer: symmetric contrastive loss on pictures and drawn captions."""

    network: ScorerConfig = ScorerConfig()
    captions: int = Field(default=12, ge=1, description="captions drawn once for each picture")
    loop: LoopConfig = LoopConfig(
        steps=800, batch=256, save_every=100, validate_every=100, log_every=10, precision="bf16", seed=7
    )
    optim: OptimConfig = OptimConfig(lr=2e-3, warmup=60, decay="cosine", ema=0.995, weight_decay=0.05)


class RewardConfig(AgreementConfig):
    """Training of the preference scorer: the same loss, another network, another seed, another text side."""

    network: ScorerConfig = ScorerConfig(channels=(32, 64, 112), blocks=(1, 1, 2), hidden=256, width=128)
    loop: LoopConfig = LoopConfig(
        steps=800, batch=256, save_every=100, validate_every=200, log_every=10, precision="bf16", seed=11
    )


class SecondScorerConfig(Config):
    """Training of the second scorer's heads."""

    width: int = Field(default=128, ge=1, description="width of the common space")
    captions: int = Field(default=12, ge=1, description="captions drawn once for each picture")
    loop: LoopConfig = LoopConfig(steps=600, batch=512, save_every=200, log_every=50, seed=23)
    optim: OptimConfig = OptimConfig(lr=2e-3, warmup=30, decay="cosine", ema=0.99, weight_decay=0.1)


class DemoConfig(Config):
    """The demo's budget: small enough for ten minutes on two cores."""

    steps: int = Field(80, ge=1, description="optimiser steps of each student")
    batch: int = Field(64, ge=1, description="samples a step")
    lr: float = Field(1e-3, gt=0, description="learning rate of both students")
    prompts: int = Field(100, ge=100, le=1000, description="open prompts drawn and measured")
    gamma: float = Field(0.2, ge=0, le=1, description="TCD's gamma at every step count")
    shown: int = Field(10, ge=1, description="prompts in the picture grid")
    seed: Seed = Field(0, description="seed of training and of the noise, 0 to 89")


class ChineseConfig(Config):
    """Chinese prompts beside English ones."""

    adapter: str = Field("", description="folder of an adapter; empty to train one from the bundled world's text pairs")
    lora: str = Field("tcd", description="student: tcd (bundled), a LoRA file or folder")
    steps: int = Field(3, ge=1, description="network calls of the student")
    teacher_steps: int = Field(25, ge=1, description="steps of the teacher, guided DDIM")
    concepts: int = Field(120, ge=20, le=120, description="concepts of the prompts, whose Chinese is held out")
    noises: int = Field(4, ge=1, description="pictures of each, from different noise")
    shown: int = Field(12, ge=1, description="concepts in the picture grid")
    training: AdapterConfig = Field(AdapterConfig(), description="how an adapter is trained, where none is named")
    seed: Seed = Field(0, description="seed of the noise, 0 to 89")


class AddOnConfig(Config):
    """Training of one add-on on the base teacher."""

    steps: int = Field(500, ge=1, description="optimiser steps")
    batch: int = Field(32, ge=1, description="samples a step")
    lr: float = Field(3e-4, gt=0, description="learning rate")
    seed: Seed = Field(0, description="seed of the training, 0 to 89")


class VersatilityConfig(Config):
    """Settings of the add-ons study: students that were not trained on them."""

    tcd: str = Field("tcd", description="TCD student: tcd (bundled), a LoRA file or folder")
    tlcm: str = Field("", description="TLCM student, a LoRA file or folder; empty to leave it out")
    steps: tuple[int, ...] = Field((2, 4, 8), description="network calls of the students")
    base_steps: int = Field(25, ge=1, description="steps of the base, guided DDIM")
    prompts: int = Field(96, ge=8, le=100, description="pictures drawn and measured with each")
    shown: int = Field(2, ge=1, le=8, description="pictures of each in the figure")
    pictures: int = Field(
        3000, ge=16, description="training pictures that an add-on learns from, at most; the IP-Adapter has all"
    )
    community: AddOnConfig = Field(AddOnConfig(steps=1500, lr=2e-4), description="the fine-tuned checkpoint")
    style: AddOnConfig = Field(AddOnConfig(steps=1200, lr=1e-3), description="the style LoRA")
    edges: AddOnConfig = Field(AddOnConfig(steps=1500, lr=5e-4), description="the ControlNet on edges")
    shapes: AddOnConfig = Field(AddOnConfig(steps=1500, lr=5e-4), description="the ControlNet on silhouettes")
    picture: AddOnConfig = Field(AddOnConfig(steps=1500, lr=2e-4), description="the IP-Adapter")
    seed: Seed = Field(0, description="seed of the noise, 0 to 89")


class FamilyConfig(Config):
    """All recipes at equal training cost."""

    recipes: tuple[str, ...] = Field((), description="recipes that are distilled; empty for all")
    evaluations: int = Field(60_000, ge=5_000, description="network evaluations that each student's training may take")
    batch: int = Field(64, ge=1, description="samples a step")
    lr: float = Field(1e-3, gt=0, description="learning rate of every student")
    prompts: int = Field(500, ge=500, le=1000, description="open prompts drawn and measured")
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
    prompts: int = Field(1000, ge=500, le=1000, description="open prompts drawn and measured")
    steps: tuple[int, ...] = Field((2, 3, 4, 5, 6, 8), min_length=1, description="network calls of Table 1")
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
    prompts: int = Field(1000, ge=500, le=1000, description="open prompts drawn and measured")
    omegas: tuple[Omega, ...] = Field(
        (1.0, 2.0, 3.0, 5.0, 8.0), min_length=1, description="guidance tried for the teacher"
    )
    gamma: float = Field(0.2, ge=0, le=1, description="TCD's gamma of the headline, at every step count")
    shown: int = Field(12, ge=1, description="prompts in the picture grid")

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        for name in ("rates", "seeds", "omegas"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise ValueError(f"{name} = {list(values)} must be distinct")
        return self
