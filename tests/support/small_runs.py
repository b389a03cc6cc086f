"""Runs of the training loop on a two-parameter problem with a known minimum."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fewstep.common.accelerator import make_accelerator
from fewstep.common.config import Config
from fewstep.common.rng import KeyedRng
from fewstep.training.config import LoopConfig, OptimConfig
from fewstep.training.loop import train
from fewstep.training.loss import Loss
from fewstep.training.run_folder import RunLog
from fewstep.training.update import Batch, Update

CPU = torch.device("cpu")


DATA = torch.linspace(-1, 1, 24).reshape(12, 2)


GOAL = torch.tensor([0.5, -0.25])


class Settings(Config):
    loop: LoopConfig
    optim: OptimConfig = OptimConfig(lr=0.05)


def fetch(items: np.ndarray, _: KeyedRng) -> Batch:
    return {"x": DATA[torch.from_numpy(items)]}


def weights() -> nn.Parameter:
    return nn.Parameter(torch.tensor([2.0, 1.0]))


def squared(w: nn.Parameter) -> Callable[[Batch, KeyedRng], Loss]:
    """E (w - GOAL - noise)^2, weighted by the item; every sample's noise is its own."""

    def loss(batch: Batch, rng: KeyedRng) -> Loss:
        noise = 0.1 * rng.normal("noise", (2,))
        per_sample = ((w - GOAL - noise) * (1.5 + batch["x"])).square().sum(1)
        return Loss(per_sample.mean(), per_sample.detach(), rng.uniform("t"))

    return loss


def run(
    folder: Path,
    plan: list[Update],
    *,
    validate: Any = None,
    accelerator: Any = None,
    **loop: Any,
) -> Any:
    config = Settings(loop=LoopConfig(**{"batch": 4, "log_every": 1, "save_every": 1000} | loop))
    log = RunLog(folder, config, title="test", quiet=True)
    return train(plan, fetch, len(DATA), config.loop, log, accelerator or make_accelerator("fp32", CPU), validate)


def single(w: nn.Parameter, **optim: Any) -> list[Update]:
    return [Update("w", {"w": w}, squared(w), OptimConfig(**{"lr": 0.05} | optim))]


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
