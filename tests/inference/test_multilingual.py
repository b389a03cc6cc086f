"""Prompts of other languages: pairs that leak nothing, an adapter that learns them, and drawing with it."""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import fewstep as api
from fewstep.backbones.pipeline_folder import read_folder
from fewstep.common.errors import UserError
from fewstep.common.random_streams import generator
from fewstep.common.rng import KeyedRng
from fewstep.evaluation.metric import Array
from fewstep.inference.generator import load_image_generator
from fewstep.inference.multilingual.adapter import load_adapter
from fewstep.inference.multilingual.network import StateMap
from fewstep.inference.multilingual.pairs import Pair, read_pairs
from fewstep.inference.multilingual.record import RECORD, WEIGHTS
from fewstep.inference.multilingual.sentence import UniversalSentence, Vectors, piece_vectors, windows
from fewstep.inference.multilingual.settings import AdapterConfig
from fewstep.inference.multilingual.train import output_error, train_adapter
from fewstep.training.config import LoopConfig
from fewstep_worlds.stickers import heldout
from fewstep_worlds.stickers.grammar import read
from fewstep_worlds.stickers.parallel import ScenePairs
from fewstep_worlds.stickers.vocabulary import CONCEPTS
from fewstep_worlds.stickers.world import held_out_pairs, text_pairs
from fewstep_worlds.studies.chinese import ratio_figure

CAPTIONS = ("a red disc", "a blue ring", "a green bar", "a yellow square")
OTHERS = ("hong yuan", "lan huan", "lü tiao", "huang fang")
PAIRS = tuple(map(Pair, OTHERS, CAPTIONS))
WIDTH = 16


class ToySentence:
    """A random unit vector for each text."""

    name, sha256, width = "toy", "0" * 64, WIDTH

    def __call__(self, texts: Sequence[str]) -> Vectors:
        rows = [generator(zlib.crc32(text.encode()), "toy").standard_normal(WIDTH) for text in texts]
        return np.array([row / np.linalg.norm(row) for row in rows], np.float32)


def config(**changes: object) -> AdapterConfig:
    loop = LoopConfig(steps=150, batch=4, save_every=50, log_every=50, precision="fp32")
    plain = AdapterConfig(window=2, width=32, layers=1, output_batch=2, jumps=2, loop=loop)
    return plain.model_copy(update={"optim": plain.optim.model_copy(update={"lr": 1e-2, "warmup": 5}), **changes})


@pytest.fixture(scope="module")
def trained(tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("adapter")
    train_adapter(config(), read_folder(tiny_pipeline), PAIRS, out, sentence=ToySentence(), quiet=True)
    return out / "adapter"


def test_the_states_of_a_closed_set_are_recovered(trained: Path, tiny_pipeline: Path) -> None:
    adapter = load_adapter(trained, read_folder(tiny_pipeline), ToySentence())
    english = load_image_generator(tiny_pipeline).backbone.encode(CAPTIONS)
    with torch.no_grad():
        left = float(adapter.network.error(adapter.encode(OTHERS), english))
        wrong = float(adapter.network.error(adapter.encode(OTHERS[::-1]), english))
    assert left < 0.01 < 0.5 < wrong


def test_a_picture_of_exactly_mapped_states_is_that_of_the_english_prompt(trained: Path, tiny_pipeline: Path) -> None:
    plain = load_image_generator(tiny_pipeline)
    adapter = load_adapter(trained, read_folder(tiny_pipeline), ToySentence())
    states = plain.backbone.encode(CAPTIONS[:1])["text"]
    with torch.no_grad():
        for parameter in adapter.network.leave.parameters():
            parameter.zero_()
    adapter.network.get_buffer("mean_text").copy_(states[0])
    mapped = replace(plain, adapter=adapter)
    sampling = plain.sampling.model_copy(update={"steps": 2, "omega": 2.0})  # guided: the null prompt is the teacher's
    pictures = mapped.draw(["hong"], [3], sampling)
    np.testing.assert_array_equal(pictures, plain.draw(CAPTIONS[:1], [3], sampling))
    assert (pictures != plain.draw(CAPTIONS[1:2], [3], sampling)).any()


def test_a_loaded_adapter_is_the_trained_one(tiny_pipeline: Path, tmp_path: Path) -> None:
    folder, short = read_folder(tiny_pipeline), config(loop=LoopConfig(steps=3, batch=4, precision="fp32"))
    made = train_adapter(short, folder, PAIRS, tmp_path, sentence=ToySentence(), quiet=True)
    loaded = load_adapter(tmp_path / "adapter", folder, ToySentence())
    assert torch.equal(made.encode(OTHERS)["text"], loaded.encode(OTHERS)["text"])


def test_the_output_error_is_a_share_of_the_prompts_effect(tiny_pipeline: Path) -> None:
    teacher = load_image_generator(tiny_pipeline).backbone
    english, null, rng = teacher.encode(CAPTIONS[:2]), teacher.null(2), KeyedRng(0, 0, (0, 1, 2))
    mapped = {"text": null["text"].clone().requires_grad_()}
    error = output_error(teacher, 2.0, english, mapped, null, 2, rng)
    error.backward()
    assert float(error.detach()) == pytest.approx(1, rel=1e-2)
    assert float(output_error(teacher, 2.0, english, english, null, 2, rng)) == pytest.approx(0, abs=1e-4)
    assert mapped["text"].grad is not None
    assert mapped["text"].grad.abs().max() > 0
    assert all(weight.grad is None for weight in teacher.network.parameters())


@pytest.mark.slow
def test_the_output_alone_trains_an_adapter(tiny_pipeline: Path, tmp_path: Path) -> None:
    folder = read_folder(tiny_pipeline)
    loop = LoopConfig(steps=40, batch=4, log_every=10, precision="fp32")
    train_adapter(config(output_share=1.0, output_batch=4, loop=loop), folder, PAIRS, tmp_path, sentence=ToySentence())
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    errors = [line["adapter/outputs"] for line in lines if "adapter/outputs" in line]
    assert errors[-1] < 0.7 * errors[0]


def test_a_resumed_adapter_equals_an_uninterrupted_one(
    tiny_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, mixed = read_folder(tiny_pipeline), config(output_share=0.5)
    mixed = mixed.model_copy(update={"loop": LoopConfig(steps=6, batch=4, save_every=2, precision="fp32")})
    train_adapter(mixed, folder, PAIRS, tmp_path / "whole", sentence=ToySentence(), quiet=True)

    class StopError(Exception):
        pass

    import fewstep.inference.multilingual.train as module

    calls = 0

    def stopping(*args: object) -> object:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise StopError
        return output_error(*args)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(module, "output_error", stopping)
        with pytest.raises(StopError):
            train_adapter(mixed, folder, PAIRS, tmp_path / "cut", sentence=ToySentence(), quiet=True)
    assert not (tmp_path / "cut" / "adapter").exists()
    train_adapter(mixed, folder, PAIRS, tmp_path / "cut", sentence=ToySentence(), quiet=True)
    whole, cut = (tmp_path / run / "adapter" / WEIGHTS for run in ("whole", "cut"))
    assert whole.read_bytes() == cut.read_bytes()
    with pytest.raises(UserError, match="another pairs"):
        train_adapter(mixed, folder, PAIRS[:3], tmp_path / "cut", sentence=ToySentence(), quiet=True)


def test_errors_count_the_tokens_of_the_mask_in_units_of_the_variance() -> None:
    torch.manual_seed(0)
    shapes = {"text": (5, 8), "pooled": (6,), "mask": (5,)}
    english = {"text": torch.randn(50, 5, 8) * 3 + 7, "pooled": torch.randn(50, 6), "mask": torch.ones(50, 5)}
    network = StateMap(config(), WIDTH, shapes)
    network.fit_units(english)
    sure = torch.full((50, 5), 50.0)  # logits of a mask of ones
    mean = {"text": english["text"].mean(0).expand(50, 5, 8), "pooled": english["pooled"].mean(0).expand(50, 6)}
    assert float(network.error({**english, "mask": sure}, english)) == pytest.approx(0, abs=1e-6)
    assert float(network.error({**mean, "mask": sure}, english)) == pytest.approx(2 / 3, rel=1e-4)
    english["mask"][:, 3:] = 0
    wrong = {**english, "text": english["text"].clone(), "mask": (english["mask"] - 0.5) * 100}
    wrong["text"][:, 3:] += 5
    assert float(network.error(wrong, english)) == pytest.approx(0, abs=1e-6)
    outputs = network(torch.randn(2, 3, 2, WIDTH), torch.zeros(2, 3, dtype=torch.bool))
    assert {name: tuple(value.shape) for name, value in outputs.items()} == {n: (2, *s) for n, s in shapes.items()}


def test_windows_begin_at_words_and_unspaced_characters() -> None:
    assert windows("两只cat, ok", 2) == [["两", "两只"], ["只", "只cat"], ["cat", "cat,"], [",", ", ok"], ["ok", "ok"]]
    assert windows("", 2) == [["", ""]]


def test_vectors_of_a_text_do_not_depend_on_longer_ones_beside_it() -> None:
    vectors, padding = piece_vectors(ToySentence(), ["lan", "hong lan huang"], 2)
    alone, _ = piece_vectors(ToySentence(), ["lan"], 2)
    assert vectors.shape == (2, 3, 2, WIDTH)
    assert torch.equal(vectors[0, :1], alone[0])
    assert padding.tolist() == [[False, True, True], [False] * 3]
    torch.manual_seed(0)
    network = StateMap(config(), WIDTH, {"text": (4, 8)}).eval()
    with torch.no_grad():
        padded = network(vectors, padding)["text"][0]
        torch.testing.assert_close(padded, network(alone, padding[:1, :1])["text"][0], atol=1e-5, rtol=0)


def test_other_and_damaged_adapters_are_refused(trained: Path, tiny_pipeline: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_pipeline, other)
    words = other / "tokenizer" / "vocab.txt"
    words.write_text(words.read_text() + "dog\n")
    with pytest.raises(UserError, match="give the teacher that it was trained for"):
        load_adapter(trained, read_folder(other), ToySentence())
    with pytest.raises(UserError, match=r"holds no adapter\.json"):
        api.sample("lan", out=tmp_path / "a.png", teacher=tiny_pipeline, adapter=tmp_path)
    with pytest.raises(UserError, match="trained on toy, not on fast-universal"):
        load_adapter(trained, read_folder(tiny_pipeline))
    broken = tmp_path / "broken"
    shutil.copytree(trained, broken)
    record = json.loads((broken / RECORD).read_text())
    (broken / RECORD).write_text(json.dumps({**record, "weights_sha256": "1" * 64}))
    with pytest.raises(UserError, match="is not the file"):
        load_adapter(broken, read_folder(tiny_pipeline), ToySentence())
    del record["shapes"]
    (broken / RECORD).write_text(json.dumps({**record, "captions": ["a red disc"]}))
    with pytest.raises(UserError, match="train a new one with fewstep train-adapter"):
        load_adapter(broken, read_folder(tiny_pipeline), ToySentence())


def test_scene_pairs_agree_and_hold_nothing_held_out() -> None:
    pairs = text_pairs()
    chinese_words = {word for name in heldout.chinese_concepts() for word in CONCEPTS[name].chinese}
    sources = [pairs[index].source for index in range(400)]
    assert [pairs[index] for index in (7, 3)] == [ScenePairs()[index] for index in (7, 3)]
    for index in range(400):
        source, target = pairs[index]
        language = "english" if source.isascii() else "chinese"
        claim = read(source, language)
        assert claim == read(target, "english")
        if language == "chinese":
            assert not any(concept in heldout.chinese_concepts() for concept, _ in claim.things)
            assert not {(concept, claim.colour) for concept, _ in claim.things} & heldout.chinese_colours()
    assert 0.5 < sum(not source.isascii() for source in sources) / 400 < 0.7
    held = held_out_pairs(20)
    assert all(any(word in pair.source for word in chinese_words) for pair in held["held-out nouns"])
    for pair in held["held-out combinations"]:
        claim = read(pair.target, "english")
        assert {(concept, claim.colour) for concept, _ in claim.things} & heldout.chinese_colours()


@pytest.mark.parametrize(
    "line",
    ['{"source": "a", "target": "b", "target": "c"}', '{"source": "a", "target": "\\ud800"}', "[" * 9999, "9" * 5000],
)
def test_lines_of_pairs_that_are_no_json_are_refused(tmp_path: Path, line: str) -> None:
    (tmp_path / "p.jsonl").write_text(json.dumps({"source": "a", "target": "b"}) + f"\n{line}\n")
    with pytest.raises(UserError, match=r"p\.jsonl.*line 2"):
        read_pairs(tmp_path / "p.jsonl")


def test_the_names_of_columns_are_no_pair(tmp_path: Path) -> None:
    (tmp_path / "p.tsv").write_text("source\ttarget\nein Hund\ta dog\nsource\ttarget\n")
    assert read_pairs(tmp_path / "p.tsv") == (Pair("ein Hund", "a dog"), Pair("source", "target"))


def test_pair_files(tmp_path: Path) -> None:
    tabbed, lined = tmp_path / "a.tsv", tmp_path / "a.jsonl"
    tabbed.write_text("章鱼\toctopus\n\n狗 \t dog\n", encoding="utf-8")
    lined.write_text('{"source": "章鱼", "target": "octopus"}\n{"source": "狗", "target": "dog"}\n', encoding="utf-8")
    assert read_pairs(tabbed) == read_pairs(lined) == (("章鱼", "octopus"), ("狗", "dog"))
    for name, text, words in (
        ("b.tsv", "章鱼 octopus\n", "line 1"),
        ("b.tsv", "a\tb\n\nc\t\n", "line 3"),
        ("b.jsonl", '{"source": 3, "target": "x"}\n', "line 1"),
        ("b.tsv", "\n", "no pair"),
        ("b.csv", "a,b", "must end in"),
    ):
        (tmp_path / name).write_text(text, encoding="utf-8")
        with pytest.raises(UserError, match=words):
            read_pairs(tmp_path / name)


def test_the_sentence_encoder_finds_english_from_chinese() -> None:
    sentence = UniversalSentence()
    names = ("octopus", "dog", "train", "apple", "umbrella")
    vectors = sentence(["章鱼", "狗", "火车", "苹果", "雨伞"])
    assert (vectors @ sentence(names).T).argmax(1).tolist() == [0, 1, 2, 3, 4]
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    np.testing.assert_array_equal(vectors[1:2], sentence(["狗"]))  # whatever is beside it


def test_the_ratio_and_its_interval() -> None:
    draw = generator(0, "test")
    theirs: Array = 0.6 + 0.1 * draw.standard_normal(400)
    ours: Array = 0.8 * theirs + 0.05 * draw.standard_normal(400)
    assert ratio_figure(ours, np.zeros(400), 0) is None
    figure = ratio_figure(ours, theirs, 0)
    assert figure is not None
    assert figure.low is not None
    assert figure.high is not None
    assert figure.low < 0.8 < figure.high
    # delta method: sd(ours - r theirs) / (mean(theirs) sqrt(n)), 1.96 of it either side
    width = 1.96 * np.std(ours - figure.value * theirs) / theirs.mean() / 20
    assert (figure.high - figure.low) / 2 == pytest.approx(width, rel=0.15)
