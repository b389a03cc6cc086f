"""Data of a run: identified by content, encoded as far as it is used, shared with other runs."""

from __future__ import annotations

import os
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load

from fewstep.backbones.base import Backbone
from fewstep.backbones.sd import StableDiffusion
from fewstep.common.errors import UserError
from fewstep.common.rng import KeyedRng, order
from fewstep.data.images import Captioned, HeldPictures
from fewstep.data.latents import identify, used
from fewstep.distillation import distill as distillation
from fewstep.distillation import estimate as cost
from fewstep.distillation import prepare as preparation
from fewstep.distillation.config import resolve
from fewstep.distillation.estimate_run import estimate_run
from fewstep.training import run_folder
from support import tiny_pipelines
from support.shapes import COLOURS, SHAPES, draw_shape


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher in `sd` and 16 captioned pictures in `pics`."""
    folder = tmp_path_factory.mktemp("shared")
    tiny_pipelines.sd(folder / "sd")
    write_pictures(folder / "pics")
    return folder


def write_pictures(folder: Path) -> None:
    folder.mkdir()
    for colour in COLOURS:
        for shape in SHAPES:
            Image.fromarray(draw_shape(colour, shape)).save(folder / f"{colour}-{shape}.png")
            (folder / f"{colour}-{shape}.txt").write_text(f"a {colour} {shape}")


def go(out: Path, place: Path, *words: str, source: Path | str = "", quiet: bool = True) -> bytes:
    """Distil for a few steps through the user's cache; the student's bytes."""
    changes = [
        f"teacher={place / 'sd'}", f"data.source={source or place / 'pics'}", "data.size=32", "device=cpu",
        "student.rank=2", "student.targets=[to_q]", "loop.steps=2", "loop.batch=2", "loop.log_every=1",
        "loop.validate_every=null", *words,
    ]  # fmt: skip
    return distillation.distill(resolve("tcd", None, changes), out, quiet=quiet).read_bytes()


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, int]:
    """How many pictures and prompts are encoded from here on, in a cache of one's own."""
    counts = {"pictures": 0, "prompts": 0}
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "own cache"))
    to_latents, encode = Backbone.to_latents, StableDiffusion.encode

    def counting_pictures(self: Backbone, pictures: np.ndarray) -> Any:
        counts["pictures"] += len(pictures)
        return to_latents(self, pictures)

    def counting_prompts(self: StableDiffusion, prompts: Any, *more: Any) -> Any:
        counts["prompts"] += len([prompt for prompt in prompts if prompt])
        return encode(self, prompts, *more)

    monkeypatch.setattr(Backbone, "to_latents", counting_pictures)
    monkeypatch.setattr(StableDiffusion, "encode", counting_prompts)
    return counts


@pytest.mark.slow
def test_runs_share_what_they_encode(
    encoded: dict[str, int], place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A short run encodes the batches that it uses, and a second one nothing; students are those of a whole set."""
    monkeypatch.setattr("fewstep.backbones.base.at_once", lambda _: 4)
    monkeypatch.setattr("fewstep.data.latents.CHUNK", 8)
    first = go(tmp_path / "a", place)
    assert 0 < encoded["pictures"] <= 4 * 2
    assert encoded["prompts"] <= 16
    encoded.update(pictures=0, prompts=0)
    assert go(tmp_path / "b", place) == first
    assert encoded == {"pictures": 0, "prompts": 0}
    longer = go(tmp_path / "a", place, "loop.steps=24")
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "another cache"))
    assert go(tmp_path / "c", place, "loop.steps=24") == longer
    whole = distillation.distill(  # everything encoded beforehand, as it was once
        resolve("tcd", None, words_of(tmp_path / "c")),
        tmp_path / "d",
        cache=all_of(place, tmp_path),
        quiet=True,
    )
    assert whole.read_bytes() == longer


def words_of(out: Path) -> list[str]:
    import yaml

    config = yaml.safe_load((out / "config.yaml").read_text())
    loop = [f"loop.{name}={config['loop'][name]}" for name in ("steps", "batch", "log_every")]
    student = ["student.rank=2", "student.targets=[to_q]"]
    return [
        f"teacher={config['teacher']}", f"data.source={config['data']['source']}", "data.size=32", "device=cpu",
        "loop.validate_every=null", *loop, *student,
    ]  # fmt: skip


def all_of(place: Path, tmp_path: Path) -> Path:
    """A cache that holds every picture and caption."""
    cache = tmp_path / "all"
    config = resolve("tcd", None, words_of(tmp_path / "c"))
    preparation.prepare(config, cache, torch.device("cpu"))
    return cache


@pytest.mark.parametrize("empty", [0.0, 0.5])
def test_the_items_that_a_run_will_read_are_predicted(
    empty: float, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only encoded items are read, with a caption of several drawn and some left out."""
    pictures = np.zeros((40, 8, 8, 3), np.uint8)
    data = Captioned(HeldPictures(pictures), [[f"{i} {j}" for j in range(3)] for i in range(40)])
    of = identify(data, "w")
    wanted = used(of, partial(order, 0, 40), range(3, 8), 4, 0, empty)
    assert wanted.pictures is not None
    assert wanted.captions is not None
    assert set(wanted.pictures.tolist()) == set(order(0, 40, 12, 32).tolist())
    owners = {int(of.prompts[row].split()[0]) for row in wanted.captions.tolist()}
    assert owners <= set(wanted.pictures.tolist())
    assert (owners == set(wanted.pictures.tolist())) == (empty == 0)
    assert used(of, partial(order, 0, 40), range(200), 4, 0, empty) == (None, None)
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / f"cache {empty}"))
    go(tmp_path / "run", place, f"data.empty_prompts={empty}")
    go(tmp_path / "run", place, f"data.empty_prompts={empty}", "loop.steps=5")


def test_stored_trajectories_need_no_picture(encoded: dict[str, int], place: Path, tmp_path: Path) -> None:
    config = resolve("kd", None, [
        f"teacher={place / 'sd'}", f"data.source={place / 'pics'}", "data.size=32", "device=cpu", "student.rank=2",
        "student.targets=[to_q]", "loop.steps=2", "loop.batch=2", "loop.validate_every=null", "data.trajectories=3",
        "method.grid=10", "method.k=9", "sampling.grid=10",
    ])  # fmt: skip
    distillation.distill(config, tmp_path / "run", quiet=True)
    assert encoded["pictures"] == 0
    assert encoded["prompts"] <= 16


def test_the_estimate_comes_before_anything_is_encoded(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))
    plain, stored = distillation.estimate_stage, []

    def noting(*args: Any, **options: Any) -> Any:
        stored.append([*(tmp_path / "cache").rglob("*.safetensors")])
        return plain(*args, **options)

    monkeypatch.setattr(distillation, "estimate_stage", noting)
    first = go(tmp_path / "a", place, quiet=False)
    assert stored == [[]]
    assert capsys.readouterr().err.count("time     ") == 1
    assert go(tmp_path / "b", place, quiet=False) == first
    assert len(stored) == 1, "nothing was left to encode"
    assert capsys.readouterr().err.count("time     ") == 1


def test_a_cache_that_cannot_be_written_is_the_runs_own(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "file"))
    go(tmp_path / "run", place)
    assert list((tmp_path / "run" / "cache").glob("latents-*/*.safetensors"))


# ---- the same data, and other data


def same_weights(one: bytes, other: bytes) -> None:
    """Two LoRA files hold equal tensors."""
    first, second = load(one), load(other)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_path_may_be_spelled_anyhow(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The teacher's, the pictures' and the start's; a copy elsewhere is the same too."""
    monkeypatch.chdir(place)
    start = tmp_path / "start"
    go(start, place)
    shutil.copytree(place / "pics", tmp_path / "copy")
    shutil.copytree(place / "sd", tmp_path / "teacher")
    student = start / "student" / "pytorch_lora_weights.safetensors"
    first = go(tmp_path / "run", place, f"student.start={student}")
    for source, teacher, begun in (
        ("pics", "sd", student),
        ("pics/", "./sd", os.path.relpath(student)),
        ("./pics/../pics", tmp_path / "teacher", student.parent),
        (tmp_path / "copy", f"{place}/sd/", student),
    ):
        words = [f"teacher={teacher}", f"student.start={begun}"]
        again = go(tmp_path / "run", place, *words, source=source)
        same_weights(again, first)  # the metadata names the teacher as it was given
    with pytest.raises(UserError, match=r"another start"):
        go(tmp_path / "run", place)
    other = tiny_pipelines.sd(tmp_path / "other", "v_prediction")
    with pytest.raises(UserError, match=r"another teacher"):
        go(tmp_path / "run", place, f"teacher={other}")  # a start of the first teacher does not fit the other
    assert go(tmp_path / "run", place, f"student.start={student}") == first


def caption(folder: Path) -> None:
    (folder / "red-disc.txt").write_text("another")


def picture(folder: Path) -> None:
    for name in ("red-disc", "blue-bar"):
        Image.fromarray(draw_shape("green", "disc")).save(folder / f"{name}.png")


def fewer(folder: Path) -> None:
    (folder / "red-disc.png").unlink()
    (folder / "red-disc.txt").unlink()


def renamed(folder: Path) -> None:
    for suffix in ("png", "txt"):
        (folder / f"red-disc.{suffix}").rename(folder / f"a.{suffix}")


@pytest.mark.parametrize(
    ("change", "words", "reasons"),
    [
        (caption, [], [r"captions \(1 of 16 changed\)"]),
        (picture, [], [r"pictures \(2 of 16 changed\)"]),
        (fewer, [], [r"pictures \(1 removed; 16 before, now 15\)", r"captions \(1 removed"]),
        (renamed, [], [r"pictures \(in another order\)", r"captions \(in another order\)"]),
        (None, ["data.buckets=true"], [r"data\.buckets"]),
        (None, ["data.size=64"], [r"data\.size"]),
    ],
)
def test_what_changed_in_the_data_is_named_and_counted(
    change: Any, words: list[str], reasons: list[str], place: Path, tmp_path: Path
) -> None:
    write_pictures(tmp_path / "pics")
    go(tmp_path / "run", place, source=tmp_path / "pics")
    before = (tmp_path / "run" / "config.yaml").read_bytes()
    if change:
        change(tmp_path / "pics")
    for reason in reasons:
        with pytest.raises(UserError, match=reason) as error:
            go(tmp_path / "run", place, *words, source=tmp_path / "pics")
        assert "encoders" not in str(error.value)
    assert (tmp_path / "run" / "config.yaml").read_bytes() == before


def test_runs_of_older_versions_go_on(place: Path, tmp_path: Path) -> None:
    """Their inputs name no parts of the data."""
    from fewstep.common.files import read_json, write_json

    go(tmp_path / "run", place)
    inputs = read_json(tmp_path / "run" / run_folder.INPUTS)
    write_json(tmp_path / "run" / run_folder.INPUTS, {name: inputs[name] for name in ("teacher", "data")})
    go(tmp_path / "run", place, "loop.steps=3")
    write_json(tmp_path / "run" / run_folder.INPUTS, {"teacher": inputs["teacher"], "data": "latents-0 captions-0"})
    with pytest.raises(UserError, match="another data"):
        go(tmp_path / "run", place, "loop.steps=3")


# ---- memory


@pytest.mark.slow
@pytest.mark.parametrize(("batch", "accumulate"), [(10**9, 1), (10**6, 1), (10**6, 10)])
def test_a_batch_beyond_memory_is_refused_before_the_first_step(
    batch: int, accumulate: int, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cost, "free_memory", lambda _: 2**28)
    words = [f"loop.batch={batch}", f"loop.accumulate={accumulate}"]
    config = resolve("tcd", None, [*words_of(settled(place, tmp_path)), *words])
    (estimated,) = estimate_run(config)
    assert "loop.accumulate" in estimated.too_large
    assert estimated.too_large in "\n".join(estimated.lines())
    assert estimated.saved_bytes > 2**28
    with pytest.raises(UserError, match=r"^loop\.batch = "):
        go(tmp_path / "run", place, *words, quiet=False)
    if batch < 10**9:
        legal = int(estimated.too_large.split("loop.accumulate = ")[2].split(",")[0])
        less = resolve("tcd", None, [*words_of(settled(place, tmp_path)), *words, f"loop.accumulate={legal}"])
        assert estimate_run(less)[0].too_large == ""


def test_a_batch_beyond_much_memory_is_timed_by_a_few_samples(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []

    def rng(seed: int, step: int, samples: tuple[int, ...], device: torch.device) -> KeyedRng:
        sizes.append(len(samples))
        return KeyedRng(seed, step, samples[: cost.TIMED], device)

    monkeypatch.setattr(cost, "KeyedRng", rng)
    monkeypatch.setattr(cost, "free_memory", lambda _: 2**32)
    config = resolve("tcd", None, [*words_of(settled(place, tmp_path)), "loop.batch=1000000000"])
    assert estimate_run(config)[0].too_large
    assert max(sizes) <= cost.TIMED


def settled(place: Path, tmp_path: Path) -> Path:
    if not (tmp_path / "settled").exists():
        go(tmp_path / "settled", place)
    return tmp_path / "settled"


def test_activations_are_extrapolated_from_a_part(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [*words_of(settled(place, tmp_path)), "loop.batch=32"]
    (whole,) = estimate_run(resolve("tcd", None, words))
    monkeypatch.setattr(cost, "free_memory", lambda _: whole.saved_bytes // 2)
    (part,) = estimate_run(resolve("tcd", None, words))
    assert part.too_large
    assert whole.too_large == ""
    assert part.saved_bytes == pytest.approx(whole.saved_bytes, rel=0.1)


def test_a_rank_beyond_memory_is_refused(place: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^student\.rank = "):
        go(tmp_path / "run", place, f"student.rank={10**10}")
