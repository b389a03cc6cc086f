"""PickScore, HPS v2, ImageReward and MPS: the preference scorers as metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module

import numpy as np
import torch

from fewstep.evaluation.metric import Array, Identity, Pictures
from fewstep.evaluation.per_picture import PerPictureMetric
from fewstep.evaluation.standard.loader import Loader
from fewstep.evaluation.standard.pixels import BATCH, described, framed
from fewstep.evaluation.standard.registry import ModelFiles
from fewstep.scorers.scorer import Scorer

NAMES = {"pickscore": "PickScore", "hpsv2": "HPSv2", "image_reward": "ImageReward", "mps": "MPS"}


class Preference(PerPictureMetric):
    """Mean score of a preference scorer, on pixels as its authors' program prepares them."""

    def __init__(self, scorer: Scorer, model: str) -> None:
        self._scorer = scorer
        own = scorer.identity
        self.identity = Identity(
            name=NAMES[own.name],
            group="prompt",
            measures=own.measures,
            better="higher",
            unit="",
            reduction="mean over pictures of the score of picture and prompt",
            backbone=f"{model} ({own.backbone})",
            weights_sha256=own.weights_sha256,
            licence=own.licence,
            input=described(scorer.framing),
        )

    @torch.inference_mode()
    def features(self, pictures: Pictures, prompts: Sequence[str]) -> Array:
        """Return each picture's score, float64 [N]."""
        weights = next(self._scorer.network.parameters())
        prepared, scores = self._scorer.prepare(prompts), []
        for start in range(0, len(pictures), BATCH):
            rows = slice(start, start + BATCH)
            pixels = framed(pictures[rows], self._scorer.framing).to(weights.device, weights.dtype)
            told = {key: value[rows].to(weights.device) for key, value in prepared.items()}
            scores.append(self._scorer.compare(pixels, told).double().cpu().numpy())
        found: Array = np.concatenate(scores)
        return found


def preference(loader: Loader, models: Mapping[str, ModelFiles]) -> Preference:
    """Load the scorer of the one network that is given."""
    ((name, model),) = models.items()
    load = import_module(f"fewstep.scorers.{name}").load
    return Preference(
        loader.once((name, model.files.folder), lambda: load(model.files, loader.device, torch.float32)), model.model
    )
