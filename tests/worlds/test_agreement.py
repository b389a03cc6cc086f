"""The prompt-agreement scorer: right answers, its loss, its training on a toy set, its files."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fewstep.common.errors import UserError
from fewstep.common.rng import KeyedRng
from fewstep.training.config import LoopConfig, OptimConfig
from fewstep_worlds.emoji8 import dataset as emoji8
from fewstep_worlds.emoji8.config import AgreementConfig, ScorerConfig
from fewstep_worlds.emoji8.scorers.agreement import (
    RECORD,
    WEIGHTS,
    Agreement,
    PromptAgreement,
    load_scorer,
    save_scorer,
    to_input,
)
from fewstep_worlds.emoji8.scorers.augment import augment
from fewstep_worlds.emoji8.scorers.network import Scorer
from fewstep_worlds.emoji8.scorers.train import caption_targets, draw_captions, multi_positive_loss, train_scorer

STEPS = 70
TINY = ScorerConfig(channels=(8, 16), blocks=(1, 1), groups=4, hidden=32, width=16)


class Words:
    """A text side without weights: each word has its fixed random vector, a prompt the sum of them."""

    name = "sums of word vectors"
    sha256 = "0" * 64
    width = 32

    def __call__(self, prompts: Sequence[str]) -> Tensor:
        rows = [sum((self.vector(word) for word in prompt.split()), np.zeros(32)) for prompt in prompts]
        return torch.from_numpy(np.array(rows, dtype=np.float32))

    @staticmethod
    @lru_cache(None)
    def vector(word: str) -> np.ndarray:
        seed = int.from_bytes(hashlib.sha256(word.encode()).digest()[:8], "big")
        return np.random.default_rng(seed).normal(size=32)


class Nothing(Words):
    """A text side that does no work."""

    def __call__(self, prompts: Sequence[str]) -> Tensor:
        return torch.zeros(len(prompts), self.width)


@pytest.fixture(scope="module")
def toy() -> emoji8.Emoji8:
    """32 concepts in 4 styles or fewer."""
    data = emoji8.load("train")
    names = sorted({record.name for record in data.records})[::45]
    rows = [i for i, r in enumerate(data.records) if r.name in names and r.family in ("noto", "fluent")]
    return emoji8.Emoji8(data.pictures[rows], tuple(data.records[i] for i in rows))


def toy_config(steps: int) -> AgreementConfig:
    loop = LoopConfig(steps=steps, batch=32, save_every=40, log_every=5, precision="fp32")
    optim = OptimConfig(lr=5e-3, warmup=2, ema=0.8)
    return AgreementConfig(network=TINY, captions=4, loop=loop, optim=optim)


@pytest.fixture(scope="module")
def trained(toy: emoji8.Emoji8, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scorer")
    train_scorer(toy_config(STEPS), folder, text=Words(), data=toy, quiet=True)
    return folder


# ------------------------------------------------------------------------------------------------- loss


def test_loss_of_known_tables() -> None:
    eye, none = torch.eye(4, dtype=torch.bool), torch.zeros(4, 4, dtype=torch.bool)
    flat = multi_positive_loss(torch.zeros(4, 4), eye, none, torch.tensor(10.0))
    assert float(flat) == pytest.approx(math.log(4))
    sharp = multi_positive_loss(torch.eye(4), eye, none, torch.tensor(50.0))
    assert float(sharp) == pytest.approx(0, abs=1e-6)
    both = eye.clone()
    both[0, 1] = both[1, 0] = True
    cosine = torch.eye(4)
    cosine[0, 1] = cosine[1, 0] = 1
    expected = 0.5 * math.log(2)  # two of four rows have two equally right answers, however sharp
    assert float(multi_positive_loss(cosine, both, none, torch.tensor(80.0))) == pytest.approx(expected)
    ignored = none.clone()
    ignored[0, 1] = ignored[1, 0] = True
    left_out = multi_positive_loss(cosine, eye, ignored, torch.tensor(80.0))
    assert float(left_out) == pytest.approx(0, abs=1e-6), "an ignored pair costs nothing"


def test_a_caption_is_right_for_its_concept_and_style(toy: emoji8.Emoji8) -> None:
    captions = draw_captions(toy.records, 16, 0, Words())
    drawn = emoji8.caption_table(toy.records, 16, 0)
    distinct = sorted({caption for row in drawn for caption in row})
    rng = np.random.default_rng(0)
    items = torch.from_numpy(rng.permutation(len(toy))[:40])
    chosen = captions.rows[items, 3]
    positive, ignored = caption_targets(captions, items, chosen)
    assert positive.diagonal().all()
    assert not (positive & ignored).any()
    for i in range(40):
        picture = toy.records[int(items[i])]
        for j in range(40):
            owner, caption = toy.records[int(items[j])], distinct[int(chosen[j])]
            styled = caption.endswith(emoji8.style_words(owner.style))
            right = picture.concept == owner.concept and (not styled or picture.style == owner.style)
            assert bool(positive[i, j]) == right
            if ignored[i, j]:
                assert picture.concept != owner.concept
                assert owner.name not in caption
                words = {*picture.keywords, *picture.name.split(", "), emoji8.style_words(picture.style)}
                assert set(caption.split(", ")) <= words


def test_captions_of_the_whole_split_are_shared_where_they_are_true() -> None:
    records = emoji8.load_records("train")
    captions = draw_captions(records, 2, 0, Nothing())
    assert int((captions.pieces.sum(1) == 0).sum()) == 0
    heldout = {record.name for record in emoji8.load_records("heldout-concept")}
    assert not {caption for row in emoji8.caption_table(records, 2, 0) for caption in row} & heldout


# --------------------------------------------------------------------------------------------- training


@pytest.mark.slow
def test_the_loss_falls_and_pictures_find_their_names(trained: Path, toy: emoji8.Emoji8) -> None:
    lines = [json.loads(line) for line in (trained / "log.jsonl").read_text().splitlines()]
    losses = [line["scorer/loss"] for line in lines if "scorer/loss" in line]
    assert losses[-1] < 0.8 * losses[0]
    agreement = load_scorer(trained / "scorer", Words())
    assert set(agreement.record["r1"]) == {"r1_heldout-pair", "r1_heldout-concept", "r1_train"}
    prompts = [record.name for record in toy.records]
    right = agreement.scores(toy.pictures, prompts)
    wrong = agreement.scores(toy.pictures, prompts[7:] + prompts[:7])
    assert right.mean() > wrong.mean() + 0.05
    assert np.abs(right).max() <= 1
    names = sorted(set(prompts))
    best = (agreement.embed_pictures(toy.pictures) @ agreement.embed_text(names).T).argmax(1)
    found = np.mean([names[i] == prompt for i, prompt in zip(best.tolist(), prompts, strict=True)])
    assert found > 3 / len(names), "three times better than chance"


def test_saved_scores_are_reloaded_scores(trained: Path, toy: emoji8.Emoji8, tmp_path: Path) -> None:
    agreement = load_scorer(trained / "scorer", Words())
    prompts = [record.name for record in toy.records]
    weights = dict(agreement.scorer.state_dict())
    save_scorer(tmp_path / "again", TINY, weights, agreement.text, {})
    again = load_scorer(tmp_path / "again", Words())
    assert np.array_equal(again.scores(toy.pictures, prompts), agreement.scores(toy.pictures, prompts))
    metric = PromptAgreement(agreement)
    figure = metric.reduce(metric.features(toy.pictures, prompts), None, 0)
    assert figure.value == pytest.approx(agreement.scores(toy.pictures, prompts).mean())
    assert metric.identity.weights_sha256 == again.weights_sha256


def test_resuming_equals_training_through(trained: Path, toy: emoji8.Emoji8, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    shutil.rmtree(folder / "checkpoints" / f"step-{STEPS:08d}")
    again = train_scorer(toy_config(STEPS), folder, text=Words(), data=toy, quiet=True)
    assert again.weights_sha256 == load_scorer(trained / "scorer", Words()).weights_sha256


def test_held_out_pictures_are_refused(toy: emoji8.Emoji8, tmp_path: Path) -> None:
    other = emoji8.load("heldout-concept")
    with pytest.raises(UserError, match="is of the split 'heldout-concept'; a scorer trains on 'train'"):
        train_scorer(toy_config(1), tmp_path, text=Words(), data=other)
    assert not any(tmp_path.iterdir())


def test_wrong_files_are_refused(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"has no {RECORD}"):
        load_scorer(tmp_path, Words())
    stranger = Words()
    stranger.sha256 = "f" * 64
    with pytest.raises(UserError, match="was trained on text encoder 0000000000000000, not ffffffffffffffff"):
        load_scorer(trained / "scorer", stranger)
    cut = tmp_path / "cut"
    cut.mkdir()
    for name in (WEIGHTS, RECORD):
        (cut / name).write_bytes((trained / "scorer" / name).read_bytes())
    (cut / WEIGHTS).write_bytes((cut / WEIGHTS).read_bytes()[:-100])
    with pytest.raises(UserError, match="is not a whole safetensors file"):
        load_scorer(cut, Words())
    (cut / RECORD).write_text('{"network": {}}')
    with pytest.raises(UserError, match="is not a scorer's record"):
        load_scorer(cut, Words())


def test_scores_are_differentiable_in_pictures(toy: emoji8.Emoji8) -> None:
    torch.manual_seed(0)
    scorer = Scorer(TINY, Words.width)
    x = to_input(toy.pictures[:3]).requires_grad_()
    cosine = scorer.embed_pictures(x) * scorer.embed_text(Words()(["a", "b", "c"]))
    cosine.sum().backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None
    assert float(x.grad.abs().sum()) > 0


def test_pictures_of_other_sizes_are_read(toy: emoji8.Emoji8) -> None:
    torch.manual_seed(0)
    agreement = Agreement(Scorer(TINY, Words.width).eval(), Words(), "", {})
    large = toy.pictures[:4].repeat(2, axis=1).repeat(2, axis=2)
    assert np.allclose(agreement.scores(large, ["a"] * 4), agreement.scores(toy.pictures[:4], ["a"] * 4), atol=0.05)
    with pytest.raises(UserError, match="4 pictures came with 3 prompts"):
        agreement.scores(large, ["a"] * 3)


# ---------------------------------------------------------------------------------------------- augment


def test_augmentation_is_keyed_by_sample_and_keeps_white_white(toy: emoji8.Emoji8) -> None:
    x = to_input(toy.pictures[:12])
    whole = augment(x, KeyedRng(0, 5, tuple(range(12))))
    assert whole.shape == x.shape
    assert float(whole.min()) >= -1
    assert float(whole.max()) <= 1
    part = augment(x[4:7], KeyedRng(0, 5, (4, 5, 6)))
    assert torch.allclose(part, whole[4:7], atol=1e-5), "a sample's draws do not depend on the batch"
    assert not torch.allclose(augment(x, KeyedRng(0, 6, tuple(range(12)))), whole)
    white = augment(torch.ones(16, 3, 64, 64), KeyedRng(0, 0, tuple(range(16))))
    assert float(white.mean()) > 0.95
    assert float((white.mean((1, 2, 3)) > 0.9999).float().mean()) > 0.3
