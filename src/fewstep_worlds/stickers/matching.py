"""Scenes that agree with a claim: real pictures of a prompt."""

from __future__ import annotations

import numpy as np

from fewstep.common.random_streams import generator
from fewstep_worlds.stickers.claim import Claim, check, facts_of
from fewstep_worlds.stickers.heldout import held_out_kinds
from fewstep_worlds.stickers.prompts import stated_kinds
from fewstep_worlds.stickers.scene import COUNTS, MOST, Scene, make_background, pick, place, weighted
from fewstep_worlds.stickers.vocabulary import COLOURS, STYLES


def is_possible(claim: Claim) -> bool:
    """Return whether any scene agrees: a claim may name one concept twice, or too many stickers."""
    concepts = {concept for concept, _ in claim.things}
    return len(concepts) == len(claim.things) and sum(n or 2 for _, n in claim.things) <= MOST


def matching_scene(claim: Claim, seed: int, index: int) -> Scene:
    """Return scene `index` of those that agree with a possible claim.

    What the claim leaves open is drawn as for training scenes, and nothing of it is held out.
    """
    rng = generator(seed, "stickers matching", index)
    shown = {concept for concept, _ in claim.things}
    stated = stated_kinds(claim)
    while True:
        style, colour = claim.style or pick(rng, STYLES), claim.colour or pick(rng, tuple(COLOURS))
        if held_out_kinds(shown, style, colour) == stated:
            break
    background = make_background(rng, colour, claim.pattern)
    concepts = [concept for (concept, _), n in zip(claim.things, _counts(claim, rng)) for _ in range(n)]
    while True:
        scene = Scene(style, background, place(rng, concepts, apart=claim.relation is not None))
        if all(check(claim, facts_of(scene)).values()):
            return scene


def _counts(claim: Claim, rng: np.random.Generator) -> list[int]:
    """Return the number of stickers of each concept, of two kinds at most four where it is open."""
    given = [n for _, n in claim.things]
    if given == [None]:
        return [weighted(rng, COUNTS)]
    room = MOST - sum(n or 2 for n in given)
    return [n or int(rng.integers(2, 3 + min(2, room))) for n in given]
