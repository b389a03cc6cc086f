"""Settings of the latent perceptual distance. Light: read, and refused, before torch is imported."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Self

from pydantic import Field, model_validator

from fewstep.common.config import Config
from fewstep.common.errors import UserError
from fewstep.training.config import LoopConfig, OptimConfig

Width = Annotated[int, Field(ge=1)]
FEWEST_PROMPTS = 8
"""Distinct prompts: two each for validation and for the held-out figures, the rest to train on."""


class NetworkConfig(Config):
    """The network on latents: levels of residual blocks, each level at half the resolution of the one before."""

    widths: tuple[Width, ...] = Field((64, 96), min_length=1, max_length=3, description="channels at each level")
    blocks: tuple[int, ...] = Field((2, 1), description="residual blocks at each level; every one is a feature map")

    @model_validator(mode="after")
    def _levels(self) -> Self:
        if len(self.blocks) != len(self.widths) or min(self.blocks) < 1:
            legal = tuple(max(1, count) for count in (*self.blocks, *self.widths)[: len(self.widths)])
            raise ValueError(
                f"blocks = {list(self.blocks)} must name one block at least for each of widths = {list(self.widths)}; "
                f"the nearest is {[min(count, 2) for count in legal]}"
            )
        return self


class PairConfig(Config):
    """The pairs that it is trained on, all made from the teacher's latents."""

    groups: int = Field(256, ge=16, description="teacher latents that pairs are made around; even")
    steps: int = Field(10, ge=2, description="solver steps of these latents")
    omega: float | None = Field(None, ge=0, description="their guidance; null for what the teacher brings along")
    heldout: float = Field(0.125, gt=0, le=0.4, description="share of the prompts for validation, and held out: each")
    seed: int = Field(0, ge=0, le=2**40, description="seed of latents and pairs")

    @model_validator(mode="after")
    def _even(self) -> Self:
        if self.groups % 2:
            raise ValueError(f"groups = {self.groups} is odd: latents come in twos; the nearest is {self.groups + 1}")
        return self


class LatentLpipsTrainConfig(Config):
    """Training of the distance between latents."""

    network: NetworkConfig = Field(NetworkConfig(), description="the network")
    pairs: PairConfig = Field(PairConfig(), description="what it is taught")
    named: float = Field(2.0, gt=0, description="weight of pairs with a law of their own beside all others of a group")
    mirror: float = Field(
        0.5, ge=0, le=1, description="share of groups that are seen mirrored, at the distances they had before"
    )
    loop: LoopConfig = Field(
        LoopConfig(steps=400, batch=8, save_every=100, validate_every=100, log_every=20, precision="auto"),
        description="how long; the batch counts groups",
    )
    optim: OptimConfig = Field(
        OptimConfig(lr=2e-3, warmup=30, decay="cosine", ema=0.99, weight_decay=0.3), description="how fast"
    )


def check_prompts(prompts: Sequence[str]) -> list[str]:
    """The distinct prompts, in their order.

    Raises:
        UserError: fewer than can be split.
    """
    found = list(dict.fromkeys(prompts))
    if len(found) < FEWEST_PROMPTS:
        raise UserError(
            f"prompts holds {len(found)} distinct prompts; a perceptual distance needs at least {FEWEST_PROMPTS}, "
            "so that some can be held out"
        )
    return found
