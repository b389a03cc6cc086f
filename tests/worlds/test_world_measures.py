"""Measuring on sticker scenes: scene accuracy and its categories, real pictures of prompts, the suite."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats

from fewstep.common.errors import UserError
from fewstep.common.files import sha256
from fewstep.evaluation.evaluate import evaluate_pictures, score_pictures
from fewstep.evaluation.features import Features
from fewstep_worlds.common.autoencoder import make_vae
from fewstep_worlds.stickers import accuracy, metrics, reader_report, world
from fewstep_worlds.stickers.claim import Claim, Facts, facts_of
from fewstep_worlds.stickers.dataset import REFERENCE_SEED, draw_all, draw_scenes, make_scenes
from fewstep_worlds.stickers.heldout import KINDS
from fewstep_worlds.stickers.reader import read_pictures, save_reader
from fewstep_worlds.stickers.scene import Scene
from fewstep_worlds.stickers.settings import AutoencoderConfig
from support.pooled import Pooled
from support.sticker_world import tiny_reader

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


def test_figures_of_another_reader_do_not_compare(small_world: Path) -> None:
    reader = metrics.SceneReader(small_world / "reader")
    assert reader.sha256 == sha256(small_world / "reader" / "reader.safetensors")
    save_reader(tiny_reader(seed=1), small_world / "other")
    other = metrics.SceneReader(small_world / "other")
    for one, two in zip(metrics.accuracies(reader, PROMPTS), metrics.accuracies(other, PROMPTS), strict=True):
        assert replace(one.identity, weights_sha256=None) == replace(two.identity, weights_sha256=None)
        assert one.identity != two.identity
    pictures = draw_scenes(1, range(3))
    assert reader(pictures) == read_pictures(reader.reader, pictures)
    with pytest.raises(UserError, match="64x64"):
        reader(pictures[:, :32])


def test_scene_accuracy_counts_pictures_whose_every_stated_fact_is_found() -> None:
    facts = Facts((("frog", 10.0, 10.0), ("star", 50.0, 12.0)), "blue", "dots", "noto")
    frog_and_star = (("frog", 1), ("star", 1))
    claims = [
        Claim(frog_and_star, "left"),
        Claim(frog_and_star, "right"),
        Claim(frog_and_star, colour="blue", style="fluent"),
        Claim((("frog", 1),), colour="blue"),
    ]
    shares = accuracy.scene_accuracy([facts] * 4, claims)
    assert {name: (share.right, share.n) for name, share in shares.items()} == {
        "all": (1, 4), "relation": (1, 2), "two": (0, 1), "single": (0, 1), "fact concepts": (3, 4),
        "fact count": (4, 4), "fact relation": (1, 2), "fact colour": (2, 2), "fact style": (0, 1),
    }  # fmt: skip


def test_intervals_are_wilsons() -> None:
    for right, n in ((0, 20), (19, 20), (20, 20), (970, 1000)):
        found = scipy.stats.binomtest(right, n).proportion_ci(method="wilson")
        assert accuracy.Share(right, n).interval == pytest.approx((found.low, found.high), abs=1e-6)


def test_a_reader_is_reported_under_every_condition(sticker_sheets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader that is right on undamaged scenes and finds another scene in all others."""
    scenes = {name: make_scenes(REFERENCE_SEED, range(6), name) for name in ("train", *KINDS)}
    known = {draw_scenes(REFERENCE_SEED, range(6), name, sticker_sheets).tobytes(): of for name, of in scenes.items()}

    def read(_: object, pictures: np.ndarray) -> list[Facts]:
        return [facts_of(scene) for scene in known.get(pictures.tobytes(), scenes["pair"])]

    monkeypatch.setattr(reader_report, "read_pictures", read)
    vae = make_vae(AutoencoderConfig(channels=(8, 8, 8))).eval()
    rows = reader_report.reader_report(tiny_reader(), 6, vae, sticker_sheets)
    right = {name: shares["all"].right for name, shares in rows.items()}
    assert [right.pop(name) for name in ("blurred", "noised", "autoencoded")] == [0, 0, 0]
    assert list(right.values()) == [6] * (1 + len(KINDS))
    assert len(accuracy.as_table(rows).splitlines()) == 2 + len(rows)


# ----------------------------------------------------------------------------------------------------------- suite


@pytest.mark.usefixtures("small_world")
def test_the_suite_measures_against_real_pictures_of_the_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[np.ndarray, Scene]] = []

    def draw(scenes: Any, folder: Path | None = None) -> np.ndarray:
        scenes = list(scenes)
        pictures = draw_all(scenes, folder)
        drawn.extend(zip(pictures, scenes, strict=True))
        return pictures

    monkeypatch.setattr(metrics, "draw_all", draw)
    prompts = world.read_prompts("benchmark")[:20]
    found = world.suite(prompts, 0, Features(Pooled(), progress=False))
    reader: Any = ByPixels(np.stack([picture for picture, _ in drawn]), [facts_of(scene) for _, scene in drawn])
    assert len(found.reference.pictures) == 80
    for first in range(0, 80, 20):
        right = metrics.SceneAccuracy(reader).features(found.reference.pictures[first : first + 20], prompts)
        assert right.all()
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
    assert 0 < found.real_diversity < 1


@pytest.mark.usefixtures("small_world")
def test_other_prompts_have_no_scene_accuracy() -> None:
    found = world.suite(["a unicorn", *world.read_prompts("gamma")[:19]], 0, Features(Pooled(), progress=False))
    assert not [metric for metric in found.metrics if metric.identity.group in ("prompt", "category")]
    assert len(found.reference.pictures) == 80
