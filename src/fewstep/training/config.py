"""Settings of the training loop; importable without torch."""

from __future__ import annotations

import math
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from fewstep.common.choices import BaseFormat, Precision
from fewstep.common.config import Config
from fewstep.common.run_inputs import Content

COOLDOWN = 0.2
"""Share of the steps over which the `cooldown` schedule falls to 0."""


def check_batch(batch: int, accumulate: int, processes: int = 1) -> None:
    """Refuse a batch that cannot be split over micro-batches and processes.

    Raises:
        ValueError: it is not a multiple of both.
    """
    if batch % (accumulate * processes):
        over = f"accumulate = {accumulate}" + (f" x {processes} processes" if processes > 1 else "")
        raise ValueError(f"batch = {batch} must be a multiple of {over}")


class LoopConfig(Config):
    """Length, batch, precision and intervals of a training."""

    renamed = {"watch_every": "validate_every"}  # noqa: RUF012  (a class variable of the base)

    steps: int = Field(1000, ge=1, description="optimiser steps")
    batch: int = Field(32, ge=1, description="samples per optimiser step, over all processes")
    accumulate: int = Field(1, ge=1, description="micro-batches per optimiser step")
    seed: int = Field(0, ge=0, le=2**63 - 1, description="seed of every random draw")
    precision: Precision = Field(
        "fp32", description="dtype of the networks: fp32, bf16, fp16, or auto (bf16 where the machine is fast at it)"
    )
    shard: bool = Field(
        False, description="split weights, gradients and optimiser states over the processes of a launch (FSDP2)"
    )
    compile: bool = Field(False, description="compile the networks for the shapes of a step (torch.compile)")
    log_every: int = Field(10, ge=1, description="steps between log lines")
    save_every: int = Field(500, ge=1, description="steps between checkpoints")
    keep: int = Field(2, ge=1, description="checkpoints kept")
    validate_every: int | None = Field(None, ge=1, description="steps between quality checks; null for none")

    tracker: Literal["tensorboard", "wandb", "trackio", "none"] = Field(
        "tensorboard", description="where figures and grids go beside log.jsonl: tensorboard, wandb, trackio or none"
    )

    @model_validator(mode="after")
    def _whole(self) -> Self:
        check_batch(self.batch, self.accumulate)
        if self.shard and self.precision == "fp16":
            raise ValueError("precision = 'fp16' needs a loss scale, which shard = true does not support; use 'bf16'")
        return self


class OptimConfig(Config):
    """The optimiser and its learning-rate schedule."""

    kind: Literal["adamw", "adamw_8bit", "muon"] = Field(
        "adamw",
        description="adamw; adamw_8bit (moments in 8 bits, bitsandbytes); muon (matrices by orthogonalised momentum)",
    )
    lr: float = Field(1e-4, gt=0, description="peak learning rate")
    betas: tuple[float, float] = Field((0.9, 0.999), description="AdamW's moment decays")
    weight_decay: float = Field(0.0, ge=0, description="decoupled weight decay")
    eps: float = Field(1e-8, gt=0, description="AdamW's epsilon")
    warmup: int = Field(0, ge=0, description="steps of linear warm-up")
    decay: Literal["constant", "cosine", "linear", "cooldown"] = Field(
        "constant",
        description="schedule after the warm-up; cooldown = constant, then linear to 0 over the last fifth",
    )
    clip: float | None = Field(1.0, gt=0, description="largest global gradient norm; null for none")
    ema: float | None = Field(None, gt=0, lt=1, description="decay of the moving average; null for none")


class StudentConfig(Config):
    """Trained weights, and how the frozen ones are kept."""

    kind: Literal["lora", "full"] = Field("lora", description="lora (adapters on the frozen teacher) or full")
    rank: int = Field(64, ge=1, description="rank of the LoRA matrices")
    alpha: float | None = Field(None, gt=0, description="LoRA alpha; null for the rank, i.e. scale 1")
    targets: tuple[str, ...] | None = Field(None, description="adapted layers; null for the backbone's list")
    checkpointing: bool = Field(False, description="gradient checkpointing: less memory, one more forward")
    offload: bool = Field(
        False,
        description="keep the frozen network's blocks in main memory, two on the device at a time, and text encoders",
    )
    base: BaseFormat = Field(
        "fp32", description="format of frozen weights: fp32, bf16, or 8bit, 4bit (their matrices, by bitsandbytes)"
    )
    teacher_precision: Literal["fp32", "bf16", "fp16"] | None = Field(
        None, description="dtype of the teacher's calls in a step: fp32, bf16 or fp16; null for loop.precision"
    )
    start: Annotated[str, Content("start")] = Field(
        "", description="a finished student to start from; empty for the teacher itself"
    )

    @property
    def lora_alpha(self) -> float:
        """LoRA's alpha; the scale is alpha / rank."""
        return self.alpha if self.alpha is not None else float(self.rank)


def learning_rate(config: OptimConfig, step: int, steps: int) -> float:
    """Return the rate of update number `step` (0-based) out of `steps`."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    share = (step - config.warmup) / max(1, steps - config.warmup)
    if config.decay == "cosine":
        return config.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, share)))
    if config.decay == "linear":
        return config.lr * max(0.0, 1 - share)
    if config.decay == "cooldown":
        return config.lr * min(1.0, max(0.0, 1 - share) / COOLDOWN)
    return config.lr
