"""Scenes with a true prompt and prompts of which one fact is wrong."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from fewstep.common.random_streams import generator
from fewstep_worlds.stickers import heldout
from fewstep_worlds.stickers.claim import OPPOSITE, Claim, check, facts_of, make_claim
from fewstep_worlds.stickers.dataset import draw_scenes
from fewstep_worlds.stickers.draw import Picture
from fewstep_worlds.stickers.grammar import write
from fewstep_worlds.stickers.scene import MOST, Scene, make_scene
from fewstep_worlds.stickers.vocabulary import COLOURS, NAMES, PATTERNS, STYLES

MOST_OF_TWO = 4
"""Most stickers of one of two concepts in a scene, so that a wrong count is not known by the sentence alone."""
TRIES = 50


@dataclass(frozen=True)
class Choice:
    """Prompts of one scene.

    Attributes:
        claim: of the true prompt.
        prompts: the true one, then one for each of `wrong`.
        wrong: the fact that is wrong: a name of `FACTS`.
    """

    scene: Scene
    claim: Claim
    prompts: tuple[str, ...]
    wrong: tuple[str, ...]


def _concepts(claim: Claim, rng: np.random.Generator) -> Claim:
    """Exchange a concept, or else leave one out or add one."""
    things = list(claim.things)
    number, new = int(rng.integers(len(things))), NAMES[int(rng.integers(len(NAMES)))]
    concept, count = things[number]
    if rng.random() < 0.7 or (count or 0) > MOST_OF_TWO:
        things[number] = (new, count)
        return replace(claim, things=tuple(things))
    if len(things) == 2:
        return replace(claim, things=(things[number],), relation=None)
    return replace(claim, things=((concept, count), (new, _count(2, rng))))


def _count(kinds: int, rng: np.random.Generator) -> int:
    return 1 + int(rng.integers(MOST if kinds == 1 else MOST_OF_TWO))


def _counts(claim: Claim, rng: np.random.Generator) -> Claim:
    """Exchange a count, half of the time for a neighbouring one; "several" for one."""
    things, most = list(claim.things), MOST if len(claim.things) == 1 else MOST_OF_TWO
    number = int(rng.integers(len(things)))
    concept, count = things[number]
    new = _count(len(things), rng) if count else 1
    if count and rng.random() < 0.5:
        new = min(max(count + (1 if rng.random() < 0.5 else -1), 1), most)
    things[number] = (concept, new)
    return replace(claim, things=tuple(things), relation=None)


def _relations(claim: Claim, rng: np.random.Generator) -> Claim:
    """Exchange a relation for its opposite half of the time, in one of both orders of the things."""
    relation = list(OPPOSITE)[int(rng.integers(len(OPPOSITE)))]
    if claim.relation and rng.random() < 0.5:
        relation = OPPOSITE[claim.relation]
    if rng.random() < 0.5:
        return replace(claim, things=claim.things[::-1], relation=OPPOSITE[relation])
    return replace(claim, relation=relation)


FACTS: dict[str, Callable[[Claim, np.random.Generator], Claim]] = {
    "concepts": _concepts,
    "count": _counts,
    "relation": _relations,
    "colour": lambda claim, rng: replace(claim, colour=tuple(COLOURS)[int(rng.integers(len(COLOURS)))]),
    "pattern": lambda claim, rng: replace(claim, pattern=PATTERNS[int(rng.integers(len(PATTERNS)))]),
    "style": lambda claim, rng: replace(claim, style=STYLES[int(rng.integers(len(STYLES)))]),
}
"""Fact -> (claim, rng) -> a claim with another value of this fact, which may be true as well."""


def wrong_claim(
    claim: Claim, scene: Scene, fact: str, rng: np.random.Generator, held_out: Collection[str] = ()
) -> Claim | None:
    """Return a false claim that differs from a true one in one stated fact; None if there is none.

    A fact that is left open stays open, so that sentences that state more are not the false ones.

    Args:
        held_out: kinds of `heldout.KINDS` that the false claim may belong to. In training there are none, so that what
            is held out is not learnt to be false.
    """
    if not getattr(claim, fact, True):
        return None
    facts = facts_of(scene)
    for _ in range(TRIES):
        found = FACTS[fact](claim, rng)
        concepts = {concept for concept, _ in found.things}
        kinds = heldout.held_out_kinds(concepts, found.style or "", found.colour or "")
        if len(concepts) == len(found.things) and kinds <= {*held_out} and not all(check(found, facts).values()):
            return found
    return None


def make_choice(scene: Scene, rng: np.random.Generator, held_out: Collection[str] = ()) -> Choice:
    """Return a true prompt of a scene and one wrong prompt a fact; where a fact has none, of concepts or count."""
    claim = make_claim(scene, rng)
    claims, wrong = [claim], []
    for fact in FACTS:
        found, named = wrong_claim(claim, scene, fact, rng, held_out), fact
        while found is None:
            named = "concepts" if rng.random() < 0.5 else "count"
            found = wrong_claim(claim, scene, named, rng, held_out)
        claims.append(found)
        wrong.append(named)
    prompts = tuple(write(one, "english", rng, heldout.synonyms()) for one in claims)
    return Choice(scene, claim, prompts, tuple(wrong))


def draw_choices(seed: int, indices: np.ndarray, folder: Path, split: str = "train") -> tuple[Picture, list[Choice]]:
    """Return the pictures of scenes of a split, uint8 [N, 64, 64, 3], and a choice of English prompts for each."""
    choices = [
        make_choice(make_scene(seed, index, split), generator(seed, f"stickers choice {split}", index), {split})
        for index in indices.tolist()
    ]
    return draw_scenes(seed, indices, split, folder), choices
