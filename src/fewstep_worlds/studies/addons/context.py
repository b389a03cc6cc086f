"""Shared parts of all add-ons: the base, the training pictures, the scorers and the finished add-ons."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewstep.backbones.base import Backbone
from fewstep.common.rng import generator
from fewstep.data.images import Captioned
from fewstep.data.latents import latent_set
from fewstep.distillation.run_data import encoders_fingerprint
from fewstep.evaluation.features import Features
from fewstep.evaluation.metric import Array, Pictures
from fewstep.training.run_folder import check_same_run
from fewstep_worlds.emoji8 import dataset as emoji8
from fewstep_worlds.emoji8.scorers.agreement import Agreement
from fewstep_worlds.studies.addons import training
from fewstep_worlds.studies.settings import AddOnConfig, VersatilityConfig

CAPTIONS = 4
"""Captions drawn of each training picture."""


@dataclass(frozen=True)
class Context:
    """Shared parts of all add-ons.

    Attributes:
        out: folder of runs and finished add-ons.
        backbone: the base.
        scorer: prompt agreement; it trains nothing here.
        features: Lite0's, the IP-Adapter's input.
    """

    config: VersatilityConfig
    out: Path
    backbone: Backbone
    scorer: Agreement
    features: Features
    data: emoji8.Emoji8 = field(default_factory=lambda: emoji8.load("train"))
    """Training pictures of the add-ons."""
    shown: emoji8.Emoji8 = field(default_factory=lambda: emoji8.load("heldout-pair"))
    """Pictures of the tasks. They are held out from the base, the students and the add-ons, as is each concept in the
    other styles of its family."""

    @property
    def folder(self) -> Path:
        """Folder of the base."""
        return self.backbone.folder.path

    def is_made(self, name: str, config: AddOnConfig) -> bool:
        """Return whether an add-on is finished.

        Raises:
            UserError: it was made with other settings or inputs.
        """
        check_same_run(self.out / "runs" / name, config, self.inputs, whole=False)
        return (self.out / name).is_dir()

    @property
    def inputs(self) -> dict[str, str]:
        """Fingerprints of the inputs of every add-on."""
        return {"base": self.backbone.folder.fingerprint("unet"), "pictures": str(self.config.pictures)}

    def unet(self) -> Any:
        """Return a fresh copy of the base's denoiser."""
        return self.backbone.fresh_network()

    def rows(self, name: str, allowed: Sequence[int] | None = None) -> list[int]:
        """Return the held-out pictures of a task, chosen by the seed and the task's name: new concepts first.

        Args:
            allowed: pictures to choose from; None for all.
        """
        order = generator(self.config.seed, f"versatility {name}").permutation(len(self.shown))
        among = set(range(len(self.shown)) if allowed is None else allowed)
        seen: set[str] = set()
        first: list[int] = []
        again: list[int] = []
        for row in (int(row) for row in order if int(row) in among):
            concept = self.shown.records[row].concept
            (again if concept in seen else first).append(row)
            seen.add(concept)
        return [*first, *again][: self.config.prompts]

    def names(self, rows: Sequence[int]) -> list[str]:
        """Return the concepts of some held-out pictures."""
        return [self.shown.records[row].name for row in rows]

    def training_spec(
        self, name: str, source: Captioned, config: AddOnConfig, empty: float, **inputs: str
    ) -> training.AddOnTraining:
        """Return pictures encoded by the base, as the data of an add-on."""
        fingerprint = encoders_fingerprint(self.backbone.folder)
        data = latent_set(source, self.backbone, fingerprint, self.out / "cache")
        return training.AddOnTraining(name, data, config, {**self.inputs, **inputs}, empty)

    def training_rows(self, name: str, allowed: Sequence[int] | None = None, share: int = 1) -> list[int]:
        """Return the training pictures of an add-on, chosen by its name."""
        among = range(len(self.data)) if allowed is None else allowed
        order = generator(0, f"versatility lesson {name}").permutation(np.asarray(among))
        return sorted(int(row) for row in order[: self.config.pictures // share])

    def own_captions(self, rows: Sequence[int], seed: int) -> list[list[str]]:
        """Return captions of some training pictures, as the base was trained on."""
        return emoji8.caption_table([self.data.records[row] for row in rows], CAPTIONS, seed)

    def states(self) -> Tensor:
        """Return the base's text states of the training split's names, [N, tokens, width]."""
        names = [record.name for record in self.data.records]
        distinct = list(dict.fromkeys(names))
        known = self.backbone.encode(distinct)["text"]
        number = {name: row for row, name in enumerate(distinct)}
        return known[[number[name] for name in names]]

    def agreement_with(self, names: Sequence[str]) -> Callable[[Pictures], Array]:
        """Return a function from pictures to the agreement of each with its name."""
        return lambda pictures: self.scorer.scores(pictures, list(names))

    def likeness(self, pictures: Pictures, others: Pictures) -> Array:
        """Return the scorer's cosine of each picture with its counterpart, minus the mean with other rows'."""
        own, other = self.scorer.embed_pictures(pictures), self.scorer.embed_pictures(np.asarray(others))
        cosine = (own @ other.T).double().numpy()
        n = len(cosine)
        others_mean = (cosine.sum(1) - cosine.diagonal()) / max(n - 1, 1)
        gap: Array = cosine.diagonal() - others_mean
        return gap

    @cached_property
    def raw(self) -> Tensor:
        """Lite0's features of the training split, [N, 1280]."""
        return torch.from_numpy(np.array(self.features(self.data.pictures))).float()

    def level(self, raw: Tensor) -> Tensor:
        """Return features minus the training split's mean, at unit size on average."""
        return (raw - self.raw.mean(0)) / self.raw.std()

    @cached_property
    def picture_features(self) -> Tensor:
        """The training split's features as the IP-Adapter's input, [N, 1280]."""
        return self.level(self.raw)

    def features_of(self, pictures: Pictures) -> Tensor:
        """Return pictures' features as the IP-Adapter's input, [N, 1280]."""
        return self.level(torch.from_numpy(np.array(self.features(np.asarray(pictures)))).float())

    @cached_property
    def style_reader(self) -> Tensor:
        """Weights of a linear style classifier on Lite0's features (ridge regression), [1280 + 1, styles]."""
        x = torch.cat([self.picture_features, torch.ones(len(self.picture_features), 1)], 1).double()
        styles = [record.style for record in self.data.records]
        y = torch.tensor([[float(style == name) for name in emoji8.STYLE_FAMILY] for style in styles]).double()
        read: Tensor = torch.linalg.solve(x.T @ x + 30 * torch.eye(x.shape[1]).double(), x.T @ y)
        return read

    def style_rate(self, pictures: Pictures, style: str) -> Array:
        """Return 1 where the classifier predicts a style, else 0, float64 [N]."""
        seen = self.features_of(pictures)
        x = torch.cat([seen, torch.ones(len(seen), 1)], 1).double()
        words = [emoji8.style_words(name) for name in emoji8.STYLE_FAMILY]
        right: Array = ((x @ self.style_reader).argmax(1) == words.index(style)).double().numpy()
        return right
