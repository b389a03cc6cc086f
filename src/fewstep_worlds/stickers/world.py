"""Sticker scenes as a `fewstep.common.defaults.World`, without the verbs. Light: no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from fewstep.common.errors import UserError, did_you_mean
from fewstep.data.images import Captioned, from_prompts
from fewstep_worlds.common.location import root
from fewstep_worlds.stickers.dataset import TRAINING_SEED, ScenePictures
from fewstep_worlds.stickers.prompts import training_prompt, unseen_prompts
from fewstep_worlds.stickers.scene import SIDE, make_scene

if TYPE_CHECKING:
    import torch

    from fewstep.evaluation.evaluate import Suite
    from fewstep.evaluation.features import Features
    from fewstep.inference.multilingual.pairs import Pair, Pairs
    from fewstep.scorers.reward import PreferenceScorer

__all__ = ["CAPTIONS", "PICTURES", "SIZE", "STUDENTS", "captioned", "captions_alone", "read_prompts", "root"]

PICTURES, CAPTIONS = "stickers", "captions"
SIZE = SIDE
STUDENTS = ("tcd", "lcm", "tlcm")
SCENES = 2**16
"""Training scenes of a distillation: no picture is seen twice in 1,024 steps of 64. Their captions take 15 s."""


@dataclass(frozen=True)
class PromptList:
    """The first `count` distinct prompts of a set (`prompts.SETS`) from a seed that no training has."""

    set: str
    count: int
    seed: int


LISTS = {
    "validation": PromptList("open", 500, 101),
    "gamma": PromptList("open", 500, 102),
    "benchmark": PromptList("open", 2500, 103),
    "heldout-pair": PromptList("pair", 500, 104),
    "heldout-style": PromptList("concept_style", 500, 105),
    "heldout-colour": PromptList("concept_colour", 500, 106),
    "synonym": PromptList("synonym", 500, 107),
    "style": PromptList("style", 500, 108),
}


@dataclass(frozen=True)
class SceneCaptions(Sequence[tuple[str, ...]]):
    """Sentences about each training scene, written when they are used; the first ones of seed 0 are the teacher's."""

    each: int
    seed: int

    def __len__(self) -> int:
        return SCENES

    def __getitem__(self, row: Any) -> Any:
        if not 0 <= row < SCENES:
            raise IndexError(row)
        return _captions(row, self.each, self.seed)


@cache
def _captions(index: int, count: int, seed: int) -> tuple[str, ...]:
    scene = make_scene(TRAINING_SEED, index)
    prompts = (training_prompt(scene, seed, index + SCENES * number) for number in range(count))
    return tuple(prompt.text for prompt in prompts if prompt)


def captioned(captions: int, seed: int) -> Captioned:
    """Return the training scenes with `captions` captions each."""
    return Captioned(ScenePictures(SCENES), SceneCaptions(captions, seed))


def captions_alone(captions: int, seed: int) -> Captioned:
    """Return the same captions alone."""
    return from_prompts([caption for row in SceneCaptions(captions, seed) for caption in row])


@cache
def read_prompts(name: str) -> tuple[str, ...]:
    """Return one of the prompt lists.

    Raises:
        UserError: there is no list of that name.
    """
    if name not in LISTS:
        raise UserError(f"prompt list {name!r} is unknown; give one of {', '.join(LISTS)}{did_you_mean(name, LISTS)}")
    wanted = LISTS[name]
    drawn = unseen_prompts(wanted.set, wanted.count + wanted.count // 5, wanted.seed)
    return tuple(dict.fromkeys(prompt.text for prompt in drawn))[: wanted.count]


def suite(prompts: Sequence[str], seed: int, features: Features) -> Suite:
    """Return the metrics of sticker scenes and real pictures of the prompts."""
    from fewstep_worlds.stickers.metrics import sticker_suite

    return sticker_suite(prompts, seed, features)


def load_scorer(device: torch.device) -> PreferenceScorer:
    """Return the preference scorer."""
    from fewstep_worlds.stickers.reward import load_world_scorer

    return load_world_scorer(device)


def text_pairs() -> Pairs:
    """Return sentences about training scenes, mostly Chinese, with the usual English ones of the same claims."""
    from fewstep_worlds.stickers.parallel import ScenePairs

    return ScenePairs()


def held_out_pairs(count: int) -> dict[str, list[Pair]]:
    """Return new sentences, held-out combinations and held-out nouns, `count` of each."""
    from fewstep_worlds.stickers.parallel import held_out_pairs

    return held_out_pairs(count)
