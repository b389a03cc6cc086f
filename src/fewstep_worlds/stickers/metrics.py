"""Evaluation on sticker scenes: scene accuracy as metrics, real pictures of a prompt, the suite."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

from fewstep.common.errors import UserError
from fewstep.common.files import sha256
from fewstep.evaluation.bootstrap import mean_figure
from fewstep.evaluation.diversity import NOISES, PROMPTS, pairwise_distance
from fewstep.evaluation.evaluate import Reference, Suite, standard_suite
from fewstep.evaluation.features import Features
from fewstep.evaluation.metric import Array, Figure, Identity, Metric, Pictures, check_pictures
from fewstep.evaluation.per_picture import PerPictureMetric
from fewstep_worlds.common.location import root
from fewstep_worlds.stickers.claim import Claim, Facts, check
from fewstep_worlds.stickers.dataset import REFERENCE_SEED, draw_all, draw_scenes
from fewstep_worlds.stickers.grammar import read
from fewstep_worlds.stickers.matching import is_possible, matching_scene
from fewstep_worlds.stickers.reader import WEIGHTS, load_reader, read_pictures
from fewstep_worlds.stickers.scene import SIDE

REAL = 5000
"""Real pictures that are measured against, at most, unless there are more prompts."""
KEPT = 4
"""Sets of pictures whose facts stay in memory."""
KINDS = {"single": "single", "several": "counting", "two": "two", "relation": "position"}
"""Kind of claim -> category of its prompt. A prompt counts as right if all that it states is found."""
STATED = {"background": ("colour", "pattern"), "style": ("style",)}
"""Category -> facts. A prompt that states any of them counts as right if those are found."""


@lru_cache(maxsize=2**14)
def claim_of(prompt: str) -> Claim:
    """Return what a prompt states, in English or Chinese.

    Raises:
        UserError: it is no sentence of the grammar, or no scene can agree with it.
    """
    claim = read(prompt, "english" if prompt.isascii() else "chinese")
    if not is_possible(claim):
        raise UserError(f"prompt = {prompt!r} agrees with no sticker scene; name two kinds, of 9 stickers in all")
    return claim


def in_category(category: str, claim: Claim) -> bool:
    """Return whether a prompt belongs to a category."""
    if category in STATED:
        return any(getattr(claim, fact) for fact in STATED[category])
    return KINDS[claim.kind] == category


class SceneReader:
    """A trained reader, which reads a set of pictures once for all metrics."""

    def __init__(self, folder: Path) -> None:
        self.reader = load_reader(folder)
        self.sha256 = sha256(folder / WEIGHTS)
        self._facts: dict[bytes, list[Facts]] = {}

    def __call__(self, pictures: Pictures) -> list[Facts]:
        """Return the facts of pictures.

        Raises:
            UserError: they are not uint8 [N, 64, 64, 3].
        """
        check_pictures(pictures)
        if pictures.shape[1:3] != (SIDE, SIDE):
            raise UserError(f"scene accuracy needs pictures of {SIDE}x{SIDE} pixels, not {list(pictures.shape)}")
        key = hashlib.sha256(np.ascontiguousarray(pictures).data).digest()
        if key not in self._facts:
            if len(self._facts) >= KEPT:
                self._facts.pop(next(iter(self._facts)))
            self._facts[key] = read_pictures(self.reader, pictures)
        return self._facts[key]

    def identity(self, name: str, measures: str) -> Identity:
        """Return the identity of a share of prompts."""
        return Identity(
            name=name,
            group="prompt" if name == SceneAccuracy.name else "category",
            measures=measures,
            better="higher",
            unit="",
            reduction="mean over pictures of 1 where the prompt counts as right, else 0",
            backbone="reader of sticker scenes, trained on scenes alone",
            weights_sha256=self.sha256,
            licence="Apache-2.0",
            input=f"{SIDE}x{SIDE}, rgb / 127.5 - 1",
        )


class SceneAccuracy(PerPictureMetric):
    """The share of prompts whose every stated fact the reader finds in the picture."""

    name = "scene accuracy"

    def __init__(self, reader: SceneReader) -> None:
        self._reader = reader
        self.identity = reader.identity(self.name, "share of prompts whose every stated fact a reader finds")

    def features(self, pictures: Pictures, prompts: Sequence[str]) -> Array:
        """Return 1 for each picture whose prompt is right, else 0, float64 [N]."""
        check_pictures(pictures, prompts)
        pairs = zip(self._reader(pictures), prompts, strict=True)
        return np.array([all(check(claim_of(prompt), facts).values()) for facts, prompt in pairs], np.float64)


class CategoryAccuracy:
    """The share of right prompts among those of one category, as in GenEval (arXiv 2310.11513)."""

    def __init__(self, reader: SceneReader, category: str) -> None:
        self._reader = reader
        self.category = category
        what = " and ".join(STATED.get(category, ("every stated fact",)))
        measures = f"share of the prompts of the category {category} for which a reader finds {what}"
        self.identity = reader.identity(f"{SceneAccuracy.name}, {category}", measures)

    def features(self, pictures: Pictures, prompts: Sequence[str]) -> Array:
        """Return 1 for each picture whose prompt is right, else 0, NaN for those of other categories, float64 [N]."""
        check_pictures(pictures, prompts)
        scores = np.full(len(prompts), np.nan)
        for row, (facts, prompt) in enumerate(zip(self._reader(pictures), prompts, strict=True)):
            claim = claim_of(prompt)
            if in_category(self.category, claim):
                stated = check(claim, facts)
                of = [fact for fact in STATED.get(self.category, stated) if fact in stated]
                scores[row] = all(stated[fact] for fact in of)
        return scores

    def reduce(self, features: Array, against: Array | None, seed: int) -> Figure:
        """Return the share with its interval; its n is the number of prompts of the category."""
        return mean_figure(features[~np.isnan(features)], seed, self.identity.name)


def accuracies(reader: SceneReader, prompts: Sequence[str]) -> list[Metric]:
    """Return scene accuracy in all, and by each category that some prompts belong to."""
    claims = [claim_of(prompt) for prompt in prompts]
    found = [name for name in (*KINDS.values(), *STATED) if any(in_category(name, claim) for claim in claims)]
    return [SceneAccuracy(reader), *(CategoryAccuracy(reader, name) for name in found)]


def are_known(prompts: Sequence[str]) -> bool:
    """Return whether every prompt states a claim that scenes can agree with."""
    try:
        return all(claim_of(prompt) for prompt in prompts)
    except UserError:
        return False


def matching_pictures(prompts: Sequence[str], seed: int, first: int, count: int) -> Pictures:
    """Return real pictures of prompts, the prompts in turn, uint8 [count, 64, 64, 3]; `first` numbers the first one."""
    claims = [claim_of(prompt) for prompt in prompts]
    numbers = range(first, first + count)
    return draw_all(matching_scene(claims[number % len(claims)], seed, number) for number in numbers)


def real_diversity(features: Features, prompts: Sequence[str], seed: int) -> float:
    """Return the mean feature distance between real pictures of one prompt."""
    some = prompts[:PROMPTS]
    pictures = matching_pictures(some, seed, 0, len(some) * NOISES)
    found = features(pictures).reshape(NOISES, len(some), -1).swapaxes(0, 1)
    return float(pairwise_distance(found).mean())


def sticker_suite(prompts: Sequence[str], seed: int, features: Features) -> Suite:
    """Return the metrics and the reference of an evaluation on sticker scenes.

    The real pictures agree with the prompts: one of each for the floor, up to `REAL` to measure against. Prompts that
    are no sentences of the grammar have no scene accuracy, and any scenes as reference.

    Raises:
        UserError: the sprite sheets or the reader cannot be read.
    """
    n = len(prompts)
    count, known = max(n, min(4 * n, REAL)), are_known(prompts)
    if known:
        pictures = matching_pictures(prompts, seed, 0, n + count)
    else:
        pictures = draw_scenes(REFERENCE_SEED, range(n + count))
    reference = Reference(pictures[n:], pictures[:n], tuple(prompts))
    metrics = standard_suite(features, n, reference.pictures)
    if not known:
        return Suite(reference, metrics, features)
    metrics += accuracies(SceneReader(root() / "reader"), prompts)
    return Suite(reference, metrics, features, real_diversity(features, prompts, seed + 1))
