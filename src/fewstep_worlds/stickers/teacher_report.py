"""What a teacher draws at several step counts and guidances: scene accuracy by category, and FD-Lite0.

With 50 and 4 steps it shows whether few steps are hard in this world.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fewstep_worlds.common.autoencoder import load_vae
from fewstep_worlds.stickers.accuracy import Share, scene_accuracy
from fewstep_worlds.stickers.autoencoder import AutoencoderJudge
from fewstep_worlds.stickers.dataset import REFERENCE_SEED
from fewstep_worlds.stickers.prompts import unseen_prompts
from fewstep_worlds.stickers.reader import Reader, read_pictures
from fewstep_worlds.stickers.teacher import Encoders, draw


@dataclass(frozen=True)
class Law:
    """How pictures are drawn: steps of DDIM, and guidance in the papers' convention (a guided step is two calls)."""

    steps: int
    omega: float

    def __str__(self) -> str:
        return f"{self.steps} steps, omega {self.omega:g}"


@dataclass(frozen=True)
class Row:
    """Figures of one way to draw one set of prompts.

    Attributes:
        shares: scene accuracy, in all and by category.
        fd_real: FD-Lite0 to real scenes.
        fd_first: FD-Lite0 to pictures of the first way of drawing, from other noise.
    """

    shares: dict[str, Share]
    fd_real: float
    fd_first: float


@torch.inference_mode()
def teacher_report(
    pipeline: Path, reader: Reader, laws: Sequence[Law], n: int, name: str = "open", folder: Path | None = None
) -> dict[str, Row]:
    """Return the figures of a pipeline's pictures of `n` unseen prompts of a set, by way of drawing.

    Args:
        laws: ways to draw; the first one is what the others are compared with.

    Raises:
        UserError: fewer than 500 prompts, or an unknown set.
    """
    from diffusers import UNet2DConditionModel

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    unet = UNet2DConditionModel.from_pretrained(pipeline / "unet", local_files_only=True, torch_dtype=torch.float32)
    encoders, unet = Encoders(load_vae(pipeline / "vae"), pipeline, device), unet.eval().to(device)
    prompts = unseen_prompts(name, n, REFERENCE_SEED)
    texts, claims = [prompt.text for prompt in prompts], [prompt.claim for prompt in prompts]
    judge = AutoencoderJudge(folder, count=n)
    first = judge.features(draw(unet, encoders, texts, steps=laws[0].steps, omega=laws[0].omega, seed=1))
    rows = {}
    for law in laws:
        pictures = draw(unet, encoders, texts, steps=law.steps, omega=law.omega, seed=0)
        shares = scene_accuracy(read_pictures(reader, pictures), claims)
        against = judge.distance.distance(judge.features(pictures), first)
        rows[f"{name}, {law}"] = Row(shares, judge.fd(pictures), against)
    return rows
