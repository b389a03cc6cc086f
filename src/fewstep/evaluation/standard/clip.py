"""CLIP score and the aesthetic predictor v2, which read the same features of pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from fewstep.common.errors import UserError
from fewstep.common.files import sha256
from fewstep.common.tensors import load_tensors
from fewstep.evaluation.features import Features, normalise
from fewstep.evaluation.metric import Array, Identity, Pictures
from fewstep.evaluation.per_picture import PerPictureMetric
from fewstep.evaluation.standard.loader import Loader
from fewstep.evaluation.standard.pixels import described, framed
from fewstep.evaluation.standard.registry import ModelFiles
from fewstep.scorers import clip
from fewstep.scorers.scorer import loading

LAYERS = (0, 2, 4, 6, 7)
"""Indices of the aesthetic predictor's linear layers; the others are dropouts, and there are no activations."""


class ClipFeatures:
    """`features.FeatureNetwork`: CLIP's embeddings of pictures, not yet of length 1."""

    def __init__(self, model: ModelFiles, device: torch.device) -> None:
        self.scorer = clip.load(model.files, device, torch.float32)
        own = self.scorer.identity
        self.name = f"{model.model} ({own.backbone})"
        self.weights_sha256, self.licence = own.weights_sha256, own.licence
        self.input = described(self.scorer.framing)

    @torch.inference_mode()
    def __call__(self, pictures: Pictures) -> Array:
        """Return embeddings [N, D]."""
        network = self.scorer.network
        pixels = framed(pictures, self.scorer.framing).to(network.device, network.dtype)
        embeddings: Array = self.scorer.embed(pixels).cpu().numpy()
        return embeddings


class ClipScore(PerPictureMetric):
    """100 x cosine of the picture's and the prompt's embeddings."""

    def __init__(self, features: Features, network: ClipFeatures) -> None:
        self._features, self._scorer = features, network.scorer
        self.identity = Identity(
            name="CLIP score",
            group="prompt",
            measures="100 x cosine of CLIP's embeddings of picture and prompt",
            better="higher",
            unit="",
            reduction="mean over pictures of 100 x cosine",
            **features.identity_fields,
        )

    def features(self, pictures: Pictures, prompts: Sequence[str]) -> Array:
        """Return each picture's score, float64 [N]."""
        text = self._scorer.prepare(prompts)["text"].double().numpy()
        scores: Array = 100 * (normalise(self._features(pictures)) * text).sum(-1)
        return scores


class Aesthetic(PerPictureMetric):
    """The linear aesthetic predictor of LAION on CLIP ViT-L/14, about 1 to 10."""

    def __init__(self, features: Features, model: ModelFiles, clip_files: tuple[Path, ...]) -> None:
        (file,) = model.files.weights
        state = load_tensors(file)
        with loading(file):
            self._layers = [
                tuple(state[f"layers.{index}.{part}"].double().numpy() for part in ("weight", "bias"))
                for index in LAYERS
            ]
        self._features, self._file = features, file
        self.identity = Identity(
            name="aesthetic v2",
            group="quality",
            measures="predicted rating of a picture's look by people, 1 to 10",
            better="higher",
            unit="",
            reduction="mean over pictures of five linear layers of the embedding of length 1",
            backbone=f"{model.model} on {features.network.name}",
            weights_sha256=sha256(*clip_files, file),
            licence="Apache-2.0",
            input=features.network.input,
        )

    def features(self, pictures: Pictures, prompts: Sequence[str]) -> Array:
        """Return each picture's rating, float64 [N].

        Raises:
            UserError: the predictor is for embeddings of another width.
        """
        x = normalise(self._features(pictures))
        width = self._layers[0][0].shape[1]
        if x.shape[1] != width:
            raise UserError(f"{self._file} is for embeddings of {width} numbers, the CLIP network has {x.shape[1]}")
        for weight, bias in self._layers:
            x = x @ weight.T + bias
        ratings: Array = x[:, 0]
        return ratings


def _features(loader: Loader, models: Mapping[str, ModelFiles]) -> tuple[Features, ClipFeatures]:
    model = models["clip"]
    network = loader.once(("clip", model.files.folder), lambda: ClipFeatures(model, loader.device))
    return loader.once(("clip features", model.files.folder), lambda: Features(network, loader.cache)), network


def score(loader: Loader, models: Mapping[str, ModelFiles]) -> ClipScore:
    """Load the CLIP score of a CLIPModel."""
    return ClipScore(*_features(loader, models))


def aesthetic(loader: Loader, models: Mapping[str, ModelFiles]) -> Aesthetic:
    """Load the aesthetic predictor and its CLIP network."""
    return Aesthetic(_features(loader, models)[0], models["aesthetic"], models["clip"].files.weights)
