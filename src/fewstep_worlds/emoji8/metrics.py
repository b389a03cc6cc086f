"""Evaluation on Emoji-8: real pictures of a prompt, the reference set, the metrics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fewstep.common.errors import UserError
from fewstep.common.rng import generator
from fewstep.evaluation.bootstrap import mean_figure
from fewstep.evaluation.diversity import PROMPTS, pairwise_distance
from fewstep.evaluation.evaluate import Reference, Suite, standard_suite
from fewstep.evaluation.features import Features
from fewstep.evaluation.lite0 import Lite0Features
from fewstep.evaluation.metric import Array, Figure, Metric, Pictures
from fewstep_worlds.common.location import root
from fewstep_worlds.emoji8 import dataset as emoji8
from fewstep_worlds.emoji8.neighbours import NONE, Neighbours, neighbour_shares
from fewstep_worlds.emoji8.scorers.agreement import PromptAgreement, load_scorer
from fewstep_worlds.emoji8.scorers.text import BertStates
from fewstep_worlds.emoji8.whiteness import BackgroundLevel, WhiteShare, background, background_by_prompt


def answered_prompts(record: emoji8.Record) -> tuple[str, str]:
    """Return the prompts that a picture surely matches: its name, and its name with its style."""
    return emoji8.name(record), emoji8.name_with_style(record)


@dataclass(frozen=True)
class Gallery:
    """Emoji-8's training pictures, looked up by prompt."""

    data: emoji8.Emoji8

    @classmethod
    def load(cls) -> Gallery:
        """Read the training split.

        Raises:
            UserError: the bundled world is missing or damaged.
        """
        return cls(emoji8.load("train"))

    @cached_property
    def rows(self) -> dict[str, list[int]]:
        """Prompt -> rows of the pictures that match it."""
        found: dict[str, list[int]] = {}
        for row, record in enumerate(self.data.records):
            for prompt in answered_prompts(record):
                found.setdefault(prompt, []).append(row)
        return found

    @cached_property
    def concepts(self) -> tuple[str, ...]:
        """Name of each picture's concept."""
        return tuple(record.name for record in self.data.records)

    @cached_property
    def _names(self) -> set[str]:
        return {record.name for record in emoji8.load_records(emoji8.SPLITS)}

    def has_concept(self, prompt: str) -> bool:
        """Return whether a prompt is a concept's name, or a name with a style."""
        try:
            self.concept_of(prompt)
        except UserError:
            return False
        return True

    def concept_of(self, prompt: str) -> str:
        """Return the name of the concept of a prompt (a name, or a name with a style).

        Raises:
            UserError: it is neither.
        """
        for style in emoji8.STYLE_FAMILY:
            bare = prompt.removesuffix(f", {emoji8.style_words(style)}")
            if bare != prompt and bare in self._names:
                return bare
        if prompt in self._names:
            return prompt
        raise UserError(f"prompt {prompt!r} names no Emoji-8 concept; use a name, or a name with a style")

    def matched(self, prompts: Sequence[str], seed: int = 0) -> npt.NDArray[np.int64]:
        """Draw a real picture for each prompt, without repetition while a repeated prompt has unused ones.

        A prompt of a held-out pair gets another style of its concept; one of a held-out concept any picture.
        """
        draw = generator(seed, "matched")
        queues: dict[str, list[int]] = {}
        chosen = []
        for prompt in prompts:
            if not queues.get(prompt):
                rows = self.rows.get(prompt) or self.rows.get(self.concept_of(prompt)) or range(len(self.data))
                queues[prompt] = [int(row) for row in draw.permutation(rows)]
            chosen.append(queues[prompt].pop())
        return np.array(chosen, dtype=np.int64)

    def reference(self, prompts: Sequence[str], seed: int = 0) -> Reference:
        """Return all pictures of the prompts' concepts, without one for each prompt, which measure the floor.

        The floor is the figure of a generator that draws real pictures of the same prompts.

        Raises:
            UserError: a prompt names no concept, or the concepts leave no picture to measure against.
        """
        aside = self.matched(prompts, seed)
        wanted = {self.concept_of(prompt) for prompt in prompts}
        taken = set(aside.tolist())
        rest = [row for row, concept in enumerate(self.concepts) if concept in wanted and row not in taken]
        if not rest:
            raise UserError(f"the concepts of {len(prompts)} prompts have no further real pictures; give more prompts")
        return Reference(self.data.pictures[rest], self.data.pictures[aside], tuple(prompts))

    def own_rows(self, prompts: Sequence[str]) -> npt.NDArray[np.int64]:
        """Return the training picture of each prompt that names a style, -1 for the others, [N]."""
        rows = [self.rows.get(prompt, []) if prompt not in self._names else [] for prompt in prompts]
        return np.array([row[0] if row else NONE for row in rows], dtype=np.int64)

    def neighbours(
        self,
        features: Features,
        pictures: Pictures,
        prompts: Sequence[str],
        concepts: Sequence[str] | None = None,
        seed: int = 0,
    ) -> Neighbours:
        """Look up the nearest training picture of each picture.

        Args:
            features: the backbone.
            pictures: uint8 [N, H, W, 3].
            prompts: N.
            concepts: concept of each prompt, for prompts that are no captions (synonyms).
            seed: of the bootstrap.
        """
        wanted = concepts or [self.concept_of(prompt) for prompt in prompts]
        gallery: Array = features(self.data.pictures)
        return neighbour_shares(features(pictures), wanted, gallery, self.concepts, self.own_rows(prompts), seed)


def real_diversity(gallery: Gallery, features: Features, prompts: Sequence[str], seed: int = 0) -> Figure | None:
    """Return the mean feature distance between the real pictures of one prompt (a concept's art styles).

    Prompts with a single picture do not count; None where no prompt has two.
    """
    every = features(gallery.data.pictures)
    answers = [rows for prompt in prompts if len(rows := gallery.rows.get(prompt, [])) > 1]
    if not answers:
        return None
    distances = np.array([pairwise_distance(every[rows][None])[0] for rows in answers])
    return mean_figure(distances, seed, "diversity")


def agreement() -> PromptAgreement:
    """Return the bundled scorer's metric, on the bundled teacher's text encoder.

    Raises:
        UserError: a part is missing or damaged.
    """
    return PromptAgreement(load_scorer(root() / "scorer", BertStates(root() / "teacher")))


def lite0(folder: Path | None = None, *, progress: bool = True) -> Features:
    """Return Lite0's features, for all metrics to share; `folder` keeps them between processes."""
    return Features(Lite0Features(), folder, progress=progress)


def metrics(gallery: Gallery, features: Features, n: int) -> list[Metric]:
    """Return the bundled world's metrics that need no trained scorer.

    The projection of FD is fitted on the whole training split, for all prompts.

    Args:
        gallery: the training pictures.
        features: the backbone.
        n: pictures in the smallest set that is compared: FD is left out below its least number.
    """
    pictures = gallery.data.pictures
    everywhere = background(pictures)
    by_prompt = background_by_prompt(pictures, [answered_prompts(record) for record in gallery.data.records])
    white = [WhiteShare(everywhere, by_prompt), BackgroundLevel(everywhere, by_prompt)]
    return [*standard_suite(features, n, pictures), *white]


def emoji8_suite(prompts: Sequence[str], seed: int, features: Features) -> Suite:
    """Return the metrics and the reference of an evaluation on Emoji-8, as in the benchmark.

    Prompts that name concepts have pictures of these as reference; other prompts have all pictures.

    Raises:
        UserError: the prompts have too few real pictures.
    """
    gallery = Gallery.load()
    known = all(gallery.has_concept(prompt) for prompt in prompts)
    if known:
        reference = gallery.reference(prompts, seed)
    else:
        names = [record.name for record in gallery.data.records]
        reference = Reference.split(gallery.data.pictures, len(prompts), seed, names)
    chosen = [*metrics(gallery, features, min(len(prompts), len(reference.pictures))), agreement()]
    diverse = real_diversity(gallery, features, prompts[:PROMPTS], seed) if known else None
    return Suite(reference, chosen, features, diverse.value if diverse else None)
