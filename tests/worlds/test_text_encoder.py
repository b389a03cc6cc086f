"""The bundled teacher's text encoder and tokenizer, as plain transformers loads them, and how they are trimmed."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fewstep.common.accelerator import make_accelerator
from fewstep.common.errors import UserError
from fewstep_worlds.common.location import root
from fewstep_worlds.common.text import load_text_encoder, trim_text
from fewstep_worlds.stickers.dataset import make_scenes
from fewstep_worlds.stickers.grammar import phrases
from fewstep_worlds.stickers.prompts import training_prompt
from fewstep_worlds.stickers.settings import TeacherConfig
from fewstep_worlds.stickers.teacher import TOKENS, train_teacher
from fewstep_worlds.stickers.vocabulary import NAMES

OWN_WORDS = {
    "puppy": "dog",
    "kitty": "cat",
    "burger": "hamburger",
    "donut": "doughnut",
    "automobile": "car",
    "bike": "bicycle",
    "aeroplane": "airplane",
    "tortoise": "turtle",
    "toad": "frog",
    "hog": "pig",
    "football": "soccer ball",
}
"""Word -> the concept that it names, among all concepts."""


@cache
def loaded(folder: Path) -> tuple[Any, Any]:
    return load_text_encoder(folder)


@torch.no_grad()
def encode(*texts: str, length: int = TOKENS, folder: Path | None = None) -> tuple[Tensor, Tensor]:
    """Return states [B, length, C] and mask [B, length], called as StableDiffusionPipeline calls them."""
    tokenizer, encoder = loaded(folder or root() / "teacher")
    batch = tokenizer(list(texts), padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    return encoder(batch.input_ids, attention_mask=batch.attention_mask)[0], batch.attention_mask


def mean_state(*texts: str) -> Tensor:
    states, mask = encode(*texts)
    weight = mask[..., None].to(states)
    return F.normalize((states * weight).sum(1) / weight.sum(1), dim=1)


def captions(count: int) -> list[str]:
    prompts = [training_prompt(scene, 0, index) for index, scene in enumerate(make_scenes(0, range(count)))]
    return [prompt.text for prompt in prompts if prompt]


# ------------------------------------------------------------------------------------------------------ the bundled one


def test_it_holds_what_the_pipeline_reads() -> None:
    tokenizer, encoder = loaded(root() / "teacher")
    assert encoder.config.use_attention_mask is True
    assert tokenizer.model_max_length == TOKENS <= encoder.config.max_position_embeddings
    assert len(tokenizer) == encoder.config.vocab_size
    assert tokenizer.pad_token_id == encoder.config.pad_token_id == 0


def test_a_concepts_own_word_is_closest_to_it() -> None:
    scores = mean_state(*OWN_WORDS) @ mean_state(*NAMES).T
    assert [NAMES[i] for i in scores.argmax(1).tolist()] == list(OWN_WORDS.values())


def test_states_depend_on_their_own_text_and_its_order_alone() -> None:
    text = "a frog left of a star"
    states, mask = encode(text)
    among, _ = encode("a bus", text, "three old keys on a background of blue stripes, in the style of noto")
    torch.testing.assert_close(among[1], states[0], rtol=0, atol=2e-5)
    short, _ = encode(text, length=12)
    count = int(mask.sum())
    assert count < 12
    torch.testing.assert_close(states[:, :count], short[:, :count], rtol=0, atol=2e-5)
    one, two = mean_state(text, "a star left of a frog")
    assert float(one @ two) < 0.9999


def test_words_of_sentences_are_not_spelt_and_any_ascii_text_is() -> None:
    tokenizer, _ = loaded(root() / "teacher")
    words = {word for phrase in phrases() for word in phrase.replace(",", " ").split() if len(word) > 2}
    assert len(words) > 200
    assert all(any(len(piece.removeprefix("##")) > 1 for piece in tokenizer.tokenize(word)) for word in words)
    for text in ("zxqj 0123456789", "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~", "Café DOGGY", "supercalifragilistic"):
        assert tokenizer.unk_token_id not in tokenizer(text).input_ids
    assert tokenizer("Café").input_ids == tokenizer("cafe").input_ids
    assert tokenizer("犬").input_ids == [tokenizer.cls_token_id, tokenizer.unk_token_id, tokenizer.sep_token_id]


def test_few_prompts_are_longer_than_it_reads() -> None:
    tokenizer, _ = loaded(root() / "teacher")
    assert sum(len(tokenizer(text).input_ids) > TOKENS for text in captions(1000)) <= 5
    states, mask = encode("word " * 100, "")
    assert mask.sum(1).tolist() == [TOKENS, 2]
    assert bool(states.isfinite().all())


# ------------------------------------------------------------------------------------------------------------- trimming


def test_a_trimmed_text_encoder_has_the_same_states(tmp_path: Path) -> None:
    texts = ["", *captions(60)]
    trim_text(root() / "teacher", tmp_path / "few", texts, TOKENS)
    torch.testing.assert_close(encode(*texts, folder=tmp_path / "few")[0], encode(*texts)[0], rtol=1e-3, atol=1e-3)
    few, every = loaded(tmp_path / "few")[0], loaded(root() / "teacher")[0]
    assert len(few) < len(every)
    assert few.unk_token not in few.tokenize("a unicorn")
    settings = json.loads((tmp_path / "few" / "tokenizer" / "tokenizer_config.json").read_text())
    assert settings["model_max_length"] == TOKENS


def test_the_first_layers_have_the_states_that_they_have_among_all(tmp_path: Path) -> None:
    texts = captions(5)
    trim_text(root() / "teacher", tmp_path / "first", phrases(), TOKENS, layers=1)
    tokenizer, encoder = loaded(root() / "teacher")
    batch = tokenizer(texts, padding="max_length", max_length=TOKENS, return_tensors="pt")
    with torch.no_grad():
        layers = encoder(batch.input_ids, attention_mask=batch.attention_mask, output_hidden_states=True).hidden_states
    torch.testing.assert_close(encode(*texts, folder=tmp_path / "first")[0], layers[1], rtol=1e-3, atol=1e-3)


def test_a_teacher_without_its_parts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="text"):
        trim_text(tmp_path, tmp_path / "trimmed", [], TOKENS)
    config = TeacherConfig(autoencoder=str(tmp_path))
    with pytest.raises(UserError, match="autoencoder"):
        train_teacher(config, tmp_path / "run", tmp_path / "new", make_accelerator("fp32", torch.device("cpu")))
