"""Emoji-8: the folder matches its metadata, and nothing held out leaks into training."""

from __future__ import annotations

import json
import re
import subprocess
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fewstep.common.errors import UserError
from fewstep_worlds.common import location
from fewstep_worlds.emoji8 import dataset as emoji8
from fewstep_worlds.emoji8.dataset import Emoji8, Record


@pytest.fixture(scope="module")
def world() -> Emoji8:
    return emoji8.load(emoji8.SPLITS)


def own_words(file: str) -> list[dict[str, str]]:
    entries: list[dict[str, str]] = json.loads((emoji8.folder() / file).read_text(encoding="utf-8"))
    return entries


def families_in_train(world: Emoji8) -> dict[str, set[str]]:
    seen: dict[str, set[str]] = defaultdict(set)
    for record in world.records:
        if record.split == "train":
            seen[record.concept].add(record.family)
    return seen


def test_counts(world: Emoji8) -> None:
    assert world.pictures.shape == (9301, 64, 64, 3)
    assert world.pictures.dtype == np.uint8
    assert len({record.id for record in world.records}) == len(world)
    assert len({record.concept for record in world.records}) == 1420
    assert Counter(r.split for r in world.records) == {
        "train": 8346,
        "heldout-concept": 451,
        "heldout-pair": 504,
    }
    assert len({r.name.lower() for r in world.records}) == 1420, "two concepts share a name"
    for record in world.records:
        assert record.name
        assert record.name_zh
        assert record.group not in ("symbols", "flags", "component")
        assert record.family == emoji8.STYLE_FAMILY[record.style]


def test_sheets_hold_exactly_the_recorded_tiles(world: Emoji8) -> None:
    for style in emoji8.STYLE_FAMILY:
        rows = [i for i, r in enumerate(world.records) if r.style == style]
        path = emoji8.folder() / f"{style}.webp"
        assert [world.records[i].tile for i in rows] == list(range(len(rows)))
        assert path.stat().st_size < 15 * 2**20
        with Image.open(path) as image:
            whole_rows = -(-len(rows) // emoji8.COLUMNS)
            assert image.size == (emoji8.COLUMNS * emoji8.SIZE, whole_rows * emoji8.SIZE)
        if style == "fxemoji":
            tiles = emoji8.read_sheet(path)
            assert np.array_equal(tiles[: len(rows)], world.pictures[rows])
            assert (tiles[len(rows) :] == 255).all(), "a picture beyond the recorded ones"


def test_held_out_concepts_are_whole_and_spread(world: Emoji8) -> None:
    seen = families_in_train(world)
    held = {r.concept for r in world.records if r.split == "heldout-concept"}
    assert len(held) == 60
    assert not held & set(seen)
    assert not held & {r.concept for r in world.records if r.split == "heldout-pair"}
    families: dict[str, set[str]] = defaultdict(set)
    for record in world.records:
        families[record.concept].add(record.family)
    assert all(len(families[concept]) >= 4 for concept in held)
    groups = Counter(r.group for r in world.records if r.concept in held)
    assert set(groups) == {r.group for r in world.records}


def test_held_out_pairs_are_whole_families_seen_elsewhere(world: Emoji8) -> None:
    seen = families_in_train(world)
    pairs = {(r.concept, r.family) for r in world.records if r.split == "heldout-pair"}
    assert len(pairs) == 300
    for concept, family in pairs:
        assert family not in seen[concept]
        assert len(seen[concept]) >= 2
    for record in world.records:
        assert ((record.concept, record.family) in pairs) == (record.split == "heldout-pair")


def test_no_held_out_picture_has_a_twin_in_training(world: Emoji8) -> None:
    small = world.pictures.reshape(-1, 16, 4, 16, 4, 3).mean(axis=(2, 4), dtype=np.float32)
    small = small.reshape(len(world), -1) - 128  # near zero, so that the expanded square loses no digits
    for style in emoji8.STYLE_FAMILY:
        rows = [i for i, r in enumerate(world.records) if r.style == style]
        train = small[[i for i in rows if world.records[i].split == "train"]]
        held = small[[i for i in rows if world.records[i].split != "train"]]
        square = (held**2).sum(1)[:, None] + (train**2).sum(1) - 2 * held @ train.T
        # The nearest by design are the two horned faces, 29; drawings that are the same are under 1.
        assert square.min() / small.shape[1] > 20, style


def test_pictures_are_drawings_on_white(world: Emoji8) -> None:
    corners = world.pictures[:, [0, 0, -1, -1], [0, -1, 0, -1]].min(axis=(1, 2))
    assert (corners == 255).mean() > 0.93
    assert (world.pictures.min(axis=(1, 2, 3)) < 250).all(), "an empty picture"
    # A contact sheet cut one pixel off would still look white in the corners, but not in all of the rim.
    rim = np.concatenate([world.pictures[:, 0].ravel(), world.pictures[:, -1].ravel()])
    assert (rim == 255).mean() > 0.9


@pytest.mark.slow
def test_colours_are_the_recorded_levels(world: Emoji8) -> None:
    used = np.flatnonzero(np.bincount(world.pictures.ravel(), minlength=256))
    assert used.tolist() == [0, *range(7, 256, 8)]


def test_the_same_concept_in_two_fluent_styles_is_alike(world: Emoji8) -> None:
    place = {(r.style, r.concept): i for i, r in enumerate(world.records)}
    both = [c for s, c in place if s == "fluent-flat" and ("fluent-color", c) in place]
    flat = world.pictures[[place["fluent-flat", c] for c in both]].astype(np.float32)
    color = world.pictures[[place["fluent-color", c] for c in both]].astype(np.float32)
    same = ((flat - color) ** 2).mean(axis=(1, 2, 3))
    other = ((flat - np.roll(color, len(both) // 2, axis=0)) ** 2).mean(axis=(1, 2, 3))
    assert len(both) > 1300
    assert same.mean() < 0.4 * other.mean()
    assert (same < other).mean() > 0.97


def test_prompt_lists_are_disjoint_and_open(world: Emoji8) -> None:
    seen = families_in_train(world)
    concept = {r.name: r.concept for r in world.records}
    lists = {name: emoji8.read_prompts(name) for name in ("benchmark", "validation", "gamma", "heldout_concepts")}
    assert [len(prompts) for prompts in lists.values()] == [1000, 150, 150, 60]
    every = [prompt for prompts in lists.values() for prompt in prompts]
    assert len(set(every)) == len(every)
    assert all(len(seen[concept[p]]) >= 3 for p in lists["benchmark"])
    assert all(concept[p] in seen for p in lists["validation"] + lists["gamma"])
    assert {concept[p] for p in lists["heldout_concepts"]} == {
        r.concept for r in world.records if r.split == "heldout-concept"
    }
    pairs = emoji8.read_prompts("heldout_pairs")
    held = {emoji8.name_with_style(r) for r in world.records if r.split == "heldout-pair"}
    assert len(set(pairs)) == 300
    assert set(pairs) <= held


def all_fixed_captions(record: Record) -> tuple[str, ...]:
    """Return the captions of a record that need no draw, its style words and each single keyword.

    Every drawn caption is one of these pieces or some of them joined by ", ".
    """
    pieces = (emoji8.name_with_style(record), emoji8.name(record), emoji8.style_words(record.style), *record.keywords)
    return tuple(dict.fromkeys(pieces))


def words(text: str) -> set[str]:
    return set(re.findall(r"[^\W_]+", text.lower()))


def test_no_word_is_in_both_lists_of_own_words() -> None:
    taught, new = ({entry["word"] for entry in own_words(file)} for file in ("synonyms.json", "new_words.json"))
    assert not taught & new


@pytest.mark.parametrize("file", ["synonyms.json", "new_words.json"])
def test_own_words_occur_in_no_caption(world: Emoji8, file: str) -> None:
    synonyms = own_words(file)
    assert len(synonyms) == len({s["word"] for s in synonyms}) == len({s["concept"] for s in synonyms}) == 100
    pieces = {piece.lower() for r in world.records for piece in all_fixed_captions(r)}
    taken = set().union(*map(words, pieces))
    names = {r.concept: r.name for r in world.records if r.split == "train"}
    for synonym in synonyms:
        assert names[synonym["concept"]] == synonym["name"]
        assert synonym["word"] not in pieces
        assert not words(synonym["word"]) & taken, synonym
        assert not {word + "s" for word in words(synonym["word"])} & taken, synonym


def test_captions(world: Emoji8) -> None:
    octopus = next(r for r in world.records if r.id == "noto/1f419")
    generator = np.random.default_rng(0)
    assert emoji8.name(octopus) == "octopus"
    assert emoji8.name_with_style(octopus) == "octopus, noto style"
    assert emoji8.style_words("fluent-3d") == "fluent 3d style"
    for _ in range(50):
        chosen = emoji8.keywords(octopus, generator).split(", ")
        assert 2 <= len(set(chosen)) == len(chosen) <= 4
        assert set(chosen) <= set(octopus.keywords)
        assert emoji8.keywords_with_style(octopus, generator).endswith(", noto style")


def test_drawn_captions_keep_their_shares_and_their_pieces(world: Emoji8) -> None:
    record = next(r for r in world.records if r.id == "twemoji/1f419")
    generator = np.random.default_rng(1)
    drawn = [emoji8.draw_caption(record, generator) for _ in range(4000)]
    share = Counter("name, style" if c == "octopus, twemoji style" else "name" if c == "octopus" else "" for c in drawn)
    assert share["name, style"] / 4000 == pytest.approx(0.45, abs=0.03)
    assert share["name"] / 4000 == pytest.approx(0.30, abs=0.03)
    styled = sum(c.endswith("twemoji style") for c in drawn)
    assert styled / 4000 == pytest.approx(0.55, abs=0.03)
    fixed = all_fixed_captions(record)
    assert all(c in fixed or set(c.split(", ")) <= set(fixed) for c in set(drawn))


def test_caption_table_depends_on_seed_and_record_alone(world: Emoji8) -> None:
    records = world.records[:40]
    table = emoji8.caption_table(records, 6, seed=3)
    assert [len(row) for row in table] == [6] * 40
    assert emoji8.caption_table(records[::-1], 6, seed=3)[::-1] == table
    assert emoji8.caption_table(records[7:8], 4, seed=3)[0] == table[7][:4]
    assert emoji8.caption_table(records, 6, seed=4) != table
    with pytest.raises(UserError, match="variants"):
        emoji8.caption_table(records, 0, seed=3)


def test_a_record_without_keywords_still_has_captions(world: Emoji8) -> None:
    bare = Record(**{**vars(world.records[0]), "keywords": ()})
    generator = np.random.default_rng(0)
    assert emoji8.keywords(bare, generator) == emoji8.name_with_keywords(bare, generator) == bare.name
    assert emoji8.keywords_with_style(bare, generator) == emoji8.name_with_style(bare)


def test_licences_cover_every_source(world: Emoji8) -> None:
    place = emoji8.folder()
    attribution = (place / "ATTRIBUTION.md").read_text(encoding="utf-8")
    for source in {record.source for record in world.records}:
        assert f"`{source}`" in attribution
    for name, start in {
        "Apache-2.0": "Apache License",
        "CC-BY-4.0": "Creative Commons Attribution 4.0 International Public License",
        "MIT": "Permission is hereby granted, free of charge",
        "Unicode-3.0": "UNICODE LICENSE V3",
    }.items():
        assert start in (place / "LICENSES" / f"{name}.txt").read_text(encoding="utf-8")


def test_bad_input_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="'train'"):
        emoji8.load("trian")
    with pytest.raises(UserError, match="'gamma'"):
        emoji8.read_prompts("gama")
    monkeypatch.setenv(location.ENVIRONMENT, str(tmp_path / "none"))
    with pytest.raises(UserError, match="not a folder"):
        location.root()
    monkeypatch.setenv(location.ENVIRONMENT, str(tmp_path))
    assert location.root() == tmp_path
    with pytest.raises(UserError, match=r"pictures\.jsonl"):
        emoji8.load()


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("pictures.jsonl", '{"style": "noto"}\n', "'heldout-concept'"),
        ("pictures.jsonl", "{", "pictures.jsonl"),
        ("pictures.jsonl", '{"style":"noto","concepts":"0","heldout-concept":[],"heldout-pair":[]}\n', "'0'"),
        ("concepts.jsonl", "[]\n", "concepts.jsonl"),
        ("sources.json", "{}\n", "'noto'"),
        ("sources.json", None, "sources.json"),
    ],
)
def test_a_damaged_index_is_refused(
    file: str, text: str | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "emoji8").mkdir()
    for index in ("pictures.jsonl", "concepts.jsonl", "sources.json"):
        (tmp_path / "emoji8" / index).write_bytes((emoji8.folder() / index).read_bytes())
    if text is None:
        (tmp_path / "emoji8" / file).unlink()
    else:
        (tmp_path / "emoji8" / file).write_text(text, encoding="utf-8")
    monkeypatch.setenv(location.ENVIRONMENT, str(tmp_path))
    with pytest.raises(UserError, match="cannot read") as caught:
        emoji8.load_records()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_damaged_sheet_is_refused(tmp_path: Path) -> None:
    good = (emoji8.folder() / "fxemoji.webp").read_bytes()
    (tmp_path / "cut.webp").write_bytes(good[: len(good) // 2])
    Image.new("RGB", (100, 64)).save(tmp_path / "narrow.png")
    for name in ("cut.webp", "narrow.png", "missing.webp"):
        with pytest.raises(UserError, match=re.escape(name)):
            emoji8.read_sheet(tmp_path / name)


def test_what_is_tracked_stays_small() -> None:
    """Git keeps every version: 60 MiB together, 15 MiB a file."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        pytest.skip("not a checkout")
    listed = subprocess.run(["git", "-C", str(root), "ls-files", "-z"], capture_output=True, check=True).stdout
    sizes = [path.stat().st_size for name in listed.decode().split("\0") if name and (path := root / name).is_file()]
    assert sum(sizes) <= 60 * 2**20
    assert max(sizes) <= 15 * 2**20
