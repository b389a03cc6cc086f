"""Emoji-8 as a `fewstep.common.defaults.World`, without the verbs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fewstep_worlds.common.location import root
from fewstep_worlds.emoji8.dataset import SIZE, captioned, captions_alone, read_prompts

if TYPE_CHECKING:
    import torch

    from fewstep.evaluation.evaluate import Suite
    from fewstep.evaluation.features import Features
    from fewstep.inference.multilingual.pairs import Pair
    from fewstep.methods.rewards.reward import PreferenceScorer

__all__ = ["CAPTIONS", "PICTURES", "SIZE", "STUDENTS", "captioned", "captions_alone", "read_prompts", "root"]

PICTURES, CAPTIONS = "emoji8", "captions"
STUDENTS = ("tcd",)


def suite(prompts: Sequence[str], seed: int, features: Features) -> Suite:
    """Return Emoji-8's metrics and the real pictures of the prompts."""
    from fewstep_worlds.emoji8.metrics import emoji8_suite

    return emoji8_suite(prompts, seed, features)


def load_scorer(device: torch.device) -> PreferenceScorer:
    """Return Emoji-8's preference scorer."""
    from fewstep_worlds.emoji8.scorers.reward import load_world_scorer, sentence_encoder

    return load_world_scorer(sentence_encoder(), device)


def text_pairs() -> tuple[Pair, ...]:
    """Return Emoji-8's Chinese captions with their English ones."""
    from fewstep_worlds.emoji8.translations import chinese_pairs

    return chinese_pairs()


def held_out_pairs(count: int) -> dict[str, list[Pair]]:
    """Return held-out concepts by their Chinese names, alone and with keywords, `count` at most."""
    from fewstep_worlds.emoji8.translations import held_out_pairs

    return held_out_pairs(count)
