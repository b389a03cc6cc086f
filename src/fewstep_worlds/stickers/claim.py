"""Claims of prompts, facts of pictures, and whether they agree."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

import numpy as np

from fewstep_worlds.stickers.scene import Relation, Scene, relation

STATED = {"count": 0.85, "relation": 0.9, "colour": 0.6, "pattern": 0.5, "style": 0.4}
"""Fact -> probability that a prompt states it. The concepts, and a count of one, always are."""
OPPOSITE: dict[Relation, Relation] = {"left": "right", "right": "left", "above": "below", "below": "above"}


@dataclass(frozen=True)
class Claim:
    """Claim of a prompt; None is left open.

    Attributes:
        things: concept and count of one or two kinds of stickers; a count of None means at least two.
        relation: where the first sticker lies as seen from the second, of one each.
    """

    things: tuple[tuple[str, int | None], ...]
    relation: Relation | None = None
    colour: str | None = None
    pattern: str | None = None
    style: str | None = None

    @property
    def kind(self) -> str:
        """Return single, several, two or relation: the category that scene accuracy is reported by."""
        if self.relation:
            return "relation"
        if len(self.things) == 2:
            return "two"
        return "single" if self.things[0][1] == 1 else "several"


@dataclass(frozen=True)
class Facts:
    """Facts of a picture.

    Attributes:
        places: concept and centre (x, y) in pixels of each sticker.
    """

    places: tuple[tuple[str, float, float], ...]
    colour: str
    pattern: str
    style: str


def facts_of(scene: Scene) -> Facts:
    """Return the facts of a scene."""
    places = tuple((sticker.concept, sticker.x, sticker.y) for sticker in scene.stickers)
    return Facts(places, scene.background.colour, scene.background.pattern, scene.style)


def check(claim: Claim, facts: Facts) -> dict[str, bool]:
    """Return for each stated fact whether it holds: concepts, count, and as stated relation, colour, pattern, style."""
    counts = Counter(concept for concept, _, _ in facts.places)
    result = {
        "concepts": set(counts) == {concept for concept, _ in claim.things},
        "count": all(counts[concept] == n if n else counts[concept] >= 2 for concept, n in claim.things),
    }
    if claim.relation:
        (first, _), (second, _) = claim.things
        result["relation"] = claim.relation == relation_between(facts, first, second)
    for name in ("colour", "pattern", "style"):
        stated = getattr(claim, name)
        if stated:
            result[name] = stated == getattr(facts, name)
    return result


def relation_between(facts: Facts, first: str, second: str) -> Relation | None:
    """Return where `first` lies as seen from `second`; None if it is not clear, or one of them is not there once."""
    spots = [[(x, y) for concept, x, y in facts.places if concept == wanted] for wanted in (first, second)]
    if any(len(found) != 1 for found in spots):
        return None
    return relation(*spots[0][0], *spots[1][0])


def full_claim(scene: Scene) -> Claim:
    """Return the claim that states every fact of a scene."""
    facts = facts_of(scene)
    things = tuple(scene.counts.items())
    found = relation_between(facts, things[0][0], things[1][0]) if len(things) == 2 else None
    return Claim(things, found, facts.colour, facts.pattern, facts.style)


def make_claim(scene: Scene, rng: np.random.Generator) -> Claim:
    """Return a true claim about a scene that leaves a random part of the facts open, its things in random order."""
    full = full_claim(scene)
    stated = {name: rng.random() < share for name, share in STATED.items()}
    things = tuple((concept, n if n == 1 or stated["count"] else None) for concept, n in full.things)
    found = full.relation if stated["relation"] else None
    if rng.random() < 0.5:
        things, found = things[::-1], OPPOSITE[found] if found else None
    open_facts = {name: None for name in ("colour", "pattern", "style") if not stated[name]}
    return replace(full, things=things, relation=found, **open_facts)
