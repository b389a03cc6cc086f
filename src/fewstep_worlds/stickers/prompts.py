"""Prompts of scenes: for training, and sets of unseen ones by what is held out."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count

from fewstep.common.errors import UserError
from fewstep.common.random_streams import generator
from fewstep_worlds.stickers import heldout
from fewstep_worlds.stickers.claim import Claim, make_claim
from fewstep_worlds.stickers.grammar import LanguageName, write
from fewstep_worlds.stickers.scene import Scene, make_scene
from fewstep_worlds.stickers.vocabulary import CONCEPTS

SETS = ("open", *heldout.KINDS, *heldout.TEXT_KINDS)
"""Sets of test prompts: new scenes of what is trained on, and each kind of what is held out."""


@dataclass(frozen=True)
class Prompt:
    """A sentence about a scene, and what it states."""

    text: str
    claim: Claim
    scene: Scene


def training_prompt(scene: Scene, seed: int, index: int, language: LanguageName = "english") -> Prompt | None:
    """Return the prompt of training scene `index`; None where its Chinese is held out."""
    rng = generator(seed, "stickers prompt", index)
    claim = make_claim(scene, rng)
    if language == "chinese" and _held_out_chinese(claim):
        return None
    return Prompt(write(claim, language, rng, heldout.synonyms()), claim, scene)


def unseen_prompts(name: str, n: int, seed: int, language: LanguageName = "english") -> list[Prompt]:
    """Return the first `n` prompts of a set; `seed` is another than that of training scenes.

    Prompts of a kind of held-out pictures state what is held out.

    Raises:
        UserError: an unknown set, or one of the other language.
    """
    if name not in SETS or (name in heldout.TEXT_KINDS and (name == "synonym") != (language == "english")):
        raise UserError(f"{name!r} is no set of {language} prompts; give one of {', '.join(SETS)}")
    split = name if name in heldout.KINDS else "train"
    wanted = frozenset((name,)) if name.startswith("chinese") else frozenset()
    banned = _all_but_held_out() if name == "synonym" else heldout.synonyms()
    found: list[Prompt] = []
    for index in count():
        scene = make_scene(seed, index, split)
        rng = generator(seed, f"stickers prompt {name}", index)
        claim = make_claim(scene, rng)
        if name == "synonym" and any(banned.issuperset(CONCEPTS[concept].words) for concept, _ in claim.things):
            continue
        if name in heldout.KINDS and stated_kinds(claim) != {name}:
            continue
        if language == "chinese" and _held_out_chinese(claim) != wanted:
            continue
        found.append(Prompt(write(claim, language, rng, banned), claim, scene))
        if len(found) == n:
            break
    return found


def stated_kinds(claim: Claim) -> frozenset[str]:
    """Return which kinds of held-out pictures a claim states."""
    return heldout.held_out_kinds({concept for concept, _ in claim.things}, claim.style or "", claim.colour or "")


def _all_but_held_out() -> frozenset[str]:
    words = {word for concept in CONCEPTS.values() for word in (concept.name, *concept.words)}
    return frozenset(words - heldout.synonyms())


def _held_out_chinese(claim: Claim) -> frozenset[str]:
    """Return which kinds of held-out Chinese a claim belongs to."""
    concepts = {concept for concept, _ in claim.things}
    found = {
        "chinese_concept": bool(concepts & heldout.chinese_concepts()),
        "chinese_colour": any((concept, claim.colour) in heldout.chinese_colours() for concept in concepts),
    }
    return frozenset(kind for kind, held in found.items() if held)
