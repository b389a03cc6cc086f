"""The world's preference scorer as a metric, beside metrics that nothing is trained by."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from fewstep.evaluation.metric import Array, Identity, Pictures
from fewstep.evaluation.per_picture import PerPictureMetric
from fewstep.scorers.reward import PreferenceScorer

BATCH = 256


class Preference(PerPictureMetric):
    """Mean score of a preference scorer on the CPU."""

    def __init__(self, scorer: PreferenceScorer) -> None:
        self._scorer = scorer
        own = scorer.identity
        self.identity = Identity(
            name="preference",
            group="prompt",
            measures=f"{own.measures}; students are trained by this score, so it does not decide between methods",
            better="higher",
            unit="",
            reduction="mean over pictures of the score of picture and prompt",
            backbone=own.backbone,
            weights_sha256=own.weights_sha256,
            licence=own.licence,
            input=own.input,
        )

    @torch.inference_mode()
    def features(self, pictures: Pictures, prompts: Sequence[str]) -> Array:
        """Return each picture's score, float64 [N]."""
        scores = []
        for start in range(0, len(pictures), BATCH):
            x = torch.from_numpy(np.ascontiguousarray(pictures[start : start + BATCH])).permute(0, 3, 1, 2)
            prepared = self._scorer.prepare(list(prompts[start : start + BATCH]))
            scores.append(self._scorer.score(x.float() / 127.5 - 1, prepared).double().cpu().numpy())
        found: Array = np.concatenate(scores)
        return found
