"""Prompts of other languages: pairs that leak nothing, an adapter that learns them, and drawing with it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import fewstep as api
from fewstep.backbones.pipeline_folder import read_folder
from fewstep.common.errors import UserError
from fewstep.common.rng import generator
from fewstep.evaluation.metric import Array
from fewstep.inference.generator import load_image_generator
from fewstep.inference.multilingual.adapter import Adapter, SentenceMap, load_adapter
from fewstep.inference.multilingual.pairs import Pair, read_pairs
from fewstep.inference.multilingual.record import RECORD, WEIGHTS
from fewstep.inference.multilingual.sentence import UniversalSentence, Vectors
from fewstep.inference.multilingual.settings import AdapterConfig
from fewstep.inference.multilingual.train import train_adapter
from fewstep.training.config import LoopConfig
from fewstep_worlds.emoji8.translations import Words, chinese, chinese_pairs, leaks
from fewstep_worlds.studies import api as world_api
from fewstep_worlds.studies.chinese import ratio_figure

CAPTIONS = ("a red disc", "a blue ring", "a green bar", "a yellow square")
TURNED = ("hong", "lan", "lü", "huang")
WIDTH = 16


class ToySentence:
    """English captions along axes; each word of the other language along the next one's axis: wrong until learned."""

    name, sha256, width = "toy", "0" * 64, WIDTH

    def __call__(self, texts: Sequence[str]) -> Vectors:
        vectors = np.zeros((len(texts), WIDTH), np.float32)
        for row, text in enumerate(texts):
            if text in CAPTIONS:
                vectors[row, CAPTIONS.index(text)] = 1
            else:
                number = TURNED.index(text)
                vectors[row, [(number + 1) % 4, 4 + number]] = (0.8, 0.6)
        return vectors


PAIRS = (*map(Pair, TURNED, CAPTIONS), *map(Pair, CAPTIONS, CAPTIONS))


@pytest.mark.slow
def test_chinese_beside_english_by_one_command(tmp_path: Path) -> None:
    """`fewstep chinese` on a sixth of its concepts: the table's figures are those of the drawn pictures."""
    words = ["concepts=20", "noises=1", "steps=2", "teacher_steps=2", "training.loop.steps=2", "shown=3"]
    table = world_api.chinese(out=tmp_path, overrides=words)
    found = json.loads((tmp_path / "chinese.json").read_text(encoding="utf-8"))
    lines = {(line["drawer"], line["form"]): line for line in found["lines"]}
    assert len(lines) == 6
    for drawer in ("student", "teacher"):
        english, own = lines[drawer, "English"], lines[drawer, "Chinese"]
        assert english["agreement"]["value"] > 0.5, "an English prompt gives its picture"
        assert own["agreement"]["value"] > 0.25, "and mostly so in Chinese; strangers are below .1"
        assert own["ratio"]["value"] == pytest.approx(own["agreement"]["value"] / english["agreement"]["value"])
        assert own["ratio"]["low"] < own["ratio"]["value"] < own["ratio"]["high"]
        assert "ratio" not in english
    assert "of 20." in found["note"]
    assert found["note"] in table.read_text(encoding="utf-8")
    before = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "pictures").iterdir()}
    world_api.chinese(out=tmp_path, overrides=words)
    assert before == {file.name: file.stat().st_mtime_ns for file in (tmp_path / "pictures").iterdir()}, "kept"


def config(**changes: object) -> AdapterConfig:
    plain = AdapterConfig(anchor=0.001, noise=0.1, loop=LoopConfig(steps=60, batch=8, save_every=20, log_every=10))
    return plain.model_copy(update={"optim": plain.optim.model_copy(update={"lr": 2e-2}), **changes})


@pytest.fixture(scope="module")
def trained(tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("adapter")
    train_adapter(config(), read_folder(tiny_pipeline), PAIRS, out, sentence=ToySentence(), quiet=True)
    return out / "adapter"


def found(adapter: Adapter, prompts: Sequence[str]) -> list[str]:
    return [adapter.captions[int(row)] for row in adapter.shares(prompts)[0][:, 0]]


def test_pairs_are_learned_and_english_stays(trained: Path, tiny_pipeline: Path) -> None:
    adapter = load_adapter(trained, read_folder(tiny_pipeline), ToySentence())
    before = replace(adapter, network=SentenceMap(WIDTH))
    assert found(before, TURNED) == [*CAPTIONS[1:], CAPTIONS[0]]
    assert found(adapter, TURNED) == list(CAPTIONS)
    assert found(adapter, CAPTIONS) == list(CAPTIONS)


def test_states_are_those_of_captions_mixed_by_likeness(trained: Path, tiny_pipeline: Path) -> None:
    folder = read_folder(tiny_pipeline)
    adapter = load_adapter(trained, folder, ToySentence())
    image_generator = load_image_generator(tiny_pipeline)
    own = image_generator.backbone.encode(CAPTIONS)["text"]
    states = adapter.encode(TURNED, image_generator.backbone.encode)["text"]
    torch.testing.assert_close(states, own, atol=1e-5, rtol=0)
    mixed = replace(adapter, config=adapter.config.model_copy(update={"mixed": 3, "temperature": 0.2}))
    q = adapter.network(torch.from_numpy(adapter.sentence(["lan"])))[0]
    best, rows = (adapter.keys @ q).topk(3)
    weights = (best / 0.2).softmax(0)
    by_hand = sum(w * own[CAPTIONS.index(adapter.captions[int(r)])] for w, r in zip(weights, rows, strict=True))
    assert 0.01 < weights[1] < weights[0] < 1
    torch.testing.assert_close(
        mixed.encode(["lan"], image_generator.backbone.encode)["text"][0], by_hand, atol=1e-5, rtol=0
    )


def test_drawing_with_an_adapter_is_drawing_with_its_states(trained: Path, tiny_pipeline: Path) -> None:
    plain = load_image_generator(tiny_pipeline)
    image_generator = replace(plain, adapter=load_adapter(trained, read_folder(tiny_pipeline), ToySentence()))
    sampling = plain.sampling.model_copy(update={"steps": 2, "omega": 2.0})  # guided: the null prompt is the teacher's
    pictures = image_generator.draw(["lan", "hong"], [3, 4], sampling)
    states = image_generator.encode(["lan", "hong"])
    by_hand = plain.backbone.to_pictures(plain.latents(states, [3, 4], sampling))
    np.testing.assert_array_equal(pictures, by_hand)
    assert (pictures != image_generator.draw(["hong", "lan"], [3, 4], sampling)).any()


def test_a_resumed_adapter_equals_an_uninterrupted_one(trained: Path, tiny_pipeline: Path, tmp_path: Path) -> None:
    folder = read_folder(tiny_pipeline)

    class StopError(Exception):
        pass

    import fewstep.inference.multilingual.train as module

    calls, plain = 0, module.adapter_loss

    def stopping(*args: object) -> object:
        nonlocal calls
        calls += 1
        if calls == 47:
            raise StopError
        return plain(*args)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "adapter_loss", stopping)
        with pytest.raises(StopError):
            train_adapter(config(), folder, PAIRS, tmp_path, sentence=ToySentence(), quiet=True)
    assert not (tmp_path / "adapter").exists()
    train_adapter(config(), folder, PAIRS, tmp_path, sentence=ToySentence(), quiet=True)
    assert (tmp_path / "adapter" / WEIGHTS).read_bytes() == (trained / WEIGHTS).read_bytes()
    with pytest.raises(UserError, match="another pairs"):
        train_adapter(config(), folder, PAIRS[:5], tmp_path, sentence=ToySentence(), quiet=True)


def test_another_teacher_and_damaged_folders_are_refused(trained: Path, tiny_pipeline: Path, tmp_path: Path) -> None:
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
    record["weights_sha256"] = "1" * 64
    (broken / RECORD).write_text(json.dumps(record))
    with pytest.raises(UserError, match="is not the file"):
        load_adapter(broken, read_folder(tiny_pipeline), ToySentence())


def test_nothing_held_out_is_in_a_pair() -> None:
    words = Words.load()
    pairs = chinese_pairs(words)
    english = {record.name for record in (*words.train, *words.test, *words.validation)}
    sources = [pair.source for pair in pairs if pair.source not in english]
    assert len(sources) > 3000
    entries = {entry for source in sources for entry in source.split("，")}
    for record in (*words.test, *words.validation, *words.unseen):
        for held in chinese(record):
            assert held not in entries
            assert len(held) == 1 or not any(held in source for source in sources)
    targets = {pair.target for pair in pairs}
    assert targets == english
    assert not {record.name for record in words.unseen} & targets
    groups = [{record.concept for record in part} for part in (words.train, words.test, words.validation, words.unseen)]
    assert [len(group) for group in groups] == [1180, 120, 60, 60]
    assert len(set().union(*groups)) == 1420


def test_a_leak_is_a_whole_entry_or_a_longer_word_inside() -> None:
    assert leaks("手", ["手"])
    assert not leaks("手套", ["手"])
    assert leaks("热狗店", ["热狗"])
    assert not leaks("热", ["热狗"])


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
    figure = ratio_figure(ours, theirs, 0)
    assert figure.low is not None
    assert figure.high is not None
    assert figure.low < 0.8 < figure.high
    # delta method: sd(ours - r theirs) / (mean(theirs) sqrt(n)), 1.96 of it either side
    width = 1.96 * np.std(ours - figure.value * theirs) / theirs.mean() / 20
    assert (figure.high - figure.low) / 2 == pytest.approx(width, rel=0.15)
