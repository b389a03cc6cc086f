"""Emoji-8's text pairs: Chinese names and keywords, and the English names of the teacher's captions. Split by concept.

A held-out concept's Chinese is in no pair: no name or keyword of it with two or more characters occurs inside a
Chinese text of a pair, and none with one character is a whole entry of one. Its English name remains, paired with
itself: the adapter must map unseen Chinese to it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fewstep.common.rng import generator
from fewstep.inference.multilingual.pairs import Pair
from fewstep_worlds.emoji8 import dataset as emoji8

TEST, VALIDATION = 120, 60
"""Concepts whose Chinese is held out: the first ones of the benchmark's and of the validation list of prompts."""
COMMA = "，"


@dataclass(frozen=True)
class Words:
    """The bundled world's concepts, one record each, by what pairs may hold of them.

    Attributes:
        train: English and Chinese.
        test: English alone, to be measured on.
        validation: English alone, to choose settings on.
        unseen: nothing; their pictures are held out too.
    """

    train: tuple[emoji8.Record, ...]
    test: tuple[emoji8.Record, ...]
    validation: tuple[emoji8.Record, ...]
    unseen: tuple[emoji8.Record, ...]

    @classmethod
    def load(cls) -> Words:
        """Read them, in the order of the lists, and of the pictures."""
        records = emoji8.load_records(emoji8.SPLITS)
        unseen = {record.concept for record in records if record.split == "heldout-concept"}
        every = list({record.concept: record for record in records}.values())
        by_name = {record.name: record for record in every}
        test = tuple(by_name[name] for name in emoji8.read_prompts("benchmark")[:TEST])
        validation = tuple(by_name[name] for name in emoji8.read_prompts("validation")[:VALIDATION])
        aside = unseen | {record.concept for record in (*test, *validation)}
        return cls(
            tuple(record for record in every if record.concept not in aside),
            test,
            validation,
            tuple(record for record in every if record.concept in unseen),
        )

    @property
    def forbidden(self) -> frozenset[str]:
        """Chinese names and keywords of all concepts whose Chinese is held out."""
        return frozenset().union(*(chinese(record) for record in (*self.test, *self.validation, *self.unseen)))


def chinese(record: emoji8.Record) -> set[str]:
    """Return a concept's Chinese name and keywords."""
    return {record.name_zh, *record.keywords_zh}


def leaks(entry: str, forbidden: Iterable[str]) -> bool:
    """Return whether a Chinese entry is or contains a held-out one (a single character only as the whole entry)."""
    return any(entry == held or (len(held) > 1 and held in entry) for held in forbidden)


def with_keywords(record: emoji8.Record, keywords: Sequence[str], most: int = 3) -> str:
    """Return Chinese name and first keywords: "独木舟，船"."""
    return COMMA.join([record.name_zh, *keywords[:most]])


def chinese_pairs(words: Words | None = None, seed: int = 0) -> tuple[Pair, ...]:
    """Return all pairs: names, names with keywords, keywords, keywords of one concept alone, and English names.

    Args:
        words: the concepts; the bundled world's by default.
        seed: of the choice of keywords.
    """
    words = words or Words.load()
    forbidden = words.forbidden
    used = Counter(entry for record in words.train for entry in chinese(record))
    found: list[Pair] = []
    for number, record in enumerate(words.train):
        draw = generator(seed, "chinese keywords", number)
        keywords = [word for word in record.keywords_zh if not leaks(word, forbidden)]
        texts = [word for word in keywords if used[word] == 1]
        if not leaks(record.name_zh, forbidden):
            texts.append(record.name_zh)
            texts += [with_keywords(record, list(draw.permutation(keywords))) for _ in range(2) if keywords]
        if len(keywords) > 1:
            texts.append(COMMA.join(draw.permutation(keywords)[:4]))
        found += [Pair(text, record.name) for text in texts]
    english = (*words.train, *words.test, *words.validation)
    return tuple(dict.fromkeys([*found, *(Pair(record.name, record.name) for record in english)]))


def held_out_pairs(count: int) -> dict[str, list[Pair]]:
    """Return the first test concepts, at most `count`: Chinese names, and names with keywords."""
    test = Words.load().test[:count]
    return {
        "names": [Pair(record.name_zh, record.name) for record in test],
        "names with keywords": [Pair(with_keywords(record, record.keywords_zh), record.name) for record in test],
    }
