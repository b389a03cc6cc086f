"""Sticker scenes as the bundled world: data, prompt lists, scene accuracy, real pictures of prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fewstep.common.errors import UserError
from fewstep.common.files import sha256
from fewstep.data.latents import identify
from fewstep.evaluation.evaluate import evaluate_pictures, score_pictures
from fewstep.evaluation.features import Features
from fewstep.evaluation.lite0 import Lite0Features
from fewstep_worlds import register
from fewstep_worlds.common import location
from fewstep_worlds.stickers import metrics, world
from fewstep_worlds.stickers.claim import Claim, Facts, check, facts_of, make_claim
from fewstep_worlds.stickers.dataset import TRAINING_SEED, draw_all, draw_scenes, make_scenes
from fewstep_worlds.stickers.grammar import plural, read
from fewstep_worlds.stickers.heldout import KINDS, held_out_kinds, synonyms
from fewstep_worlds.stickers.matching import is_possible, matching_scene
from fewstep_worlds.stickers.prompts import stated_kinds, training_prompt
from fewstep_worlds.stickers.reader import Reader, read_pictures, save_reader
from fewstep_worlds.stickers.scene import Scene, make_scene
from fewstep_worlds.stickers.settings import ReaderConfig
from fewstep_worlds.stickers.sprites import FOLDER_VARIABLE, sprite_folder

TINY = ReaderConfig(channels=(8, 8, 8), blocks=(1, 1, 1))


@pytest.fixture
def stickers(sticker_sheets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A world folder of sticker scenes with a random reader."""
    folder = tmp_path / "world"
    folder.mkdir()
    (folder / location.STICKERS).symlink_to(sticker_sheets)
    torch.manual_seed(0)
    save_reader(Reader(TINY), folder / "reader")
    monkeypatch.setenv(location.ENVIRONMENT, str(folder))
    monkeypatch.delenv(FOLDER_VARIABLE, raising=False)
    return folder


# ---------------------------------------------------------------------------------------------------- registration


def test_the_folder_decides_which_world_is_bundled(stickers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (register.PICTURES, register.SIZE, register.root()) == (world.PICTURES, 64, stickers)
    assert sprite_folder() == stickers / location.STICKERS
    (stickers.parent / "other" / location.EMOJI8).mkdir(parents=True)
    monkeypatch.setenv(location.ENVIRONMENT, str(stickers.parent / "other"))
    assert register.PICTURES == "emoji8"
    with pytest.raises(AttributeError):
        _ = register.no_member


# ------------------------------------------------------------------------------------------------------------ data


@pytest.fixture
def few(stickers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(world, "SCENES", 40)
    world._captions.cache_clear()


@pytest.mark.usefixtures("few")
def test_training_data_are_the_teachers_scenes_with_true_captions() -> None:
    data = world.captioned(2, 0)
    assert data.pictures is not None
    assert len(data) == len(data.pictures) == 40
    np.testing.assert_array_equal(data.take([7, 3]).pictures.read([1, 0]), draw_scenes(TRAINING_SEED, [3, 7]))
    for index, captions in enumerate(data.captions):
        facts = facts_of(make_scene(TRAINING_SEED, index))
        assert all(check(read(caption, "english"), facts) for caption in captions)
        assert captions[0] == training_prompt(make_scene(TRAINING_SEED, index), 0, index).text
    assert list(world.captioned(2, 1).captions) != list(data.captions)
    texts = dict.fromkeys(text for row in data.captions for text in row)
    assert world.captions_alone(2, 0).captions == [[text] for text in texts]


@pytest.mark.usefixtures("few")
def test_training_data_are_identified_by_sheets_and_captions(
    stickers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = identify(world.captioned(1, 0), "encoders")
    assert identify(world.captioned(1, 0), "encoders").key == first.key
    other = identify(world.captioned(1, 1), "encoders")
    assert other.pictures == first.pictures
    assert other.captions != first.captions
    sheets = tmp_path / "sheets"
    sheets.mkdir()
    for file in (stickers / location.STICKERS).iterdir():
        (sheets / file.name).write_bytes(file.read_bytes())
    (sheets / "noto.webp").write_bytes((sheets / "noto.webp").read_bytes() + b"\0\0")
    monkeypatch.setenv(FOLDER_VARIABLE, str(sheets))
    assert identify(world.captioned(1, 0), "encoders").pictures != first.pictures


# --------------------------------------------------------------------------------------------------------- prompts

HELD_OUT = {"heldout-pair": "pair", "heldout-style": "concept_style", "heldout-colour": "concept_colour"}


@pytest.mark.parametrize("name", world.LISTS)
def test_prompt_lists(name: str) -> None:
    prompts = world.read_prompts(name)
    assert len(set(prompts)) == len(prompts) == world.LISTS[name].count
    kind = {**HELD_OUT, "style": "style"}.get(name)
    assert {stated_kinds(metrics.claim_of(prompt)) for prompt in prompts} == {frozenset((kind,) if kind else ())}
    if name == "synonym":
        held_out = {text for word in synonyms() for text in (word, plural(word))}
        assert all(any(text in prompt for text in held_out) for prompt in prompts)


def test_lists_for_choosing_are_others_than_the_benchmark() -> None:
    lists = [set(world.read_prompts(name)) for name in ("validation", "gamma", "benchmark")]
    assert len(set.union(*lists)) > 0.98 * sum(map(len, lists))
    kinds = [metrics.claim_of(prompt).kind for prompt in lists[2]]
    assert min(kinds.count(kind) for kind in metrics.KINDS) > 300
    with pytest.raises(UserError, match="'gamma'"):
        world.read_prompts("gama")


# -------------------------------------------------------------------------------------------------- matching scenes


def test_matching_scenes_agree_with_their_claim() -> None:
    rng = np.random.default_rng(0)
    for split in ("train", *KINDS):
        for index, scene in enumerate(make_scenes(1, range(60), split)):
            claim = make_claim(scene, rng)
            found = matching_scene(claim, 5, index)
            assert all(check(claim, facts_of(found)).values()), claim
            assert found == matching_scene(claim, 5, index) != matching_scene(claim, 5, index + 1)
            assert held_out_kinds(set(found.counts), found.style, found.background.colour) == stated_kinds(claim)


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
    assert is_possible(read(prompt, "english")) == metrics.are_known([prompt]) == possible


# --------------------------------------------------------------------------------------------------- scene accuracy


class ByPixels:
    """A reader that recalls the facts of the pictures that it was made for."""

    def __init__(self, pictures: np.ndarray, facts: Sequence[Facts]) -> None:
        self.known = {picture.tobytes(): fact for picture, fact in zip(pictures, facts, strict=True)}

    def __call__(self, pictures: np.ndarray) -> list[Facts]:
        return [self.known[picture.tobytes()] for picture in pictures]

    identity = metrics.SceneReader.identity
    sha256 = "0" * 64


PROMPTS = ("a frog", "three frogs on blue", "a frog and two stars, noto style", "a frog left of a star on stripes")
BACKGROUND = ("blue", "plain", "noto")
FROG, STAR = ("frog", 10.0, 30.0), ("star", 50.0, 30.0)


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        ({}, {}),
        ({1: Facts((FROG,) * 2, *BACKGROUND)}, {"": 3 / 4, ", counting": 0.0}),
        ({1: Facts((FROG,) * 3, "red", "plain", "noto")}, {"": 3 / 4, ", counting": 0.0, ", background": 1 / 2}),
        ({2: Facts((FROG, STAR, STAR), "red", "plain", "fluent")}, {"": 3 / 4, ", two": 0.0, ", style": 0.0}),
        ({0: Facts((STAR,), *BACKGROUND)}, {"": 3 / 4, ", single": 0.0}),
        (
            {0: Facts((), *BACKGROUND), 3: Facts((("frog", 60.0, 30.0), STAR), "blue", "stripes", "noto")},
            {"": 2 / 4, ", single": 0.0, ", position": 0.0},
        ),
    ],
)
def test_scene_accuracy_in_all_and_by_category(change: dict[int, Facts], wrong: dict[str, float]) -> None:
    facts = [
        Facts((FROG,), *BACKGROUND),
        Facts((FROG,) * 3, *BACKGROUND),
        Facts((FROG, STAR, STAR), *BACKGROUND),
        Facts((FROG, STAR), "blue", "stripes", "noto"),
    ]
    pictures = np.arange(4, dtype=np.uint8)[:, None, None, None] * np.ones((1, 64, 64, 3), np.uint8)
    reader: Any = ByPixels(pictures, [change.get(number, fact) for number, fact in enumerate(facts)])
    measured = metrics.accuracies(reader, PROMPTS)
    figures = evaluate_pictures(pictures, PROMPTS, measured)
    names = ("", ", single", ", counting", ", two", ", position", ", background", ", style")
    assert {name: figures[f"scene accuracy{name}"].value for name in names} == dict.fromkeys(names, 1.0) | wrong
    counts = [figures[f"scene accuracy{name}"].n for name in names]
    assert counts == [4, 1, 1, 1, 1, 2, 1]
    scores = score_pictures(pictures, PROMPTS, measured)
    np.testing.assert_array_equal(scores["scene accuracy"], [number not in change for number in range(4)])
    assert [figure.is_of("prompt") for figure in figures.values()] == [True] + [False] * 6


def test_figures_of_another_reader_do_not_compare(stickers: Path) -> None:
    reader = metrics.SceneReader(stickers / "reader")
    assert reader.sha256 == sha256(stickers / "reader" / "reader.safetensors")
    torch.manual_seed(1)
    save_reader(Reader(TINY), stickers / "other")
    other = metrics.SceneReader(stickers / "other")
    for one, two in zip(metrics.accuracies(reader, PROMPTS), metrics.accuracies(other, PROMPTS), strict=True):
        assert replace(one.identity, weights_sha256=None) == replace(two.identity, weights_sha256=None)
        assert one.identity != two.identity
    pictures = draw_scenes(1, range(3))
    assert reader(pictures) == read_pictures(reader.reader, pictures)
    with pytest.raises(UserError, match="64x64"):
        reader(pictures[:, :32])


# ----------------------------------------------------------------------------------------------------------- suite


@pytest.mark.slow
def test_the_suite_measures_against_real_pictures_of_the_prompts(
    stickers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[tuple[np.ndarray, Scene]] = []

    def draw(scenes: Any, folder: Path | None = None) -> np.ndarray:
        scenes = list(scenes)
        pictures = draw_all(scenes, folder)
        drawn.extend(zip(pictures, scenes, strict=True))
        return pictures

    monkeypatch.setattr(metrics, "draw_all", draw)
    prompts = world.read_prompts("benchmark")[:20]
    found = world.suite(prompts, 0, Features(Lite0Features(), progress=False))
    reader: Any = ByPixels(np.stack([picture for picture, _ in drawn]), [facts_of(scene) for _, scene in drawn])
    assert len(found.reference.pictures) == 80
    for first in range(0, 80, 20):
        accuracy = metrics.SceneAccuracy(reader).features(found.reference.pictures[first : first + 20], prompts)
        assert accuracy.all()
    assert found.reference.floor is not None
    assert metrics.SceneAccuracy(reader).features(found.reference.floor, found.reference.floor_prompts).all()
    together = np.concatenate([found.reference.floor, found.reference.pictures])
    assert len(np.unique(together.reshape(100, -1), axis=0)) == 100
    figures = evaluate_pictures(found.reference.floor, prompts, found.metrics, found.reference)
    assert figures["scene accuracy"].floor == figures["scene accuracy"].value
    low, high = figures["KID-Lite0"].low, figures["KID-Lite0"].high
    assert low is not None
    assert high is not None
    assert low < 0 < high
    assert found.real_diversity is not None
    assert 0.05 < found.real_diversity < 1


@pytest.mark.slow
def test_other_prompts_have_no_scene_accuracy(stickers: Path) -> None:
    found = world.suite(["a unicorn", *world.read_prompts("gamma")[:19]], 0, Features(Lite0Features(), progress=False))
    assert not [metric for metric in found.metrics if metric.identity.group in ("prompt", "category")]
    assert len(found.reference.pictures) == 80
