"""The bundled world: its folder, data and prompt lists, its licences, and what its trained networks are able to do."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from fewstep.common.defaults import check_world_size, installed_world
from fewstep.common.errors import UserError
from fewstep.common.files import read_json
from fewstep.common.tensors import load_tensors
from fewstep.data.latents import identify
from fewstep.diffusion.config import TEACHER_SAMPLING
from fewstep.distillation.frozen_networks import load_named_scorer
from fewstep.inference.generator import load_image_generator
from fewstep_worlds.common import location
from fewstep_worlds.common.autoencoder import to_tensor
from fewstep_worlds.stickers import dataset, parallel, world
from fewstep_worlds.stickers.accuracy import scene_accuracy
from fewstep_worlds.stickers.claim import check, facts_of, full_claim
from fewstep_worlds.stickers.dataset import REFERENCE_SEED, TRAINING_SEED, draw_scenes, make_scenes
from fewstep_worlds.stickers.grammar import plural, read
from fewstep_worlds.stickers.heldout import synonyms
from fewstep_worlds.stickers.metrics import KINDS, SceneReader, claim_of, matching_pictures
from fewstep_worlds.stickers.prompts import stated_kinds, training_prompt
from fewstep_worlds.stickers.scene import make_scene
from fewstep_worlds.stickers.sprites import FOLDER_VARIABLE, sprite_folder
from fewstep_worlds.stickers.vocabulary import STYLES
from fewstep_worlds.studies.addons import scenes as addons
from fewstep_worlds.studies.students import students_omega

ROOT = Path(__file__).resolve().parents[2]

# --------------------------------------------------------------------------------------------------------- its folder


def test_the_world_is_looked_for_where_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = tmp_path / "world"
    (inner / location.STICKERS).mkdir(parents=True)
    monkeypatch.delenv(FOLDER_VARIABLE, raising=False)
    monkeypatch.setenv(location.ENVIRONMENT, str(inner))
    assert location.root() == inner
    assert sprite_folder() == inner / location.STICKERS
    monkeypatch.setenv(location.ENVIRONMENT, str(tmp_path / "none"))
    with pytest.raises(UserError, match="not a folder"):
        location.root()
    monkeypatch.setenv(location.ENVIRONMENT, str(tmp_path))
    with pytest.raises(UserError, match="set it to") as refused:
        location.root()
    assert str(inner) in str(refused.value)


def test_sticker_scenes_are_registered(small_world: Path) -> None:
    own = installed_world()
    assert own is not None
    assert (own.PICTURES, own.SIZE, own.root()) == ("stickers", 64, small_world)
    assert own.read_prompts("validation") == world.read_prompts("validation")
    with pytest.raises(UserError, match="512"):
        check_world_size(512, "real")


def test_what_is_tracked_stays_small() -> None:
    """Git keeps every version: 60 MiB together, 15 MiB a file."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout")
    listed = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, check=True).stdout
    sizes = [path.stat().st_size for name in listed.decode().split("\0") if name and (path := ROOT / name).is_file()]
    assert sum(sizes) <= 60 * 2**20
    assert max(sizes) <= 15 * 2**20


def test_licences_cover_every_sheet() -> None:
    place = location.root() / location.STICKERS
    lines = (place / "ATTRIBUTION.md").read_text(encoding="utf-8").splitlines()
    rows = {cells[1].strip("` "): cells[4].strip() for line in lines if len(cells := line.split("|")) > 4}
    starts = {
        "Apache-2.0": "Apache License",
        "CC-BY-4.0": "Creative Commons Attribution 4.0 International Public License",
        "MIT": "Permission is hereby granted, free of charge",
    }
    for style in STYLES:
        licence = rows[style].replace(" ", "-")
        assert starts[licence] in (place / "LICENSES" / f"{licence}.txt").read_text(encoding="utf-8")


# ------------------------------------------------------------------------------------------------------------ data


@pytest.mark.usefixtures("small_world")
def test_training_data_are_the_teachers_scenes_with_true_captions() -> None:
    data = world.captioned(2, 0)
    assert data.pictures is not None
    assert len(data) == len(data.pictures) == 40
    np.testing.assert_array_equal(data.take([7, 3]).pictures.read([1, 0]), draw_scenes(TRAINING_SEED, [3, 7]))
    for index, captions in enumerate(data.captions):
        facts = facts_of(make_scene(TRAINING_SEED, index))
        assert all(all(check(read(caption, "english"), facts).values()) for caption in captions)
        prompt = training_prompt(make_scene(TRAINING_SEED, index), 0, index)
        assert prompt is not None
        assert captions[0] == prompt.text
    assert list(world.captioned(2, 1).captions) != list(data.captions)
    texts = dict.fromkeys(text for row in data.captions for text in row)
    assert world.captions_alone(2, 0).captions == [[text] for text in texts]


def test_training_data_are_identified_by_sheets_and_captions(
    small_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = identify(world.captioned(1, 0), "encoders")
    assert identify(world.captioned(1, 0), "encoders").key == first.key
    other = identify(world.captioned(1, 1), "encoders")
    assert other.pictures == first.pictures
    assert other.captions != first.captions
    sheets = tmp_path / "sheets"
    sheets.mkdir()
    for file in (small_world / location.STICKERS).iterdir():
        (sheets / file.name).write_bytes(file.read_bytes())
    (sheets / "noto.webp").write_bytes((sheets / "noto.webp").read_bytes() + b"\0\0")
    monkeypatch.setenv(FOLDER_VARIABLE, str(sheets))
    assert identify(world.captioned(1, 0), "encoders").pictures != first.pictures


# --------------------------------------------------------------------------------------------------------- prompts

HELD_OUT = {"heldout-pair": "pair", "heldout-style": "concept_style", "heldout-colour": "concept_colour"}


@pytest.mark.parametrize("name", world.LISTS)
def test_prompt_lists(name: str) -> None:
    """Distinct prompts; those of a held-out kind state it, and no other prompt states anything held out."""
    prompts = world.read_prompts(name)
    assert len(set(prompts)) == len(prompts) == world.LISTS[name].count
    kind = {**HELD_OUT, "style": "style"}.get(name)
    assert {stated_kinds(claim_of(prompt)) for prompt in prompts} == {frozenset((kind,) if kind else ())}
    if name == "synonym":
        held_out = {text for word in synonyms() for text in (word, plural(word))}
        assert all(any(text in prompt for text in held_out) for prompt in prompts)


def test_lists_for_choosing_are_others_than_the_benchmark() -> None:
    lists = [set(world.read_prompts(name)) for name in ("validation", "gamma", "benchmark")]
    assert len(set.union(*lists)) > 0.98 * sum(map(len, lists))
    kinds = [claim_of(prompt).kind for prompt in lists[2]]
    assert min(kinds.count(kind) for kind in KINDS) > 300
    with pytest.raises(UserError, match="'gamma'"):
        world.read_prompts("gama")


def test_nothing_is_measured_on_scenes_of_a_training() -> None:
    """Scenes are functions of their seed, and each use has a seed of its own."""
    trained = [TRAINING_SEED, dataset.READER_SEED, dataset.REWARD_SEED, addons.TRAINING]
    measured = [REFERENCE_SEED, parallel.TEST_SEED, addons.TESTS, *(own.seed for own in world.LISTS.values())]
    assert len({*trained, *measured}) == len(trained) + len(measured)


# ------------------------------------------------------------------------------------------------ trained networks

COUNT = 48


@pytest.mark.skipif(not (location.root() / "reward").is_dir(), reason="the world has no preference scorer yet")
def test_what_rewards_is_not_what_evaluates() -> None:
    """The preference scorer and the reader share no weights."""
    own, other = (load_tensors(location.root() / name / f"{name}.safetensors") for name in ("reward", "reader"))
    shared = [(a, b) for a in own.values() for b in other.values() if a.shape == b.shape and a.dim() > 1]
    assert not any(torch.equal(a, b) for a, b in shared)
    record = read_json(location.root() / "reward" / "reward.json")
    assert record["config"]["channels"] != read_json(location.root() / "reader" / "reader.json")["channels"]


@pytest.mark.slow
def test_the_reader_finds_the_facts_of_unseen_scenes() -> None:
    scenes = make_scenes(REFERENCE_SEED, range(COUNT))
    found = SceneReader(location.root() / "reader")(draw_scenes(REFERENCE_SEED, range(COUNT)))
    assert scene_accuracy(found, [full_claim(scene) for scene in scenes])["all"].value > 0.5


@pytest.mark.slow
def test_the_teacher_draws_its_prompts() -> None:
    """Pictures show more of what their own prompts state than of what the next prompts state, by far."""
    prompts = world.read_prompts("validation")[:COUNT]
    sampling = TEACHER_SAMPLING.model_copy(update={"steps": 12, "omega": students_omega()})
    pictures = load_image_generator(location.root() / "teacher").draw(prompts, range(COUNT), sampling)
    facts = SceneReader(location.root() / "reader")(pictures)

    def shares(texts: tuple[str, ...]) -> np.ndarray:
        stated = [list(check(claim_of(text), seen).values()) for text, seen in zip(texts, facts, strict=True)]
        return np.array([np.mean(row) for row in stated])

    gains = shares(prompts) - shares(prompts[1:] + prompts[:1])
    assert gains.mean() > 4 * gains.std(ddof=1) / np.sqrt(COUNT)


@pytest.mark.slow
@pytest.mark.skipif(not (location.root() / "reward").is_dir(), reason="the world has no preference scorer yet")
def test_the_reward_distinguishes_prompts() -> None:
    """`method.reward.scorer = world`, as in training: scores, and a gradient to the picture that raises them."""
    scorer = load_named_scorer("world", torch.device("cpu"))
    prompts = world.read_prompts("validation")[:COUNT]
    pictures = to_tensor(matching_pictures(prompts, 0, 0, COUNT)).requires_grad_()
    texts = scorer.prepare(prompts)
    right = scorer.score(pictures, texts)
    wrong = scorer.score(pictures, {name: value.roll(1, 0) for name, value in texts.items()})
    assert float((right > wrong).float().mean()) > 0.9
    (slope,) = torch.autograd.grad(right.sum(), pictures)
    better = scorer.score((pictures + 0.1 * slope / slope.flatten(1).norm(dim=1)[:, None, None, None]).detach(), texts)
    assert float((better - right).detach().mean()) > 0
