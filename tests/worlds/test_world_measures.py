"""Measuring on Emoji-8: which real pictures match a prompt, are its reference, or are nearest to a picture."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from fewstep.common.errors import UserError
from fewstep.evaluation.features import Features
from fewstep.evaluation.metric import Array, Pictures
from fewstep_worlds.emoji8 import dataset as emoji8
from fewstep_worlds.emoji8 import neighbours
from fewstep_worlds.emoji8.dataset import Emoji8, Record
from fewstep_worlds.emoji8.metrics import Gallery, metrics, real_diversity
from fewstep_worlds.emoji8.whiteness import Whiteness

FAMILY = "family: man, girl"
TRAINED = (
    ("cat", "noto"),
    ("cat", "twemoji"),
    ("dog", "noto"),
    ("cat", "fxemoji"),
    ("dog", "fluent-3d"),
    (FAMILY, "noto"),
)
HELD_OUT = (("cat", "emojione"), ("cow", "noto"))
ROWS = {name: [row for row, (shown, _) in enumerate(TRAINED) if shown == name] for name in ("cat", "dog", FAMILY)}


def marked(marks: list[int]) -> Pictures:
    """White pictures with a square in the middle whose level is their number."""
    pictures = np.full((len(marks), 64, 64, 3), 255, np.uint8)
    pictures[:, 20:44, 20:44] = np.array(marks, np.uint8)[:, None, None, None]
    return pictures


def marks(pictures: Pictures) -> list[int]:
    found: list[int] = pictures[:, 32, 32, 0].tolist()
    return found


class Table:
    """A backbone that looks up a picture's mark."""

    name, weights_sha256, licence, input = "table of marks", "none", "none", "as given"

    def __init__(self, rows: Array) -> None:
        self.rows = rows

    def __call__(self, pictures: Pictures) -> Array:
        return self.rows[marks(pictures)]


def features(rows: list[list[float]]) -> Features:
    return Features(Table(np.array(rows, np.float32)), progress=False)


@pytest.fixture
def gallery(monkeypatch: pytest.MonkeyPatch) -> Gallery:
    """Six training pictures, row r marked r; a held-out pair and a held-out concept are known by name alone."""
    like = emoji8.load_records("train")[0]
    records = [replace(like, name=name, style=style) for name, style in TRAINED + HELD_OUT]

    def load_records(split: str | tuple[str, ...] = "train") -> tuple[Record, ...]:
        return tuple(records) if isinstance(split, tuple) else tuple(records[: len(TRAINED)])

    monkeypatch.setattr(emoji8, "load_records", load_records)
    return Gallery(Emoji8(marked(list(range(len(TRAINED)))), tuple(records[: len(TRAINED)])))


# --------------------------------------------------------------------------------------- matched pictures


def test_prompts_are_taken_apart_at_the_style_alone(gallery: Gallery) -> None:
    assert gallery.concept_of(FAMILY) == FAMILY
    assert gallery.concept_of(f"{FAMILY}, fluent 3d style") == FAMILY
    assert gallery.concept_of("cow, noto v1 style") == "cow"
    for prompt in ("family: man", "cat, dog", "cat, oil style", "cat,noto style", "a cat", ""):
        assert not gallery.has_concept(prompt)
        with pytest.raises(UserError, match="names no Emoji-8 concept"):
            gallery.concept_of(prompt)


def test_a_repeated_prompt_gets_a_fresh_picture_while_any_is_left(gallery: Gallery) -> None:
    for seed in range(20):
        rows = gallery.matched(["cat"] * 7 + ["dog"] * 2, seed).tolist()
        assert sorted(rows[:3]) == sorted(rows[3:6]) == ROWS["cat"]
        assert rows[6] in ROWS["cat"]
        assert sorted(rows[7:]) == ROWS["dog"]


def test_prompts_take_turns_without_taking_from_each_other(gallery: Gallery) -> None:
    """A queue for each prompt, wherever it is in the list."""
    prompts = ["cat", "dog", "cat", "dog", "cat"]
    for seed in range(20):
        rows = gallery.matched(prompts, seed)
        assert sorted(rows[::2].tolist()) == ROWS["cat"]
        assert sorted(rows[1::2].tolist()) == ROWS["dog"]


def test_a_style_names_its_own_picture_and_a_held_out_pair_a_sibling(gallery: Gallery) -> None:
    drawn = Counter()
    for seed in range(60):
        own, sibling = gallery.matched(["cat, twemoji style", "cat, emojione style"], seed).tolist()
        assert TRAINED[own] == ("cat", "twemoji")
        drawn[sibling] += 1
    assert set(drawn) == set(ROWS["cat"])


def test_a_held_out_concept_gets_any_picture(gallery: Gallery) -> None:
    assert sorted(gallery.matched(["cow"] * 6)) == list(range(6))


def test_matching_is_fair_and_decided_by_the_seed(gallery: Gallery) -> None:
    prompts = ["cat"] * 3 + ["dog"] * 2
    first = Counter(int(gallery.matched(prompts, seed)[0]) for seed in range(300))
    assert set(first) == set(ROWS["cat"])
    assert all(70 <= count <= 130 for count in first.values()), "100 each, standard deviation 8"
    for seed in (0, 7):
        assert gallery.matched(prompts, seed).tolist() == gallery.matched(prompts, seed).tolist()
    assert len({tuple(gallery.matched(prompts, seed)) for seed in range(100)}) == 12, "3! orders of cats, 2! of dogs"


# -------------------------------------------------------------------------------------------- references


def test_a_reference_holds_the_prompts_concepts_and_nothing_set_aside(gallery: Gallery) -> None:
    for seed in range(10):
        reference = gallery.reference(["cat", f"{FAMILY}, noto style"], seed)
        assert reference.floor is not None
        aside = marks(reference.floor)
        assert aside[0] in ROWS["cat"]
        assert aside[1] == ROWS[FAMILY][0]
        assert marks(reference.pictures) == [row for row in ROWS["cat"] if row != aside[0]], "no dog"
        assert reference.floor_prompts == ("cat", f"{FAMILY}, noto style")
        again = gallery.reference(["cat", f"{FAMILY}, noto style"], seed)
        assert np.array_equal(again.pictures, reference.pictures)
        assert again.floor is not None
        assert np.array_equal(again.floor, reference.floor)


def test_a_repeated_prompt_sets_several_aside_and_counts_its_concept_once(gallery: Gallery) -> None:
    reference = gallery.reference(["cat", "cat", "dog, noto style"])
    assert reference.floor is not None
    aside = marks(reference.floor)
    assert len(set(aside)) == 3
    assert sorted(aside + marks(reference.pictures)) == sorted(ROWS["cat"] + ROWS["dog"])


def test_a_reference_without_pictures_is_refused(gallery: Gallery) -> None:
    for prompts in ([FAMILY], ["dog", "dog"], ["cow"]):
        with pytest.raises(UserError, match=rf"concepts of {len(prompts)} prompts have no further real pictures"):
            gallery.reference(prompts)
    with pytest.raises(UserError, match="'unicorn' names no Emoji-8 concept"):
        gallery.reference(["cat", "unicorn"])


# -------------------------------------------------------------------------------------------- neighbours


def test_the_gallery_measures_the_right_concept_and_copies(gallery: Gallery) -> None:
    """Cats point along the first axes, dogs along the next; 6 is a picture between cat 0, cat 3 and dog 2."""
    table = [
        [1, 0, 0, 0, 0.0],
        [0, 1, 0, 0, 0],
        [0, 0, 1, 0, 0],
        [0.9, 0.2, 0, 0, 0],
        [0, 0, 0, 1, 0],
        [0, 0, 0.1, 0, 1],
        [1, 0, 0.8, 0, 0],
    ]
    pictures = marked([0, 1, 4, 6])
    prompts = ["cat, noto style", "cat, twemoji style", "dog, noto style", "dog"]
    found = gallery.neighbours(features(table), pictures, prompts)
    assert found.nearest.tolist() == [0, 1, 4, 0]
    assert found.right_concept.value == pytest.approx(3 / 4), "a cat is nearest to what should be a dog"
    # Own pictures: 0, 1, 2, none. Without them: 0 -> cat 3; 1 -> cat 3 (its only overlap); 4, 6 as before.
    assert found.right_concept_without_own.value == pytest.approx(3 / 4)
    assert found.own is not None
    assert (found.own.value, found.own.n) == (pytest.approx(2 / 3), 3), "the dog drawn is not the noto dog"
    result = gallery.neighbours(
        features(table), pictures, ["kitty", "puss", "hound", "hound"], ["cat"] * 2 + ["dog"] * 2
    )
    assert result.right_concept.value == pytest.approx(3 / 4)
    assert result.own is None


def test_neighbours_in_blocks_are_those_of_one_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """Own pictures are left out in every block; a brute search over float64 cosines is right."""
    draw = np.random.default_rng(0)
    ours, real = draw.normal(size=(10, 4)), draw.normal(size=(15, 4))
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (ours, real)]
    cosine = unit[0] @ unit[1].T
    order = np.argsort(-cosine, axis=1)
    left_out = np.stack([order[:, 0], np.where(np.arange(10) % 2, order[:, 1], neighbours.NONE)], axis=1)
    expected = np.where(np.arange(10) % 2, order[:, 2], order[:, 1])
    for block in (3, 10, 1024):
        monkeypatch.setattr(neighbours, "ROWS", block)
        assert neighbours.nearest(ours, real).tolist() == order[:, 0].tolist()
        assert neighbours.nearest(ours, real, left_out).tolist() == expected.tolist()


# ---------------------------------------------------------------------------------------------- diversity


def test_real_diversity_is_that_of_a_prompts_answers(gallery: Gallery) -> None:
    """Cats: cosines 0, .6, .8 between the three; dogs: -1. Styles and single answers do not count."""
    table = [[1, 0, 0.0], [0, 1, 0], [0, 0, 2], [0.6, 0.8, 0], [0, 0, -5], [1, 1, 1]]
    prompts = ["cat", "dog", "dog, noto style", FAMILY, "cow", "unknown"]
    figure = real_diversity(gallery, features(table), prompts)
    assert figure is not None
    cats, dogs = 1 - (0 + 0.6 + 0.8) / 3, 2
    assert figure.n == 2
    assert figure.value == pytest.approx((cats + dogs) / 2, abs=1e-6)
    assert real_diversity(gallery, features(table), ["dog, noto style", FAMILY, "cow"]) is None
    alike = [[1, 2, 3.0]] * 6
    same = real_diversity(gallery, features(alike), ["cat", "dog"])
    assert same is not None
    assert same.value == pytest.approx(0, abs=1e-6)


# ---------------------------------------------------------------------------------------------- whiteness


def test_whiteness_compares_with_the_background_of_the_prompts_pictures(gallery: Gallery) -> None:
    """A border of 496 pixels. The twemoji cat is dark in 8 of them: no other cat's style has fewer."""
    pictures = gallery.data.pictures.copy()
    pictures[1, 0, :8] = 0
    world = Gallery(Emoji8(pictures, gallery.data.records))
    chosen = metrics(world, features([[1.0, 0]] * 6), 10)
    share, level = (
        next(m for m in chosen if isinstance(m, Whiteness) and m.identity.name.endswith(kind))
        for kind in ("white", "level")
    )
    clean, painted = marked([0]), marked([0])
    painted[0, 0, :62] = 100
    prompts = ["cat", "cat, noto style", "cat, twemoji style", "dog"]
    assert share.features(np.repeat(clean, 4, axis=0), prompts).tolist() == [1, 1, 1, 1]
    assert level.features(np.repeat(clean, 4, axis=0), prompts).tolist() == [255] * 4
    seen = share.features(np.repeat(painted, 4, axis=0), prompts)
    assert seen == pytest.approx([1 - 54 / 488, 1 - 62 / 496, 1 - 54 / 488, 1 - 62 / 496])
    grey = level.features(np.repeat(painted, 4, axis=0), prompts)
    assert grey == pytest.approx(255 - 155 * (1 - seen))
    # a prompt of no picture: where 95 % of all six are white, which leaves the 8 out
    assert share.features(painted, ["cow"]) == pytest.approx([1 - 54 / 488])
