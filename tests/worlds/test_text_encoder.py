"""The bundled teacher's text encoder and tokenizer, as plain transformers loads them."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

FOLDER = Path(__file__).resolve().parents[2] / "world" / "teacher"
NAMES = (
    "dog",
    "cat",
    "horse",
    "rabbit",
    "pig",
    "snake",
    "automobile",
    "bus",
    "airplane",
    "ship",
    "bicycle",
    "house",
    "hospital",
    "church",
    "apple",
    "potato",
    "hamburger",
    "doughnut",
    "cookie",
    "guitar",
    "violin",
    "glasses",
    "coat",
    "police officer",
    "ghost",
    "rocket",
)


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@cache
def loaded():  # type: ignore[no-untyped-def]
    from transformers import AutoTokenizer, BertModel

    tokenizer = AutoTokenizer.from_pretrained(FOLDER / "tokenizer")
    return tokenizer, BertModel.from_pretrained(FOLDER / "text_encoder").eval()


@torch.no_grad()
def encode(*texts: str, length: int = 20) -> tuple[Tensor, Tensor]:
    """Return states [B, length, C] and mask [B, length], called as StableDiffusionPipeline calls them."""
    tokenizer, encoder = loaded()
    batch = tokenizer(list(texts), padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    return encoder(batch.input_ids, attention_mask=batch.attention_mask)[0], batch.attention_mask


def mean_state(*texts: str) -> Tensor:
    states, mask = encode(*texts)
    weight = mask[..., None].to(states)
    return F.normalize((states * weight).sum(1) / weight.sum(1), dim=1)


def test_folder_is_small_and_complete() -> None:
    shards = sorted((FOLDER / "text_encoder").glob("*.safetensors"))
    assert sum(shard.stat().st_size for shard in shards) < 19e6
    assert all(shard.stat().st_size < 15 * 2**20 for shard in shards)
    from transformers import BertModel

    _, report = BertModel.from_pretrained(FOLDER / "text_encoder", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def test_loads_in_float32_with_what_the_pipeline_reads() -> None:
    tokenizer, encoder = loaded()
    assert encoder.dtype == torch.float32
    assert encoder.config.use_attention_mask is True
    assert tokenizer.model_max_length == 20
    assert encoder.config.max_position_embeddings >= tokenizer.model_max_length
    assert len(tokenizer) == encoder.config.vocab_size
    assert tokenizer.pad_token_id == encoder.config.pad_token_id == 0


@pytest.mark.parametrize(
    ("word", "name"),
    [
        ("doggy", "dog"),
        ("pooch", "dog"),
        ("kitty", "cat"),
        ("bunny", "rabbit"),
        ("car", "automobile"),
        ("motorcar", "automobile"),
        ("aeroplane", "airplane"),
        ("bike", "bicycle"),
        ("donut", "doughnut"),
        ("fiddle", "violin"),
        ("eyeglasses", "glasses"),
        ("policeman", "police officer"),
        ("serpent", "snake"),
        ("cheeseburger", "hamburger"),
    ],
)
def test_a_concepts_own_word_is_closest_to_it(word: str, name: str) -> None:
    scores = (mean_state(word) @ mean_state(*NAMES).T)[0]
    assert NAMES[int(scores.argmax())] == name


def test_phrase_with_style_keeps_its_concept() -> None:
    scores = (mean_state("a cute doggy, fluent 3d style") @ mean_state(*(f"{name}, noto style" for name in NAMES)).T)[0]
    assert NAMES[int(scores.argmax())] == "dog"


def test_real_tokens_do_not_change_with_padding() -> None:
    text = "octopus, noto style"
    short, mask = encode(text, length=8)
    count = int(mask.sum())
    long, _ = encode(text, length=20)
    torch.testing.assert_close(long[:, :count], short[:, :count], rtol=0, atol=2e-5)


def test_states_do_not_depend_on_the_batch() -> None:
    exclusive, _ = encode("green apple")
    among, _ = encode("a bus", "green apple", "old man with a very long description of what he wears")
    torch.testing.assert_close(among[1], exclusive[0], rtol=0, atol=2e-5)


def test_order_of_words_matters() -> None:
    one, two = mean_state("horse on a house", "house on a horse")
    assert float(one @ two) < 0.9999


def test_any_ascii_text_is_tokenised() -> None:
    tokenizer, _ = loaded()
    texts = ["zxqj 0123456789", "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~", "Café DOGGY", "supercalifragilistic"]
    for text in texts:
        assert tokenizer.unk_token_id not in tokenizer(text).input_ids
    assert tokenizer("Café").input_ids == tokenizer("cafe").input_ids
    assert tokenizer("犬").input_ids == [
        tokenizer.cls_token_id,
        tokenizer.unk_token_id,
        tokenizer.sep_token_id,
    ]


def test_long_prompt_is_cut_and_empty_prompt_encodes() -> None:
    states, mask = encode("word " * 100, "")
    assert states.shape == (2, 20, 384)
    assert mask.sum(1).tolist() == [20, 2]
    assert bool(states.isfinite().all())


def test_captions_are_not_split_further_than_by_the_full_vocabulary() -> None:
    tokenizer, _ = loaded()
    assert tokenizer.tokenize("Octopus, twemoji style") == [
        "octopus",
        ",",
        "t",
        "##we",
        "##mo",
        "##ji",
        "style",
    ]
    assert tokenizer.tokenize("grinning face with big eyes") == ["grinning", "face", "with", "big", "eyes"]
