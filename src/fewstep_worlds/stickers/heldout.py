"""Held-out facts and words, drawn from a fixed seed.

Of pictures: one art style, pairs of concepts, (concept, style), (concept, background colour). Of English: synonyms.
Of Chinese: every word of some concepts, and (concept, background colour) in one sentence.
"""

from __future__ import annotations

from functools import cache
from itertools import combinations, product
from typing import TypeVar

from fewstep.common.random_streams import generator
from fewstep_worlds.stickers.vocabulary import COLOURS, CONCEPTS, HELD_OUT_STYLE, NAMES, STYLES

T = TypeVar("T")

SEED = 28
KINDS = ("style", "pair", "concept_style", "concept_colour")
"""Kinds of held-out pictures."""
TEXT_KINDS = ("synonym", "chinese_concept", "chinese_colour")
"""Kinds of held-out sentences, about pictures like those that are trained on."""


def _draw(purpose: str, of: list[T], count: int) -> frozenset[T]:
    return frozenset(of[i] for i in generator(SEED, f"held out {purpose}").choice(len(of), count, replace=False))


@cache
def pairs() -> frozenset[frozenset[str]]:
    """Return 300 pairs of concepts that no training picture shows together."""
    return _draw("pairs", [frozenset(pair) for pair in combinations(NAMES, 2)], 300)


@cache
def concept_styles() -> frozenset[tuple[str, str]]:
    """Return 40 (concept, style), each of another concept, that no training picture shows."""
    concepts = sorted(_draw("concept styles", list(NAMES), 40))
    seen = [style for style in STYLES if style != HELD_OUT_STYLE]
    chosen = generator(SEED, "held out style of a concept").integers(len(seen), size=len(concepts))
    return frozenset((concept, seen[number]) for concept, number in zip(concepts, chosen, strict=True))


@cache
def concept_colours() -> frozenset[tuple[str, str]]:
    """Return 40 (concept, background colour) that no training picture shows."""
    return _draw("concept colours", list(product(NAMES, COLOURS)), 40)


@cache
def synonyms() -> frozenset[str]:
    """Return 60 English words, each of another concept, that no training prompt has."""
    concepts = sorted(_draw("synonyms", list(NAMES), 60))
    rng = generator(SEED, "held out synonym of a concept")
    return frozenset(CONCEPTS[name].words[int(rng.integers(len(CONCEPTS[name].words)))] for name in concepts)


@cache
def chinese_concepts() -> frozenset[str]:
    """Return 12 concepts that no Chinese training prompt names."""
    return _draw("chinese concepts", list(NAMES), 12)


@cache
def chinese_colours() -> frozenset[tuple[str, str]]:
    """Return 200 (concept, background colour) that no Chinese training prompt has together."""
    return _draw("chinese colours", list(product(NAMES, COLOURS)), 200)


def held_out_kinds(concepts: set[str], style: str, colour: str) -> frozenset[str]:
    """Return which kinds of `KINDS` a picture of these facts belongs to; empty for one that may be trained on."""
    found = {
        "style": style == HELD_OUT_STYLE,
        "pair": len(concepts) == 2 and frozenset(concepts) in pairs(),
        "concept_style": any((concept, style) in concept_styles() for concept in concepts),
        "concept_colour": any((concept, colour) in concept_colours() for concept in concepts),
    }
    return frozenset(kind for kind, held in found.items() if held)
