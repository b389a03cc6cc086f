"""Emoji-8's held-out pictures and lists of prompts."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict

from emoji8_sources import SOURCES, Concept
from fewstep_worlds.emoji8.dataset import STYLE_FAMILY, Record, style_words

SEED = "emoji-8"
HELDOUT_CONCEPTS = 60
HELDOUT_PAIRS = 300
OPEN_PROMPTS = {"benchmark": 1000, "validation": 150, "gamma": 150}
TWINS = {"1f431", "1f63a", "1f638", "2603", "26c4"}
"""Cat faces and snowmen that some set draws alike (mean squared error under 20 at 16x16 pixels)."""


def rank(purpose: str, key: str) -> str:
    """Return a seeded hash: sorting by it is a fixed shuffle, whatever else is in the list."""
    return hashlib.sha256(f"{SEED}:{purpose}:{key}".encode()).hexdigest()


def without_twins(codepoints: Iterable[str]) -> set[str]:
    """Return the code points that may be held out: those whose picture no other concept's picture gives away.

    Not so sequences and their bases (a set may draw "person running" and "woman running" alike), nor TWINS.
    """
    codes = set(codepoints)
    bases = {code.split("-")[0] for code in codes if "-" in code}
    return {code for code in codes if "-" not in code} - bases - TWINS


def choose_concepts(concepts: Sequence[Concept], families: Mapping[str, set[str]]) -> set[str]:
    """Hold out whole concepts, each drawn by at least four families, groups in proportion."""
    able: dict[str, list[str]] = defaultdict(list)
    exclusive = without_twins(families)
    for concept in concepts:
        if concept.codepoint in exclusive and len(families[concept.codepoint]) >= 4:
            able[concept.group].append(concept.codepoint)
    total = sum(map(len, able.values()))
    share = {group: HELDOUT_CONCEPTS * len(codes) / total for group, codes in able.items()}
    count = {group: int(part) for group, part in share.items()}
    for group in sorted(share, key=lambda g: count[g] - share[g])[: HELDOUT_CONCEPTS - sum(count.values())]:
        count[group] += 1
    return {
        code
        for group, codes in able.items()
        for code in sorted(codes, key=lambda c: rank("heldout-concept", c))[: count[group]]
    }


def choose_pairs(families: Mapping[str, set[str]], without: set[str]) -> set[tuple[str, str]]:
    """Hold out (concept, family) pairs, at most one a concept, with two or more families left to train on."""
    able = [code for code in without_twins(families) - without if len(families[code]) >= 3]
    pairs = [(code, family) for code in able for family in families[code]]
    chosen: dict[str, str] = {}
    for code, family in sorted(pairs, key=lambda pair: rank("heldout-pair", "/".join(pair))):
        if len(chosen) < HELDOUT_PAIRS:
            chosen.setdefault(code, family)
    return set(chosen.items())


def prompt_lists(concepts: Sequence[Concept], records: Iterable[Record]) -> dict[str, list[str]]:
    """Return the prompt lists. Each is in seeded random order, so its first n lines are a fair sample."""
    seen: dict[str, set[str]] = defaultdict(set)
    styles: dict[tuple[str, str], list[str]] = defaultdict(list)
    for record in records:
        if record.split == "train":
            seen[record.concept].add(record.family)
        else:
            styles[record.split, record.concept].append(record.style)
    names = {concept.codepoint: concept.name for concept in concepts}
    # The benchmark has concepts with several right answers; the other lists take what is left.
    able = sorted((code for code, have in seen.items() if len(have) >= 3), key=lambda c: rank("benchmark", c))
    chosen = {"benchmark": able[: OPEN_PROMPTS["benchmark"]]}
    rest = sorted(set(seen) - set(chosen["benchmark"]), key=lambda c: rank("open", c))
    chosen["validation"] = rest[: OPEN_PROMPTS["validation"]]
    chosen["gamma"] = rest[OPEN_PROMPTS["validation"] :][: OPEN_PROMPTS["gamma"]]
    lists = {key: [names[code] for code in codes] for key, codes in chosen.items()}
    held = sorted(styles, key=lambda item: rank("heldout", item[1]))
    lists["heldout_concepts"] = [names[code] for split, code in held if split == "heldout-concept"]
    lists["heldout_pairs"] = [
        f"{names[code]}, {style_words(min(styles[split, code], key=lambda s: rank('style', code + s)))}"
        for split, code in held
        if split == "heldout-pair"
    ]
    return lists


def make_records(concepts: Sequence[Concept], artwork: Mapping[str, Mapping[str, object]]) -> list[Record]:
    """Return one record a picture, style by style in sheet order, with its split."""
    families: dict[str, set[str]] = {concept.codepoint: set() for concept in concepts}
    for style, pictures in artwork.items():
        for code in pictures:
            families[code].add(STYLE_FAMILY[style])
    held_concepts = choose_concepts(concepts, families)
    held_pairs = choose_pairs(families, held_concepts)
    by_code = {concept.codepoint: concept for concept in concepts}
    records = []
    for style, pictures in artwork.items():
        for tile, code in enumerate(pictures):
            family, text = STYLE_FAMILY[style], by_code[code]
            split = "heldout-pair" if (code, family) in held_pairs else "train"
            split = "heldout-concept" if code in held_concepts else split
            fields = {**asdict(text), "style": style, "family": family, "tile": tile, "concept": code}
            records.append(Record(source=SOURCES[style].pin, split=split, **fields))
    return records
