"""Settings of the trainings on sticker scenes. Light: validated before torch is imported."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Self

from pydantic import Field, model_validator

from fewstep.common.config import Config
from fewstep.evaluation.limits import FD_FEWEST
from fewstep.training.config import LoopConfig, OptimConfig
from fewstep_worlds.common.settings import AutoencoderShape, UnetShape, check_groups


class AutoencoderConfig(AutoencoderShape):
    """The teacher's autoencoder: 64x64 pictures to 16x16 latents of 4 channels."""

    autoencoder: str = Field("", description="folder of a finished AutoencoderKL of this shape to go on from")
    decoder_only: bool = Field(False, description="keep the encoder and so the latents; `autoencoder` must be given")
    first_scene: int = Field(0, ge=0, description="number of the first scene: above those of its training")
    channels: tuple[int, ...] = Field((32, 64, 96), description="channels at each resolution")
    latent_channels: int = Field(4, ge=1, description="channels of a latent")
    groups: int = Field(8, ge=1, description="groups of the group norms")
    beta: float = Field(1e-4, ge=0, description="weight of the KL term, per latent number")
    l1: float = Field(0.1, ge=0, description="weight of the absolute error beside the squared one")
    slopes: float = Field(0.5, ge=0, description="weight of the squared error of differences between neighbours")
    perceptual: float = Field(0.1, ge=0, description="weight of the distance between early features")
    critic_from: int = Field(8000, ge=0, description="step from which the critic's gradient is added")
    critic_share: float = Field(
        0.3, ge=0, description="length of the critic's gradient as a share of all other terms', at each picture"
    )
    critic_channels: tuple[int, ...] = Field((32, 64, 96), min_length=1, description="channels of the patch critic")
    workers: int = Field(1, ge=0, description="processes that draw scenes; 0 for the training process")
    loop: LoopConfig = LoopConfig(
        steps=20_000, batch=16, save_every=250, validate_every=1000, log_every=50, precision="bf16", keep=2
    )
    optim: OptimConfig = OptimConfig(
        lr=1e-3, betas=(0.9, 0.99), warmup=100, decay="cooldown", ema=0.999, weight_decay=0.01
    )
    critic_optim: OptimConfig = OptimConfig(lr=2e-4, betas=(0.5, 0.9), warmup=100)

    @model_validator(mode="after")
    def _has_an_encoder(self) -> Self:
        if self.decoder_only and not self.autoencoder:
            raise ValueError("decoder_only keeps the encoder of `autoencoder`, which is empty; name its folder")
        return self


class ReaderConfig(Config):
    """The reader: a network that finds stickers and background of a picture."""

    channels: tuple[int, int, int] = Field((48, 96, 160), description="channels at 32x32, 16x16 and 8x8")
    blocks: tuple[int, int, int] = Field((1, 2, 2), description="residual blocks at each resolution")
    groups: int = Field(8, ge=1, description="groups of the group norms")
    damaged: float = Field(0.5, ge=0, le=1, description="share of pictures that are blurred and noised")
    blur: float = Field(1.2, ge=0, description="largest standard deviation of the blur, in pixels")
    noise: float = Field(0.2, ge=0, description="largest standard deviation of the noise, pictures being in [-1, 1]")
    reader: str = Field("", description="folder of a reader of this shape to go on from; empty for a fresh one")
    first_scene: int = Field(0, ge=0, description="number of the first scene: above those of its training")
    workers: int = Field(1, ge=0, description="processes that draw scenes; 0 for the training process")
    loop: LoopConfig = LoopConfig(
        steps=8000, batch=32, save_every=250, validate_every=1000, log_every=50, precision="bf16", seed=2
    )
    optim: OptimConfig = OptimConfig(
        lr=1e-3, betas=(0.9, 0.99), warmup=200, decay="cooldown", ema=0.998, weight_decay=0.02
    )

    @model_validator(mode="after")
    def _divides(self) -> Self:
        check_groups(self.channels, self.groups)
        return self


class RewardConfig(Config):
    """The preference scorer: a network that compares a picture with a prompt."""

    channels: tuple[int, int, int] = Field((32, 64, 96), description="channels at 32x32, 16x16 and 8x8")
    blocks: tuple[int, int] = Field((2, 2), description="residual blocks at 16x16 and 8x8")
    groups: int = Field(4, ge=1, description="groups of the group norms")
    width: int = Field(96, ge=4, multiple_of=4, description="numbers of a word's state")
    layers: tuple[int, int] = Field((2, 1), description="layers of the transformer before and after words query cells")
    others: int = Field(5, ge=0, description="prompts of other scenes that a picture is compared with")
    damaged: float = Field(0.5, ge=0, le=1, description="share of pictures that are blurred and noised")
    blur: float = Field(1.5, ge=0, description="largest standard deviation of the blur, in pixels")
    noise: float = Field(0.25, ge=0, description="largest standard deviation of the noise, pictures being in [-1, 1]")
    workers: int = Field(1, ge=0, description="processes that draw scenes; 0 for the training process")
    loop: LoopConfig = LoopConfig(
        steps=8000, batch=32, save_every=250, validate_every=1000, log_every=50, precision="bf16", seed=3
    )
    optim: OptimConfig = OptimConfig(
        lr=1.5e-3, betas=(0.9, 0.99), warmup=200, decay="cooldown", ema=0.998, weight_decay=0.02
    )

    @model_validator(mode="after")
    def _divides(self) -> Self:
        check_groups(self.channels, self.groups)
        return self


class TeacherConfig(UnetShape):
    """The teacher: an eps-prediction UNet over 16x16 latents with cross-attention to the text states below the top."""

    renamed: ClassVar[Mapping[str, str]] = {"watched": "validation_prompts", "watch_steps": "validation_steps"}

    autoencoder: str = Field("", description="folder of the finished AutoencoderKL")
    text: str = Field("", description="folder with the text_encoder/ and tokenizer/ to trim; empty for the bundled")
    text_layers: int = Field(2, ge=1, description="first layers of that text encoder that are kept")
    train_text: bool = Field(True, description="train the text encoder's layers with the UNet; its embeddings are kept")
    reader: str = Field("", description="folder of a reader that measures validation samples; empty for none")
    unet: str = Field("", description="folder of a UNet of this shape to go on from; empty for a fresh one")
    first_scene: int = Field(0, ge=0, description="number of the first scene: above those that the UNet was trained on")
    channels: tuple[int, ...] = Field((64, 128, 128), description="channels at each resolution; the first has no text")
    noises: int = Field(2, ge=1, description="samples of a scene, each with its own noise level and noise")
    omega: float = Field(2.0, ge=0, description="default guidance of the teacher, in the papers' convention")
    validation_prompts: int = Field(500, ge=0, description="unseen prompts of a validation; 0 for none")
    validation_steps: int = Field(25, ge=1, description="steps of guided DDIM of validation samples")
    workers: int = Field(1, ge=0, description="processes that draw scenes; 0 for the training process")
    loop: LoopConfig = LoopConfig(
        steps=60_000, batch=64, save_every=500, validate_every=4000, log_every=50, precision="bf16", keep=2
    )
    optim: OptimConfig = OptimConfig(
        kind="muon", lr=1e-3, betas=(0.9, 0.99), warmup=100, decay="cooldown", ema=0.998, weight_decay=0.01
    )

    @model_validator(mode="after")
    def _legal(self) -> Self:
        if 0 < self.validation_prompts < FD_FEWEST:
            raise ValueError(
                f"validation_prompts = {self.validation_prompts} must be 0 or at least {FD_FEWEST}, as FD needs"
            )
        return self
