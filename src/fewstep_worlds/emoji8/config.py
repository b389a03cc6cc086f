"""Settings of the bundled world's commands. Light: validated before torch is imported."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from fewstep.common.config import Config
from fewstep.common.run_inputs import Content
from fewstep.training.config import LoopConfig, OptimConfig
from fewstep_worlds.common.settings import AutoencoderShape, UnetShape


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
