"""Accuracy of the reader on unseen scenes: real, of held-out kinds, and damaged."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fewstep.common.random_streams import generator
from fewstep_worlds.common.autoencoder import restore, to_pictures, to_tensor
from fewstep_worlds.stickers.accuracy import Share, scene_accuracy
from fewstep_worlds.stickers.claim import full_claim
from fewstep_worlds.stickers.dataset import REFERENCE_SEED, draw_scenes, make_scenes
from fewstep_worlds.stickers.heldout import KINDS
from fewstep_worlds.stickers.reader import Reader, damage, read_pictures

BLUR = 0.7
"""Standard deviation of the blur, in pixels."""
NOISE = 0.1
"""Standard deviation of the noise, pictures being in [-1, 1]."""


def reader_report(
    reader: Reader, n: int, vae: Any | None = None, folder: Path | None = None
) -> Mapping[str, Mapping[str, Share]]:
    """Return the reader's accuracy under each condition, every fact of `n` unseen scenes being stated.

    Args:
        vae: autoencoder that scenes are restored by, for one more condition.
    """
    result: dict[str, dict[str, Share]] = {}
    for split in ("train", *KINDS):
        claims = [full_claim(scene) for scene in make_scenes(REFERENCE_SEED, range(n), split)]
        real = draw_scenes(REFERENCE_SEED, range(n), split, folder)
        shown = {"real" if split == "train" else f"real, held out: {split}": real}
        if split == "train":
            shown |= {"blurred": _damaged(real, BLUR, 0.0), "noised": _damaged(real, 0.0, NOISE)}
            shown |= {"autoencoded": restore(vae, real)} if vae is not None else {}
        result |= {name: scene_accuracy(read_pictures(reader, of), claims) for name, of in shown.items()}
    return result


def _damaged(pictures: np.ndarray, blur: float, noise: float) -> np.ndarray:
    normal = torch.from_numpy(generator(REFERENCE_SEED, "stickers noise").standard_normal((len(pictures), 3, 64, 64)))
    spread, strength = (torch.full((len(pictures),), level) for level in (blur, noise))
    return to_pictures(damage(to_tensor(pictures), spread, strength, normal.float()))
