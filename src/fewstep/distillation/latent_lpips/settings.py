"""Settings of the latent LPIPS distance. Light: validated before torch is imported."""

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
            raise ValueError(
                f"blocks = {list(self.blocks)} must be numbers from 1, one for each of widths = {list(self.widths)}"
            )
        return self


class PairConfig(Config):
    """The pairs of latents that the distance is trained on, made from the teacher's latents."""

    groups: int = Field(256, ge=16, description="groups of pairs, one around each teacher latent; an even number")
    steps: int = Field(10, ge=2, description="solver steps of these latents")
    omega: float | None = Field(None, ge=0, description="their guidance; null for the teacher's own")
    heldout: float = Field(0.125, gt=0, le=0.4, description="share of the prompts for validation, and held out")
    seed: int = Field(0, ge=0, le=2**40, description="seed of latents and pairs")

    @model_validator(mode="after")
    def _even(self) -> Self:
        if self.groups % 2:
            raise ValueError(f"groups = {self.groups} must be even: each group has a partner; use {self.groups + 1}")
        return self


class LatentLpipsTrainConfig(Config):
    """Training of the distance between latents."""

    network: NetworkConfig = Field(NetworkConfig(), description="the network")
    pairs: PairConfig = Field(PairConfig(), description="the pairs that it is trained on")
    named: float = Field(2.0, gt=0, description="loss weight of the named pairs; all others of a group have 1")
    mirror: float = Field(0.5, ge=0, le=1, description="share of groups that are mirrored, with the same distances")
    loop: LoopConfig = Field(
        LoopConfig(steps=400, batch=8, save_every=100, validate_every=100, log_every=20, precision="auto"),
        description="training loop; the batch is a number of groups",
    )
    optim: OptimConfig = Field(
        OptimConfig(lr=2e-3, warmup=30, decay="cosine", ema=0.99, weight_decay=0.3), description="optimiser"
    )


def check_prompts(prompts: Sequence[str]) -> list[str]:
    """Return the distinct prompts, in their order.

    Raises:
        UserError: fewer than can be split.
    """
    found = list(dict.fromkeys(prompts))
    if len(found) < FEWEST_PROMPTS:
        raise UserError(
            f"prompts holds {len(found)} distinct prompts; latent LPIPS needs at least {FEWEST_PROMPTS}, so that some "
            "can be held out",
            field="prompts",
        )
    return found
