"""A teacher at several step counts and guidances: scene accuracy by category, and FD-Lite0.

The difference between 50 and 4 steps shows how hard few-step sampling is in this world.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fewstep_worlds.common.autoencoder import load_vae
from fewstep_worlds.stickers.accuracy import Share, scene_accuracy
from fewstep_worlds.stickers.autoencoder import AutoencoderMetrics
from fewstep_worlds.stickers.dataset import REFERENCE_SEED
from fewstep_worlds.stickers.prompts import unseen_prompts
from fewstep_worlds.stickers.reader import Reader, read_pictures
from fewstep_worlds.stickers.teacher import Encoders, draw


@dataclass(frozen=True)
class SamplingSettings:
    """Steps of DDIM, and guidance in the papers' convention (a guided step is two network calls)."""

    steps: int
    omega: float

    def __str__(self) -> str:
        return f"{self.steps} steps, omega {self.omega:g}"


@dataclass(frozen=True)
class Row:
    """Figures of one set of prompts under one sampling.

    Attributes:
        shares: scene accuracy, in all and by category.
        fd_real: FD-Lite0 to real scenes.
        fd_first: FD-Lite0 to pictures of the first sampling, from other noise.
    """

    shares: dict[str, Share]
    fd_real: float
    fd_first: float


@torch.inference_mode()
def teacher_report(
    pipeline: Path,
    reader: Reader,
    settings: Sequence[SamplingSettings],
    n: int,
    name: str = "open",
    folder: Path | None = None,
) -> dict[str, Row]:
    """Return the figures of a pipeline's pictures of `n` unseen prompts of a set, by sampling.

    Args:
        settings: the others are compared with the first.

    Raises:
        UserError: fewer than 500 prompts, or an unknown set.
    """
    from diffusers import UNet2DConditionModel

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    unet = UNet2DConditionModel.from_pretrained(pipeline / "unet", local_files_only=True, torch_dtype=torch.float32)
    encoders, unet = Encoders(load_vae(pipeline / "vae"), pipeline, device), unet.eval().to(device)
    prompts = unseen_prompts(name, n, REFERENCE_SEED)
    texts, claims = [prompt.text for prompt in prompts], [prompt.claim for prompt in prompts]
    metrics = AutoencoderMetrics(folder, count=n)
    first = metrics.features(draw(unet, encoders, texts, steps=settings[0].steps, omega=settings[0].omega, seed=1))
    rows = {}
    for one in settings:
        pictures = draw(unet, encoders, texts, steps=one.steps, omega=one.omega, seed=0)
        shares = scene_accuracy(read_pictures(reader, pictures), claims)
        against = metrics.distance.distance(metrics.features(pictures), first)
        rows[f"{name}, {one}"] = Row(shares, metrics.fd(pictures), against)
    return rows
