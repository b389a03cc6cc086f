"""The preference scorer of sticker scenes: wrong prompts, its loss, its training, its folder, its gradient."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fewstep.common.accelerator import make_accelerator
from fewstep.common.errors import UserError
from fewstep.training.config import LoopConfig, OptimConfig
from fewstep_worlds.common import location
from fewstep_worlds.common.autoencoder import to_tensor
from fewstep_worlds.stickers import reward_training, world, wrong_claims
from fewstep_worlds.stickers.claim import check, facts_of, full_claim, make_claim
from fewstep_worlds.stickers.dataset import make_scenes
from fewstep_worlds.stickers.grammar import read
from fewstep_worlds.stickers.heldout import KINDS, held_out_kinds
from fewstep_worlds.stickers.reward import StickerScorer, load_reward, save_reward
from fewstep_worlds.stickers.reward_network import LENGTH, RewardNetwork, word_numbers, words_of
from fewstep_worlds.stickers.settings import RewardConfig
from fewstep_worlds.studies import preference

CPU = torch.device("cpu")
TINY = RewardConfig(
    channels=(8, 16, 16),
    blocks=(1, 1),
    groups=2,
    width=32,
    layers=(1, 1),
    others=1,
    workers=0,
    loop=LoopConfig(steps=2, batch=2, save_every=1, log_every=1),
)


# --------------------------------------------------------------------------------------------------- wrong claims


def test_a_wrong_claim_is_false_in_its_fact_alone() -> None:
    rng, seen, missing = np.random.default_rng(0), Counter[str](), Counter[str]()
    for scene in make_scenes(5, range(300)):
        claim, facts = make_claim(scene, rng), facts_of(scene)
        for fact in wrong_claims.FACTS:
            wrong = wrong_claims.wrong_claim(claim, scene, fact, rng)
            if wrong is None:
                missing[fact] += 1
                assert fact == "style" or getattr(claim, fact) is None
                continue
            seen[fact] += 1
            false = {name for name, right in check(wrong, facts).items() if not right}
            # a concept that is not there has no count and no place
            assert false == {fact} if fact != "concepts" else fact in false <= {"concepts", "count", "relation"}
            for name in ("colour", "pattern", "style"):
                assert bool(getattr(wrong, name)) == bool(getattr(claim, name))
                assert name == fact or getattr(wrong, name) == getattr(claim, name)
            concepts = {concept for concept, _ in wrong.things}
            assert not held_out_kinds(concepts, wrong.style or "", wrong.colour or "")
    assert set(seen) == set(wrong_claims.FACTS)
    assert set(missing) == {"relation", "colour", "pattern", "style"}


def test_a_choice_has_one_true_prompt(sticker_sheets: Path) -> None:
    pictures, choices = wrong_claims.draw_choices(5, np.arange(40), sticker_sheets)
    assert pictures.shape == (40, 64, 64, 3)
    for choice in choices:
        truths = [all(check(read(text, "english"), facts_of(choice.scene)).values()) for text in choice.prompts]
        assert truths == [True] + [False] * len(choice.wrong)
        assert len(choice.prompts) == 1 + len(wrong_claims.FACTS)


@pytest.mark.parametrize("kind", KINDS)
def test_held_out_scenes_have_choices(sticker_sheets: Path, kind: str) -> None:
    _, choices = wrong_claims.draw_choices(5, np.arange(12), sticker_sheets, kind)
    assert {name for choice in choices for name in choice.wrong} >= {"concepts", "count", "colour", "pattern", "style"}


def test_prompts_of_other_scenes_compete_unless_they_are_true(sticker_sheets: Path) -> None:
    _, (one, other) = wrong_claims.draw_choices(5, np.arange(2), sticker_sheets)
    columns, true = reward_training.rivals([one, other, one], others=2)
    own = len(one.prompts)
    assert columns[0].tolist() == [*range(own), own, 2 * own]
    assert columns[2].tolist() == [*range(2 * own, 3 * own), 0, own]
    assert true[:, 0].all()
    assert not true[:, 1:own].any()
    assert true[0, own:].tolist() == [False, True]
    assert true[2, own:].tolist() == [True, False]


def test_every_training_word_has_a_number(sticker_sheets: Path) -> None:
    words = reward_training.vocabulary()
    numbers = {word: number for number, word in enumerate(words, 1)}
    _, choices = wrong_claims.draw_choices(6, np.arange(200), sticker_sheets)
    texts = [text for choice in choices for text in choice.prompts]
    rows = word_numbers(texts, numbers)
    for text, row in zip(texts, rows.tolist()):
        assert [words[number - 1] for number in row if number] == words_of(text)
    assert len(set(map(tuple, rows.tolist()))) == len(set(texts))
    assert int((rows > 0).sum(1).max()) < LENGTH


# ----------------------------------------------------------------------------------------------------------- loss


def test_loss_of_known_logits() -> None:
    true = torch.tensor([[True, False, False, True]])
    flat = reward_training.choice_loss(torch.zeros(1, 4), true)
    assert flat.value.item() == pytest.approx(math.log(3) + math.log(2))
    logits = torch.tensor([[2.0, -1.0, 0.0, -3.0]])
    found = reward_training.choice_loss(logits, true)
    choice = math.log(sum(math.exp(x) for x in (2.0, -1.0, 0.0))) - 2

    def soft(x: float) -> float:
        return math.log1p(math.exp(x))

    alone = 0.5 * (0.5 * (soft(-2) + soft(3)) + 0.5 * (soft(-1) + soft(0)))
    assert found.scalars["choice"].item() == pytest.approx(choice)
    assert found.scalars["alone"].item() == pytest.approx(alone)
    assert found.scalars["right"].item() == 1
    assert reward_training.choice_loss(-logits, true).scalars["right"].item() == 0


# ------------------------------------------------------------------------------------------------------- training


@pytest.mark.slow
def test_training_teaches_the_colours_of_backgrounds(
    sticker_sheets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = {name: change for name, change in wrong_claims.FACTS.items() if name == "colour"}
    monkeypatch.setattr(wrong_claims, "FACTS", facts)
    monkeypatch.setattr(wrong_claims, "make_claim", lambda scene, _: full_claim(scene))
    loop = LoopConfig(steps=100, batch=24, log_every=10)
    optim = OptimConfig(lr=5e-3, betas=(0.9, 0.99), warmup=10)
    config = TINY.model_copy(update={"loop": loop, "optim": optim, "damaged": 0.0})
    network = reward_training.train_reward(config, tmp_path, make_accelerator("fp32", CPU), sticker_sheets)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    losses = [line["reward/loss"] for line in lines if "reward/loss" in line]
    assert losses[-1] < 0.8 * losses[0]
    scorer = StickerScorer(network, reward_training.vocabulary(), "")
    shares = reward_training.choice_accuracy(scorer, 100, folder=sticker_sheets)
    assert shares["fact colour"].n == 100
    assert shares["fact colour"].interval[0] > 0.6


@pytest.mark.slow
def test_a_run_is_resumed_exactly(sticker_sheets: Path, tmp_path: Path) -> None:
    accelerator = make_accelerator("fp32", CPU)
    whole = reward_training.train_reward(TINY, tmp_path / "whole", accelerator, sticker_sheets)
    half = TINY.model_copy(update={"loop": TINY.loop.model_copy(update={"steps": 1})})
    reward_training.train_reward(half, tmp_path / "halves", accelerator, sticker_sheets)
    resumed = reward_training.train_reward(TINY, tmp_path / "halves", accelerator, sticker_sheets)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name


def test_accuracy_counts_true_prompts_above_wrong_ones(
    sticker_sheets: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scores that are right but for the first scene's first wrong prompt, and equal for its second."""

    def logits(_: object, pictures: torch.Tensor, choices: list[wrong_claims.Choice]) -> np.ndarray:
        assert pictures.shape == (20, 3, 64, 64)
        found = np.tile([1.0, 0, 0, 0, 0, 0, 0], (len(choices), 1))
        found[0, 1:3] = 2, 1
        return found

    monkeypatch.setattr(reward_training, "choice_logits", logits)
    rows = reward_training.reward_report(load_reward(folder), 20, sticker_sheets)
    assert list(rows) == ["real", *(f"real, held out: {kind}" for kind in KINDS), "blurred", "noised"]
    for shares in rows.values():
        assert (shares["all"].right, shares["all"].n) == (118, 120)
        assert (shares["first"].right, shares["first"].n) == (19, 20)
        assert sum(share.n for name, share in shares.items() if name.startswith("fact ")) == 120
    lost = {name: share.n - share.right for name, share in rows["real"].items()}
    assert {name for name in lost if lost[name]} == {"all", "first", "fact concepts", "fact count"}


def test_a_choice_is_compared_as_its_prompts_are_scored(sticker_sheets: Path, folder: Path) -> None:
    scorer = load_reward(folder)
    drawn, choices = wrong_claims.draw_choices(5, np.arange(5), sticker_sheets)
    pictures = reward_training.damaged(drawn, 0.0, 0.0)
    logits = torch.from_numpy(reward_training.choice_logits(scorer, pictures, choices, batch=2))
    for column in (0, 4):
        prepared = scorer.prepare([choice.prompts[column] for choice in choices])
        torch.testing.assert_close(10 * scorer.score(pictures, prepared), logits[:, column])


# ---------------------------------------------------------------------------------------------------------- scorer

PROMPTS = ("three frogs on yellow", "a rocket left of a gem stone on blue stripes, twemoji style")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    words = reward_training.vocabulary()
    place = tmp_path_factory.mktemp("world") / "reward"
    save_reward(RewardNetwork(TINY, len(words)), words, place)
    return place


def test_a_saved_scorer_scores_alike(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(location.ENVIRONMENT, str(folder.parent))
    scorer: Any = world.load_scorer(CPU)
    save_reward(scorer.network, scorer.words, tmp_path / "again")
    again = load_reward(tmp_path / "again")
    assert again.identity == scorer.identity
    pictures = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    scores = [one.score(pictures, one.prepare(PROMPTS)) for one in (scorer, again)]
    assert torch.equal(*scores)
    assert scores[0][0] != scores[0][1]
    alone = scorer.score(pictures[1:], scorer.prepare(PROMPTS[1:]))
    torch.testing.assert_close(alone, scores[0][1:])


def test_the_gradient_reaches_every_pixel(folder: Path) -> None:
    scorer = load_reward(folder)
    pictures = torch.zeros(1, 3, 64, 64, requires_grad=True)
    small = torch.full((1, 3, 32, 32), 0.1, requires_grad=True)
    for leaf in (pictures, small):
        scorer.score(leaf, scorer.prepare(PROMPTS[:1])).sum().backward()
        assert leaf.grad is not None
        assert (leaf.grad.abs().sum(1) > 0).all()
    step = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    scores = [scorer.score(size * step, scorer.prepare(PROMPTS[:1])) for size in (1e-2, -1e-2)]
    assert pictures.grad is not None
    slope = (scores[0] - scores[1]).item() / 2e-2
    assert slope == pytest.approx((pictures.grad * step).sum().item(), rel=0.05)
    beyond_white = torch.full((1, 3, 64, 64), 1.5, requires_grad=True)
    scorer.score(beyond_white, scorer.prepare(PROMPTS[:1])).sum().backward()
    assert beyond_white.grad is not None
    assert float(beyond_white.grad.abs().max()) == 0


def test_the_metric_scores_each_picture_with_its_own_prompt(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preference, "BATCH", 2)
    scorer = load_reward(folder)
    metric = preference.Preference(scorer)
    pictures = np.random.default_rng(2).integers(0, 255, (5, 64, 64, 3), dtype=np.uint8)
    texts = [PROMPTS[number // 3] for number in range(5)]
    alone = [scorer.score(to_tensor(p[None]), scorer.prepare([text])).item() for p, text in zip(pictures, texts)]
    assert metric.features(pictures, texts) == pytest.approx(alone, abs=1e-5)
    assert metric.identity.weights_sha256 == scorer.identity.weights_sha256


def test_only_the_prompts_that_are_given_are_scored(folder: Path) -> None:
    scorer = load_reward(folder)
    with pytest.raises(ValueError, match="one row"):
        scorer.score(torch.zeros(1, 3, 64, 64), scorer.prepare(PROMPTS))
    with pytest.raises(UserError, match="prompt"):
        scorer.prepare([PROMPTS[0], "一枚火箭"])


@pytest.mark.parametrize("name", ["reward.json", "reward.safetensors"])
@pytest.mark.parametrize("damage", ["missing", "cut", "foreign"])
def test_a_damaged_folder_is_refused(folder: Path, tmp_path: Path, name: str, damage: str) -> None:
    for file in folder.iterdir():
        content = file.read_bytes()
        if file.name == name:
            other = b"{}" if name.endswith("json") else content[:-1] + bytes([content[-1] ^ 1])
            content = {"missing": b"", "cut": content[: len(content) // 2], "foreign": other}[damage]
            if damage == "missing":
                continue
        (tmp_path / file.name).write_bytes(content)
    with pytest.raises(UserError, match=name.partition(".")[0]):
        load_reward(tmp_path)
