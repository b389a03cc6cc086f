"""The text that `build_text_encoder.py` trains on: WordNet 3.0 and the captions of Emoji-8's training split.

No line names a held-out concept or pairs one with a held-out style family, and no pair of synonyms holds a
word of Emoji-8's synonym test.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fewstep.common.files import read_json
from fewstep_worlds.emoji8.dataset import SPLITS, STYLE_FAMILY, folder, load_records, style_words

DRAWABLE = frozenset(["05", "06", "08", "13", "17", "18", "19", "20", "25", "27"])
"""WordNet's nouns of animals, artifacts, bodies, food, objects, people, phenomena, plants, shapes, matter."""
SENSES = 2
"""A noun is drawable if one of its first SENSES senses is."""
TEMPLATES = (
    "a {}",
    "the {}",
    "two {}",
    "picture of a {}",
    "drawing of {}",
    "my {}",
    "cute {}",
    "{} icon",
    "big {}",
)


@dataclass(frozen=True)
class Words:
    """Training text, and the `names` of all concepts and the `drawable` nouns, which are not.

    `captions`, `keywords` and `lemmas` are short, `glosses` are phrases, `synonyms` are pairs of lemmas.
    """

    captions: tuple[str, ...]
    keywords: tuple[str, ...]
    lemmas: tuple[str, ...]
    glosses: tuple[str, ...]
    synonyms: tuple[tuple[str, str], ...]
    names: frozenset[str]
    drawable: frozenset[str]


def read_words(wordnet: Path) -> Words:
    """Read the training text, less every line that holds the name of a held-out concept as whole words."""
    held = sorted({plain(record.name) for record in load_records("heldout-concept")})
    banned = re.compile(rf"\b(?:{'|'.join(map(re.escape, held))})(?:e?s)?\b")

    tested = {plain(item["word"]) for item in read_json(folder() / "synonyms.json")}

    def allowed(texts: Sequence[str]) -> tuple[str, ...]:
        return tuple(text for text in dict.fromkeys(texts) if text.isascii() and not banned.search(text))

    captions, keywords = [], []
    for record in load_records("train"):
        name, words = plain(record.name), [plain(word) for word in record.keywords]
        style = style_words(record.style)
        captions += [name, f"{name}, {style}", ", ".join(words), ", ".join([name, *words[:2]])]
        captions += [", ".join([*words[:3], style])]
        keywords += [name, *words]
    lemmas, glosses, synonyms, drawable = read_wordnet(wordnet)
    return Words(
        allowed(captions),
        allowed(keywords),
        allowed(lemmas),
        allowed(glosses),
        tuple(pair for pair in synonyms if not any(word in tested or banned.search(word) for word in pair)),
        frozenset(plain(record.name) for record in load_records(SPLITS)),
        frozenset(drawable),
    )


def read_wordnet(wordnet: Path) -> tuple[list[str], list[str], list[tuple[str, str]], set[str]]:
    """Return lemmas, parts of glosses of 3 to 10 words, pairs of nouns of one first sense, drawable nouns."""
    lemmas: list[str] = []
    glosses: list[str] = []
    senses: dict[str, list[str]] = {}
    drawable: set[str] = set()
    for line in (wordnet / "index.noun").read_text(encoding="ascii").splitlines():
        if not line.startswith(" "):
            fields = line.split()
            senses[plain(fields[0])] = fields[6 + int(fields[3]) :]
    synonyms: list[tuple[str, str]] = []
    for part in ("noun", "verb", "adj", "adv"):
        for line in (wordnet / f"data.{part}").read_text(encoding="ascii").splitlines():
            if line.startswith(" "):
                continue
            synset, _, gloss = line.partition(" | ")
            fields = synset.split(" ")
            spelled = [word.partition("(")[0] for word in fields[4 : 4 + 2 * int(fields[3], 16) : 2]]
            words = [plain(word) for word in spelled]
            lemmas += words
            parts = (text.split() for text in re.split(r"[;\"]", gloss))
            glosses += [" ".join(part[:10]) for part in parts if len(part) > 2]
            if part == "noun":
                same = [word for word in dict.fromkeys(words) if senses.get(word, [""])[0] == fields[0]]
                if fields[1] in DRAWABLE:
                    common = [plain(word) for word in spelled if word.islower()]
                    drawable.update(word for word in common if fields[0] in senses.get(word, [])[:SENSES])
                synonyms += itertools.combinations(same, 2)
    return lemmas, [text.lower() for text in glosses], synonyms, drawable


def plain(text: str) -> str:
    """Return text in lower case, with blanks for underscores and straight apostrophes."""
    return text.replace("_", " ").replace("\u2019", "'").lower().strip()


def compose(words: Words, draw: random.Random) -> str:
    """Draw one line of training text: a caption, a lemma, a gloss or a prompt made of several of them."""
    kind = draw.random()
    if kind < 0.12:
        return draw.choice(words.captions)
    if kind < 0.42:
        return draw.choice(words.lemmas)
    if kind < 0.57:
        return draw.choice(words.glosses)
    pool = words.keywords if draw.random() < 0.3 else words.lemmas
    if kind < 0.75:
        return ", ".join(draw.choice(pool) for _ in range(draw.randint(2, 4)))
    if kind < 0.90:
        return draw.choice(TEMPLATES).format(draw.choice(pool))
    noun = draw.choice(words.lemmas)
    # A name with a style could be one of the held-out pairs.
    return noun if noun in words.names else f"{noun}, {style_words(draw.choice(sorted(STYLE_FAMILY)))}"


# ----------------------------------------------------------------------------------------------- tokenizer
