"""Settings and limits of evaluation. Light: read before torch is imported."""

from __future__ import annotations

from pydantic import Field

from fewstep.common.config import Config

FD_FEWEST = 500
"""Pictures below which FD is refused: its own bias would rule."""
FD_ADVISED = 1000
"""Pictures from which FD is worth quoting."""
KID_FEWEST = 10
"""Pictures below which KID is refused."""


class ScorerConfig(Config):
    """Shape of the scorer's trained parts."""

    channels: tuple[int, ...] = Field(default=(48, 80, 128), description="channels at 32x32, 16x16, 8x8")
    blocks: tuple[int, ...] = Field(default=(1, 2, 2), description="residual blocks at each resolution")
    groups: int = Field(default=16, ge=1, description="groups of the group norms")
    hidden: int = Field(default=384, ge=1, description="hidden width of the text head")
    width: int = Field(default=256, ge=1, description="width of the common space")
