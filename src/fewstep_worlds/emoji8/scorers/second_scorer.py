"""A second agreement score, which no student is trained by: small heads on Lite0's features.

It shares neither picture network (EfficientNet-Lite0, frozen) nor text backbone (the teacher's encoder) with the
reward. It is not fully independent: the latent LPIPS is trained on earlier layers of Lite0, FD and KID use the same
features, and the evaluating scorer uses the same text encoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewstep.common.accelerator import make_accelerator
from fewstep.common.rng import KeyedRng
from fewstep.common.tensors import digest
from fewstep.evaluation.features import Features
from fewstep.evaluation.metric import Array, Identity, Pictures
from fewstep.evaluation.per_picture import PerPictureMetric
from fewstep.inference.multilingual.sentence import SentenceEncoder
from fewstep.training.loss import Loss
from fewstep.training.update import Batch, Update
from fewstep_worlds.common.training import fit
from fewstep_worlds.emoji8 import dataset as emoji8
from fewstep_worlds.emoji8.config import SecondScorerConfig
from fewstep_worlds.emoji8.scorers.train import caption_targets, draw_captions, multi_positive_loss

FEATURES = 1280
"""Width of Lite0's features."""


class Heads(nn.Module):
    """Two heads into one space, of features and of prompts."""

    def __init__(self, text_width: int, width: int, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.picture = nn.Sequential(nn.LayerNorm(FEATURES), nn.Linear(FEATURES, width))
            self.text = nn.Sequential(
                nn.LayerNorm(text_width), nn.Linear(text_width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
            )
        self.log_scale = nn.Parameter(torch.tensor(2.0))

    def pictures(self, features: Tensor) -> Tensor:
        """Return unit vectors [B, width] of Lite0's features [B, 1280]."""
        return F.normalize(self.picture(features), dim=-1)

    def prompts(self, states: Tensor) -> Tensor:
        """Return unit vectors [B, width] of the text backbone's vectors [B, text_width]."""
        return F.normalize(self.text(states), dim=-1)


class SecondScorer(PerPictureMetric):
    """Mean cosine of pictures and their prompts, by heads on Lite0's features."""

    def __init__(self, heads: Heads, features: Features, text: SentenceEncoder) -> None:
        self._heads, self._features, self._text = heads, features, text
        backbone = features.network
        self.identity = Identity(
            name="preference",
            group="prompt",
            measures="how well pictures fit their prompts, by heads on Lite0's features; no student is trained by this "
            "score, but the latent LPIPS is trained on earlier layers of Lite0",
            better="higher",
            unit="cosine",
            reduction="mean over pictures of the cosine of picture and prompt",
            backbone=f"{backbone.name}; heads trained on Emoji-8; text: {text.name} (sha256 {text.sha256[:16]})",
            weights_sha256=digest(dict(heads.named_parameters())),
            licence=backbone.licence,
            input=backbone.input,
        )

    @torch.inference_mode()
    def features(self, pictures: Pictures, prompts: Sequence[str]) -> Array:
        """Return each picture's cosine with its prompt, [N]."""
        distinct = list(dict.fromkeys(prompts))
        vectors = self._heads.prompts(torch.as_tensor(self._text(distinct)))
        rows = {prompt: i for i, prompt in enumerate(distinct)}
        seen = self._heads.pictures(torch.from_numpy(np.array(self._features(pictures))))
        cosine: Array = (seen * vectors[[rows[prompt] for prompt in prompts]]).sum(1).double().numpy()
        return cosine


def train_second_scorer(
    config: SecondScorerConfig, features: Features, text: SentenceEncoder, folder: Path, *, quiet: bool = False
) -> SecondScorer:
    """Train the heads on Emoji-8's training split, or read the finished ones; a stopped run is resumed.

    Raises:
        UserError: the folder holds another run, or cannot be written to.
    """
    data = emoji8.load("train")
    seed = config.loop.seed
    seen = torch.from_numpy(np.array(features(data.pictures)))
    captions = draw_captions(data.records, config.captions, seed, text)
    heads = Heads(text.width, config.width, seed)

    def fetch(items: np.ndarray, _: KeyedRng) -> Batch:
        return {"items": torch.from_numpy(items)}

    def loss(batch: Batch, rng: KeyedRng) -> Loss:
        items = batch["items"]
        chosen = captions.rows[items, rng.integers("caption", 0, captions.rows.shape[1])]
        positive, ignored = caption_targets(captions, items, chosen)
        kept = 1 - (rng.normal("drop", (FEATURES,)) > 1.28).float()  # drops a tenth of the features
        cosine = heads.pictures(seen[items] * kept) @ heads.prompts(captions.states[chosen]).T
        return Loss(multi_positive_loss(cosine, positive, ignored, heads.log_scale.exp().clamp(max=100)))

    inputs = {"features": features.network.weights_sha256, "text encoder": text.sha256}
    plan = [Update("heads", dict(heads.named_parameters()), loss, config.optim)]
    accelerator = make_accelerator("fp32", torch.device("cpu"))
    weights = fit(
        "second scorer", plan, fetch, len(data), folder, config, config.loop, accelerator, inputs, quiet=quiet
    )
    heads.load_state_dict(weights["heads"])
    return SecondScorer(heads.eval().requires_grad_(False), features, text)
