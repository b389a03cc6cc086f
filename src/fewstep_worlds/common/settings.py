"""Shapes of the networks that worlds train."""

from __future__ import annotations

import math
from typing import Self

from pydantic import Field, model_validator

from fewstep.common.config import Config
from fewstep.common.errors import nearest_divisor


def check_groups(channels: tuple[int, ...], groups: int) -> None:
    """Refuse groups of the group norms that do not divide every number of channels.

    Raises:
        ValueError: they do not.
    """
    if math.gcd(*channels) % groups:
        legal = nearest_divisor(groups, math.gcd(*channels))
        raise ValueError(f"groups = {groups} must divide all of channels = {list(channels)}; use {legal}")


class AutoencoderShape(Config):
    """Shape of an AutoencoderKL."""

    channels: tuple[int, ...] = Field((32, 64, 128, 128), description="channels at each resolution")
    layers: int = Field(1, ge=1, description="residual blocks at each resolution")
    latent_channels: int = Field(16, ge=1, description="channels of a latent")
    groups: int = Field(16, ge=1, description="groups of the group norms")

    @model_validator(mode="after")
    def _divides(self) -> Self:
        check_groups(self.channels, self.groups)
        return self


class UnetShape(Config):
    """Shape of an eps-prediction UNet2DConditionModel, and the loss that it is trained by."""

    channels: tuple[int, ...] = Field((128, 128), description="channels at each resolution")
    layers: int = Field(1, ge=1, description="residual and attention blocks at each resolution")
    heads: int = Field(4, ge=1, description="attention heads")
    groups: int = Field(32, ge=1, description="groups of the group norms")
    prompt_dropout: float = Field(0.1, ge=0, le=1, description="share of empty prompts")
    snr_power: float = Field(0.5, ge=0, le=1, description="p of the loss's weight SNR^-p; 0 for a constant weight")

    @model_validator(mode="after")
    def _divides(self) -> Self:
        check_groups(self.channels, self.groups)
        return self
