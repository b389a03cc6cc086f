"""Settings of what evaluation trains. Light: read before torch is imported."""

from __future__ import annotations

from pydantic import Field

from fewstep.config import Config


class ScorerConfig(Config):
    """Shape of the scorer's trained parts."""

    channels: tuple[int, ...] = Field(default=(48, 80, 128), description="channels at 32x32, 16x16, 8x8")
    blocks: tuple[int, ...] = Field(default=(1, 2, 2), description="residual blocks at each resolution")
    groups: int = Field(default=16, ge=1, description="groups of the group norms")
    hidden: int = Field(default=384, ge=1, description="hidden width of the text head")
    width: int = Field(default=256, ge=1, description="width of the common space")
