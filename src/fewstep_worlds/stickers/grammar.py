"""Claims as English and Chinese sentences, and sentences back as claims.

A language is a set of tables from phrases to meanings. Writing picks a phrase of a meaning; parsing searches the
tables. "a rocket left of a gem stone on blue stripes, twemoji style" is a noun phrase, a joint, a noun phrase,
a ground, and a style.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Literal, TypeVar

import numpy as np

from fewstep.common.errors import UserError
from fewstep_worlds.stickers.claim import Claim
from fewstep_worlds.stickers.scene import MOST, Relation
from fewstep_worlds.stickers.vocabulary import COLOURS, CONCEPTS, PATTERNS, STYLES, Concept

LanguageName = Literal["english", "chinese"]
Ground = tuple[str | None, str | None]
"""(pattern, colour); None is left open."""
Meaning = TypeVar("Meaning", bound=Hashable)

USUAL = 0.5
"""Probability of the first of several phrases with one meaning."""


@dataclass(frozen=True)
class Noun:
    """A counted concept, and the word that names it."""

    concept: str
    count: int | None
    word: str


@dataclass(frozen=True)
class Language:
    """Phrase -> meaning, the usual phrase of a meaning first.

    Attributes:
        joints: (between two noun phrases, after both) -> relation.
        grounds: phrases before and after the noun phrases, one of them empty.
    """

    nouns: Mapping[str, Noun]
    joints: Mapping[tuple[str, str], Relation | None]
    grounds: Mapping[tuple[str, str], Ground]
    styles: Mapping[str, str]


def write(claim: Claim, language: LanguageName, rng: np.random.Generator | None, without: Collection[str] = ()) -> str:
    """Return a sentence that states the claim and nothing else.

    Args:
        rng: of the choice of words; None for the usual ones.
        without: words that are not used for a concept.
    """
    phrases = _inverse(language)
    nouns = [
        _pick(
            rng, phrases.nouns[concept, count, _pick(rng, [w for w in _words(concept, language) if w not in without])]
        )
        for concept, count in claim.things
    ]
    text = nouns[0]
    if len(nouns) == 2:
        joint, tail = _pick(rng, phrases.joints[claim.relation])
        text = f"{nouns[0]}{joint}{nouns[1]}{tail}"
    if claim.pattern or claim.colour:
        before, after = _pick(rng, phrases.grounds[claim.pattern, claim.colour])
        text = f"{before}{text}{after}"
    return text + _pick(rng, phrases.styles[claim.style]) if claim.style else text


def read(text: str, language: LanguageName) -> Claim:
    """Return the claim of a sentence.

    Raises:
        UserError: it is no sentence of the grammar.
    """
    tables = languages()[language]
    style = _longest(phrase for phrase in tables.styles if text.endswith(phrase))
    rest = text.removesuffix(style)
    before, after = max(
        ((b, a) for b, a in tables.grounds if rest.startswith(b) and rest.endswith(a)),
        key=lambda pair: len(pair[0]) + len(pair[1]),
        default=("", ""),
    )
    rest = rest.removeprefix(before).removesuffix(after)
    pattern, colour = tables.grounds.get((before, after), (None, None))
    for nouns, relation in _splits(rest, tables):
        things = tuple((noun.concept, noun.count) for noun in nouns)
        return Claim(things, relation, colour, pattern, tables.styles.get(style))
    raise UserError(
        f"prompt = {text!r} is no {language} sentence of sticker scenes; give one such as {EXAMPLES[language]!r}"
    )


EXAMPLES: dict[LanguageName, str] = {
    "english": "a rocket left of a gem stone on blue stripes, twemoji style",
    "chinese": "一枚火箭在一颗宝石左边，蓝色条纹背景，twemoji风格",
}


def _splits(text: str, tables: Language) -> Iterator[tuple[list[Noun], Relation | None]]:
    if text in tables.nouns:
        yield [tables.nouns[text]], None
    for (joint, tail), relation in tables.joints.items():
        first, found, second = text.removesuffix(tail).partition(joint)
        if found and text.endswith(tail) and first in tables.nouns and second in tables.nouns:
            yield [tables.nouns[first], tables.nouns[second]], relation


def _longest(phrases: Iterator[str]) -> str:
    return max(phrases, key=len, default="")


def _pick(rng: np.random.Generator | None, phrases: list[Meaning]) -> Meaning:
    """Return the first phrase half of the time, or else any of the others; always the first one without `rng`."""
    if rng is None or len(phrases) == 1 or rng.random() < USUAL:
        return phrases[0]
    return phrases[1 + int(rng.integers(len(phrases) - 1))]


def _words(concept: str, language: LanguageName) -> list[str]:
    entry = CONCEPTS[concept]
    return [entry.name, *entry.words] if language == "english" else list(entry.chinese)


@dataclass(frozen=True)
class _Phrases:
    """A language's tables from meaning to phrases."""

    nouns: Mapping[tuple[str, int | None, str], list[str]]
    joints: Mapping[Relation | None, list[tuple[str, str]]]
    grounds: Mapping[Ground, list[tuple[str, str]]]
    styles: Mapping[str, list[str]]


@cache
def _inverse(language: LanguageName) -> _Phrases:
    tables = languages()[language]
    return _Phrases(
        _grouped(tables.nouns, lambda noun: (noun.concept, noun.count, noun.word)),
        _grouped(tables.joints, lambda relation: relation),
        _grouped(tables.grounds, lambda ground: ground),
        _grouped(tables.styles, lambda style: style),
    )


Phrase = TypeVar("Phrase")
Value = TypeVar("Value")


def _grouped(table: Mapping[Phrase, Value], key: Callable[[Value], Meaning]) -> dict[Meaning, list[Phrase]]:
    result: dict[Meaning, list[Phrase]] = {}
    for phrase, value in table.items():
        result.setdefault(key(value), []).append(phrase)
    return result


@cache
def languages() -> dict[LanguageName, Language]:
    """Return the tables of both languages."""
    return {"english": _english(), "chinese": _chinese()}


def phrases() -> list[str]:
    """Return every phrase of English sentences."""
    tables = languages()["english"]
    pairs = [*tables.joints, *tables.grounds]
    return [*tables.nouns, *tables.styles, *(phrase for pair in pairs for phrase in pair)]


# ------------------------------------------------------------------------------------------------------- English

NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
ALIKE = ("fish", "craft")
"""Endings of nouns whose plural is the same."""
COLOUR_WORDS = {"grey": "gray", "purple": "violet", "teal": "turquoise", "pink": "rose"}
PATTERN_WORDS = {
    "stripes": (("stripes",), ("striped",)),
    "dots": (("dots", "polka dots"), ("dotted", "spotted")),
    "checks": (("checks", "squares"), ("checkered", "chequered")),
    "stars": (("stars", "little stars"), ("starry",)),
    "gradient": (("gradient",), ("fading",)),
}
"""Pattern -> nouns and adjectives."""


def plural(noun: str) -> str:
    """Return the plural of an English noun of the vocabulary."""
    head, of, rest = noun.partition(" of ")
    if head.endswith(ALIKE):
        return noun
    if head.endswith("man"):
        head = head[:-2] + "en"
    elif head.endswith(("s", "x", "ch", "sh")):
        head += "es"
    elif head.endswith("y") and head[-2] not in "aeiou":
        head = head[:-1] + "ies"
    else:
        head += "s"
    return head + of + rest


def article(words: str) -> str:
    """Return the words after "a" or "an"."""
    return f"{'an' if words[0] in 'aeiou' or words.startswith('hour') else 'a'} {words}"


def _english() -> Language:
    nouns: dict[str, Noun] = {}
    for concept in CONCEPTS.values():
        for word in (concept.name, *concept.words):
            many = plural(word)
            _add(nouns, [article(word), f"one {word}"], Noun(concept.name, 1, word))
            for n in range(2, MOST + 1):
                _add(nouns, [f"{NUMBERS[n - 1]} {many}", f"{n} {many}"], Noun(concept.name, n, word))
            _add(nouns, [f"several {many}", f"some {many}"], Noun(concept.name, None, word))
    joints: dict[tuple[str, str], Relation | None] = {(" and ", ""): None, (" with ", ""): None}
    words: tuple[tuple[Relation, tuple[str, ...]], ...] = (
        ("left", ("left of", "to the left of")),
        ("right", ("right of", "to the right of")),
        ("above", ("above", "over", "higher than")),
        ("below", ("below", "under", "beneath")),
    )
    for relation, phrases in words:
        joints |= {(f" {phrase} ", ""): relation for phrase in phrases}
    grounds: dict[tuple[str, str], Ground] = {}
    for colour in (None, *COLOURS):
        for pattern in (None, *PATTERNS):
            if pattern or colour:
                _add(grounds, [("", f" {text}") for text in _english_grounds(pattern, colour)], (pattern, colour))
    styles: dict[str, str] = {}
    for style in STYLES:
        _add(styles, [f", {style} style", f" in {style} style", f" in the style of {style}"], style)
    return Language(nouns, joints, grounds, styles)


def _english_grounds(pattern: str | None, colour: str | None) -> list[str]:
    names = [name for name in (colour, COLOUR_WORDS.get(colour or "")) if name] or [""]
    result = []
    for name in names:
        space = f"{name} " if name else ""
        if pattern is None:
            result += [f"on {name}", f"on {article(name)} background"]
        elif pattern == "plain":
            result += [f"on plain {name}"] * bool(name) + [f"on a plain {space}background"]
        else:
            nouns, adjectives = PATTERN_WORDS[pattern]
            result += [f"on {article(space + noun) if pattern == 'gradient' else space + noun}" for noun in nouns]
            result += [f"on {article(adjective)} {space}background" for adjective in adjectives]
    return result


def _add(table: dict[Meaning, Value], phrases: list[Meaning], value: Value) -> None:
    for phrase in phrases:
        if phrase in table:
            raise ValueError(f"phrase {phrase!r} means both {table[phrase]} and {value}")
        table[phrase] = value


# ------------------------------------------------------------------------------------------------------- Chinese

CHINESE_NUMBERS = "一两三四五六七八九"
CHINESE_COLOURS = {
    "white": "白色", "grey": "灰色", "red": "红色", "orange": "橙色", "yellow": "黄色",
    "green": "绿色", "teal": "青色", "blue": "蓝色", "purple": "紫色", "pink": "粉色",
}  # fmt: skip
CHINESE_PATTERNS = {
    "stripes": ("条纹",),
    "dots": ("圆点", "波点"),
    "checks": ("格子", "方格"),
    "stars": ("星星图案", "星纹"),
    "gradient": ("渐变",),
}
CHINESE_SIDES: dict[Relation, tuple[str, ...]] = {
    "left": ("左边", "左侧"),
    "right": ("右边", "右侧"),
    "above": ("上面", "上方"),
    "below": ("下面", "下方"),
}


def _chinese() -> Language:
    nouns: dict[str, Noun] = {}
    for concept in CONCEPTS.values():
        for word in concept.chinese:
            for n in range(1, MOST + 1):
                _add(nouns, _counted(concept, word, CHINESE_NUMBERS[n - 1], str(n)), Noun(concept.name, n, word))
            _add(nouns, [f"几{concept.measure}{word}", f"一些{word}"], Noun(concept.name, None, word))
    joints: dict[tuple[str, str], Relation | None] = {("和", ""): None, ("与", ""): None}
    for relation, sides in CHINESE_SIDES.items():
        joints |= {("在", f"{of}{side}"): relation for side in sides for of in ("", "的")}
    grounds: dict[tuple[str, str], Ground] = {}
    for colour in (None, *COLOURS):
        for pattern in (None, *PATTERNS):
            if pattern or colour:
                texts = _chinese_grounds(pattern, CHINESE_COLOURS[colour] if colour else "")
                phrases = [pair for text in texts for pair in (("", f"，{text}背景"), (f"{text}背景上，", ""))]
                _add(grounds, phrases, (pattern, colour))
    styles: dict[str, str] = {}
    for style in STYLES:
        _add(styles, [f"，{style}风格", f"，{style}画风"], style)
    return Language(nouns, joints, grounds, styles)


def _counted(concept: Concept, word: str, *numbers: str) -> list[str]:
    return [f"{number}{concept.measure}{word}" for number in numbers]


def _chinese_grounds(pattern: str | None, colour: str) -> list[str]:
    if pattern is None:
        return [colour]
    if pattern == "plain":
        return [f"纯{colour}" if colour else "纯色"]
    return [colour + word for word in CHINESE_PATTERNS[pattern]]
