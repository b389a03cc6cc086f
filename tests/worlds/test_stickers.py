"""Sticker scenes: pictures show their scenes' facts, sentences state their claims, held-out things stay unseen."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fewstep.common.errors import UserError
from fewstep_worlds.stickers import heldout
from fewstep_worlds.stickers.claim import OPPOSITE, Claim, Facts, check, facts_of, make_claim
from fewstep_worlds.stickers.dataset import SceneWorkers, draw_scenes, make_scenes
from fewstep_worlds.stickers.draw import SHADE, draw_background, draw_scene
from fewstep_worlds.stickers.grammar import languages, plural, read, write
from fewstep_worlds.stickers.matching import is_possible, matching_scene
from fewstep_worlds.stickers.metrics import are_known
from fewstep_worlds.stickers.prompts import SETS, stated_kinds, training_prompt, unseen_prompts
from fewstep_worlds.stickers.scene import MOST, SIDE, Background, Scene, Sticker, make_scene, relation
from fewstep_worlds.stickers.sprites import EDGE, load_sprites
from fewstep_worlds.stickers.vocabulary import COLOURS, CONCEPTS, HELD_OUT_STYLE, NAMES, PATTERNS

PLAIN = Background("plain", "white", 0.0, 8.0, (0.0, 0.0))


# --------------------------------------------------------------------------------------------------------- scenes


def test_a_scene_is_a_function_of_seed_index_and_split(sticker_sheets: Path) -> None:
    assert make_scenes(3, range(20)) == [make_scene(3, index) for index in range(20)]
    scenes = [make_scene(seed, index, split) for seed in (3, 4) for index in (0, 1) for split in ("train", "pair")]
    assert len(set(map(repr, scenes))) == len(scenes)
    backwards = draw_scenes(3, [5, 4], folder=sticker_sheets)
    np.testing.assert_array_equal(backwards[::-1], draw_scenes(3, [4, 5], folder=sticker_sheets))


@pytest.mark.slow
def test_workers_draw_what_one_process_draws(sticker_sheets: Path) -> None:
    with SceneWorkers(2, seed=3, folder=sticker_sheets) as scenes:
        np.testing.assert_array_equal(
            scenes.pictures(np.arange(3, 8)), draw_scenes(3, range(3, 8), folder=sticker_sheets)
        )


@pytest.mark.slow
def test_workers_end_when_their_process_is_killed(sticker_sheets: Path) -> None:
    code = (
        "import multiprocessing, os, signal, sys; from pathlib import Path\n"
        "from fewstep_worlds.stickers.dataset import SceneWorkers\n"
        "if __name__ == '__main__':\n"
        "    scenes = SceneWorkers(1, folder=Path(sys.argv[1])); scenes.pictures([0])\n"
        "    print(multiprocessing.active_children()[0].pid, flush=True); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(sticker_sheets)], capture_output=True, text=True)
    worker = int(done.stdout)
    for _ in range(200):
        try:
            os.kill(worker, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    pytest.fail("the worker outlived its parent")


def test_stickers_lie_inside_and_apart() -> None:
    counts: Counter[int] = Counter()
    for scene in make_scenes(0, range(1000)):
        counts[len(scene.stickers)] += 1
        assert len(scene.counts) <= 2
        for number, one in enumerate(scene.stickers):
            assert one.size / 2 <= min(one.x, one.y)
            assert max(one.x, one.y) <= SIDE - one.size / 2
            for other in scene.stickers[:number]:
                assert math.hypot(one.x - other.x, one.y - other.y) >= (one.size + other.size) / 2
    assert set(counts) == set(range(1, MOST + 1))


def test_pixels_agree_with_facts(sticker_sheets: Path) -> None:
    sprites = load_sprites(sticker_sheets)
    rows, columns = np.mgrid[:SIDE, :SIDE] + 0.5
    for scene in make_scenes(0, range(300)):
        ink = 1 - draw_scene(replace(scene, background=PLAIN), sprites)[..., 1] / 255.0  # discs have no green
        areas = [math.pi / 4 * sticker.size**2 for sticker in scene.stickers]
        assert ink.sum() == pytest.approx(sum(areas), rel=0.03)
        for found, wanted in ((columns, [s.x for s in scene.stickers]), (rows, [s.y for s in scene.stickers])):
            assert np.average(found, weights=ink) == pytest.approx(np.average(wanted, weights=areas), abs=0.2)


@pytest.mark.parametrize(
    ("turn", "mirrored", "direction"),
    [(0, False, (1, 0)), (0, True, (-1, 0)), (90, False, (0, -1)), (90, True, (0, 1)), (180, False, (-1, 0))],
)
def test_stickers_are_mirrored_then_turned(
    sticker_sheets: Path, turn: float, mirrored: bool, direction: tuple[int, int]
) -> None:
    sticker = Sticker("frog", 30.3, 33.7, 40.0, turn, mirrored)
    picture = draw_scene(Scene("noto", PLAIN, (sticker,)), load_sprites(sticker_sheets)).astype(int)
    rows, columns = np.nonzero((picture[..., 0] > 150) & (picture[..., 1] < 80))
    reach = 40 * (52 / EDGE - 0.5)
    assert columns.mean() + 0.5 - 30.3 == pytest.approx(direction[0] * reach, abs=0.6)
    assert rows.mean() + 0.5 - 33.7 == pytest.approx(direction[1] * reach, abs=0.6)


SHARES = {"plain": 0.0, "stripes": 0.5, "checks": 0.5, "gradient": 0.5, "dots": math.pi * 0.27**2, "stars": 0.168}
"""Share of the second tone by area; a five-pointed star of radius .36 with notches at .42 of it covers .168."""


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("angle", [0.0, 45.0])
def test_patterns_hold_two_tones_in_their_shares(pattern: str, angle: float) -> None:
    shares = []
    for phase in np.linspace(0, 1, 8, endpoint=False):
        level = draw_background(Background(pattern, "white", angle, 13.0, (phase, 0.37)))[..., 0].astype(float)
        shares.append((255 - level).mean() / (255 - SHADE[0]))
    assert np.mean(shares) == pytest.approx(SHARES[pattern], abs=0.02)


def test_a_background_repeats_after_its_period() -> None:
    for pattern in ("stripes", "dots", "checks", "stars"):
        picture = draw_background(Background(pattern, "blue", 0.0, 8.0, (0.3, 0.6))).astype(int)
        np.testing.assert_allclose(picture[:, 8:], picture[:, :-8], atol=1)
        np.testing.assert_allclose(picture[8:], picture[:-8], atol=1)


@pytest.mark.parametrize("colour", COLOURS)
def test_every_background_shows_its_colour(colour: str) -> None:
    for pattern in PATTERNS:
        picture = draw_background(Background(pattern, colour, 30.0, 12.0, (0.1, 0.2))).reshape(-1, 3).astype(int)
        assert np.abs(picture - COLOURS[colour]).max(1).min() <= 6


# ---------------------------------------------------------------------------------------------------------- sheets


def test_sheets_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"noto\.webp"):
        load_sprites(tmp_path / "none")
    Image.new("RGBA", (EDGE, EDGE)).save(tmp_path / "noto.webp")
    with pytest.raises(UserError, match=r"noto\.webp"):
        load_sprites(tmp_path)
    (tmp_path / "noto.webp").write_bytes(b"RIFF")
    with pytest.raises(UserError, match=r"noto\.webp"):
        load_sprites(tmp_path / ".")


# ---------------------------------------------------------------------------------------------------------- claims


def _holds(claim: Claim, facts: Facts) -> bool:
    return all(check(claim, facts).values())


def test_a_claim_about_a_scene_holds() -> None:
    rng = np.random.default_rng(0)
    for scene in make_scenes(0, range(500)):
        claim = make_claim(scene, rng)
        assert _holds(claim, facts_of(scene))


FACTS = Facts((("frog", 10.0, 32.0), ("star", 50.0, 30.0)), "blue", "dots", "noto")
TRUE = Claim((("frog", 1), ("star", 1)), "left", "blue", "dots", "noto")


@pytest.mark.parametrize(
    ("facts", "wrong"),
    [
        (replace(FACTS, colour="red"), {"colour"}),
        (replace(FACTS, pattern="plain"), {"pattern"}),
        (replace(FACTS, style="fluent"), {"style"}),
        (replace(FACTS, places=(("frog", 50.0, 32.0), ("star", 10.0, 30.0))), {"relation"}),
        (replace(FACTS, places=(("frog", 10.0, 32.0), ("star", 50.0, 62.0))), {"relation"}),
        (replace(FACTS, places=(*FACTS.places, ("star", 30.0, 5.0))), {"count", "relation"}),
        (replace(FACTS, places=(*FACTS.places, ("sun", 30.0, 5.0))), {"concepts"}),
        (replace(FACTS, places=()), {"concepts", "count", "relation"}),
    ],
)
def test_a_false_fact_is_found(facts: Facts, wrong: set[str]) -> None:
    assert _holds(TRUE, FACTS)
    assert {name for name, right in check(TRUE, facts).items() if not right} == wrong
    if wrong <= {"colour", "pattern", "style"}:
        assert _holds(Claim(TRUE.things, TRUE.relation), facts)


def test_an_open_count_is_at_least_two() -> None:
    frogs = Claim((("frog", None),))
    assert [_holds(frogs, replace(FACTS, places=(("frog", 1.0, 1.0),) * n)) for n in (0, 1, 2, 9)] == [0, 0, 1, 1]


def test_relations_are_opposite() -> None:
    points = np.random.default_rng(1).uniform(0, 64, (200, 4))
    for x, y, other_x, other_y in points.tolist():
        found, back = relation(x, y, other_x, other_y), relation(other_x, other_y, x, y)
        assert back == (OPPOSITE[found] if found else None)


# --------------------------------------------------------------------------------------------------------- grammar


@pytest.mark.parametrize("language", ["english", "chinese"])
def test_sentences_are_read_back(language: str) -> None:
    rng = np.random.default_rng(2)
    for scene in make_scenes(1, range(1500)):
        claim = make_claim(scene, rng)
        text = write(claim, language, rng)
        assert read(text, language) == claim, text


@pytest.mark.parametrize(
    ("text", "claim"),
    [
        ("three frogs on yellow", Claim((("frog", 3),), colour="yellow")),
        (
            "a rocket left of a gem stone on blue stripes, twemoji style",
            Claim((("rocket", 1), ("gem stone", 1)), "left", "blue", "stripes", "twemoji"),
        ),
        ("several slices of watermelon", Claim((("watermelon", None),))),
        (
            "an hourglass and 2 snowmen on a starry background",
            Claim((("hourglass", 1), ("snowman", 2)), None, None, "stars"),
        ),
        ("三只青蛙，黄色背景", Claim((("frog", 3),), colour="yellow")),
        ("纯蓝色背景上，一枚火箭在一颗宝石左边", Claim((("rocket", 1), ("gem stone", 1)), "left", "blue", "plain")),
    ],
)
def test_sentences_have_their_meaning(text: str, claim: Claim) -> None:
    assert read(text, "chinese" if ord(text[0]) > 127 else "english") == claim


@pytest.mark.parametrize("text", ["", "frog", "a frog on", "a unicorn", "a frog above", "two frog", "三个青蛙"])
@pytest.mark.parametrize("language", ["english", "chinese"])
def test_other_text_is_refused(text: str, language: str) -> None:
    with pytest.raises(UserError, match="prompt"):
        read(text, language)


def test_plurals() -> None:
    nouns = ("frog", "butterfly", "key", "bus", "fish", "slice of pizza", "snowman", "spacecraft", "coach")
    plurals = "frogs butterflies keys buses fish slices of pizza snowmen spacecraft coaches"
    assert " ".join(plural(noun) for noun in nouns) == plurals


# ------------------------------------------------------------------------------------------------------- held out


def test_sizes_of_what_is_held_out() -> None:
    assert len(heldout.pairs()) == 300
    assert len(heldout.concept_styles()) == len(heldout.concept_colours()) == 40
    assert len({concept for concept, _ in heldout.concept_styles()}) == 40
    assert len(heldout.synonyms()) == 60
    assert len(heldout.chinese_concepts()) == 12
    assert len(heldout.chinese_colours()) == 200
    owners = [name for name, concept in CONCEPTS.items() if heldout.synonyms() & {*concept.words}]
    assert len(owners) == 60
    assert not heldout.synonyms() & set(NAMES)


def kinds_of(scene: Scene) -> set[str]:
    """What is held out of a scene, written out once more."""
    shown = set(scene.counts)
    kinds = {"style"} if scene.style == HELD_OUT_STYLE else set()
    kinds |= {"pair"} if any(shown >= pair for pair in heldout.pairs()) else set()
    kinds |= {"concept_style"} if {(c, scene.style) for c in shown} & heldout.concept_styles() else set()
    colour = scene.background.colour
    return kinds | ({"concept_colour"} if {(c, colour) for c in shown} & heldout.concept_colours() else set())


def test_training_scenes_hold_nothing_that_is_held_out() -> None:
    assert not any(kinds_of(scene) for scene in make_scenes(0, range(3000)))
    for kind in heldout.KINDS:
        assert all(kinds_of(scene) == {kind} for scene in make_scenes(1, range(100), kind))
    with pytest.raises(UserError, match="split"):
        make_scene(0, 0, "test")


@pytest.mark.slow
def test_concepts_of_training_scenes_are_equally_frequent() -> None:
    shown = Counter(concept for scene in make_scenes(0, range(6400)) for concept in scene.counts)
    assert set(shown) == set(NAMES)
    assert max(shown.values()) < 2 * min(shown.values())


def words_of(text: str, language: str) -> set[str]:
    """Every word for a concept that a sentence may have been written with."""
    nouns = languages()[language].nouns
    return {noun.word for phrase, noun in nouns.items() if text.startswith(phrase) or f" {phrase}" in text}


def test_training_prompts_hold_nothing_that_is_held_out() -> None:
    for index, scene in enumerate(make_scenes(0, range(1500))):
        english = training_prompt(scene, 0, index)
        assert english
        assert _holds(english.claim, facts_of(scene))
        assert read(english.text, "english") == english.claim
        nouns = [noun for noun in heldout.synonyms() if f" {noun} " in f" {english.text.replace(',', ' ')} "]
        longer = {word for noun in nouns for word in words_of(english.text, "english") if noun in word and noun != word}
        assert len(nouns) <= len(longer), english.text  # "hat" is a part of "top hat" alone
        chinese = training_prompt(scene, 0, index, "chinese")
        if chinese:
            concepts = {concept for concept, _ in chinese.claim.things}
            assert not concepts & heldout.chinese_concepts()
            assert not {(concept, chinese.claim.colour) for concept in concepts} & heldout.chinese_colours()


@pytest.mark.parametrize("name", SETS)
def test_sets_of_unseen_prompts(name: str) -> None:
    language = "chinese" if name.startswith("chinese") else "english"
    prompts = unseen_prompts(name, 40, seed=1, language=language)
    assert prompts == unseen_prompts(name, 60, seed=1, language=language)[:40]
    for prompt in prompts:
        assert read(prompt.text, language) == prompt.claim
        assert kinds_of(prompt.scene) == ({name} if name in heldout.KINDS else set())
        concepts = {concept for concept, _ in prompt.claim.things}
        if name == "synonym":
            assert words_of(prompt.text, language) & heldout.synonyms()
        if name == "chinese_concept":
            assert concepts & heldout.chinese_concepts()
        if name == "chinese_colour":
            assert {(concept, prompt.claim.colour) for concept in concepts} & heldout.chinese_colours()


def test_sets_of_another_language_are_refused() -> None:
    for name, language in (("synonym", "chinese"), ("chinese_concept", "english"), ("pairs", "english")):
        with pytest.raises(UserError, match=name):
            unseen_prompts(name, 1, seed=1, language=language)


# -------------------------------------------------------------------------------------------------- matching scenes


def test_matching_scenes_agree_with_their_claim() -> None:
    rng = np.random.default_rng(0)
    for split in ("train", *heldout.KINDS):
        for index, scene in enumerate(make_scenes(1, range(60), split)):
            claim = make_claim(scene, rng)
            found = matching_scene(claim, 5, index)
            assert all(check(claim, facts_of(found)).values()), claim
            assert found == matching_scene(claim, 5, index) != matching_scene(claim, 5, index + 1)
            kinds = heldout.held_out_kinds(set(found.counts), found.style, found.background.colour)
            assert kinds == stated_kinds(claim)


def test_matching_scenes_leave_open_what_the_claim_does() -> None:
    scenes = [matching_scene(Claim((("frog", None), ("star", 6))), 5, index) for index in range(100)]
    assert {scene.counts["frog"] for scene in scenes} == {2, 3}
    assert len({scene.background.pattern for scene in scenes}) == 6
    assert len({scene.style for scene in scenes}) > 1


@pytest.mark.parametrize(
    ("prompt", "possible"),
    [("five frogs and 4 stars", True), ("five frogs and five stars", False), ("a frog left of a froggy", False)],
)
def test_claims_that_no_scene_agrees_with(prompt: str, possible: bool) -> None:
    assert is_possible(read(prompt, "english")) == are_known([prompt]) == possible
