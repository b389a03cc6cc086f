"""Settings of what is trained on sticker scenes. Light: read, and refused, before torch is imported."""

from __future__ import annotations

from pydantic import Field

from fewstep.config import Config
from fewstep.loop_settings import LoopConfig, OptimConfig


class AutoencoderConfig(Config):
    """The teacher's autoencoder: 64x64 pictures to 16x16 latents of 4 channels."""

    channels: tuple[int, ...] = Field((32, 64, 96), description="channels at each resolution")
    layers: int = Field(1, ge=1, description="residual blocks at each resolution")
    latent_channels: int = Field(4, ge=1, description="channels of a latent")
    groups: int = Field(8, ge=1, description="groups of the group norms")
    beta: float = Field(1e-4, ge=0, description="weight of the KL term, per latent number")
    l1: float = Field(0.1, ge=0, description="weight of the absolute error beside the squared one")
    slopes: float = Field(0.5, ge=0, description="weight of the squared error of differences between neighbours")
    perceptual: float = Field(0.1, ge=0, description="weight of the distance between early features")
    critic_from: int = Field(8000, ge=0, description="step from which the patch critic's judgement counts")
    critic_share: float = Field(
        0.3, ge=0, description="length of the critic's gradient beside that of all other terms, at each picture"
    )
    critic_channels: tuple[int, ...] = Field((32, 64, 96), min_length=1, description="channels of the patch critic")
    workers: int = Field(1, ge=0, description="processes that draw scenes; 0 draws them in the training's own")
    loop: LoopConfig = LoopConfig(
        steps=20_000, batch=16, save_every=250, watch_every=1000, log_every=50, precision="bf16", keep=2
    )
    optim: OptimConfig = OptimConfig(
        lr=1e-3, betas=(0.9, 0.99), warmup=100, decay="cooldown", ema=0.999, weight_decay=0.01
    )
    critic_optim: OptimConfig = OptimConfig(lr=2e-4, betas=(0.5, 0.9), warmup=100)
