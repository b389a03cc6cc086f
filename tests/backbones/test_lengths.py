"""Words of prompts beyond what the text encoders read: found in every family, printed, counted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import fewstep as api
from fewstep.backbones.base import Backbone, load_backbone
from fewstep.backbones.lengths import CutPrompts
from fewstep.distillation import distill as distillation
from fewstep.distillation.config import resolve
from fewstep.distillation.estimate_run import estimate_run
from support import tiny_pipelines

NEW = [
    pytest.param(name, marks=pytest.mark.slow)
    for name in ("z_image", "qwen_image", "flux2", "chroma", "krea2", "anima")
]
KINDS = ["sd", "sdxl", "pixart", "sd3", "flux", "sana", *NEW]


@pytest.fixture(scope="module", params=KINDS)
def backbone(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    return load_backbone(getattr(tiny_pipelines, request.param)(tmp_path_factory.mktemp(request.param) / "pipe"))


def same(backbone: Backbone, first: str, second: str) -> bool:
    """Whether two prompts are one to the network."""
    one, other = (backbone.encode([prompt]) for prompt in (first, second))
    return all(torch.equal(one[name], other[name]) for name in one)


def test_what_is_lost_is_what_the_network_never_gets(backbone: Backbone) -> None:
    """Another word among what is lost changes nothing, to the bit; another one just before it changes the states."""
    most = max(backbone.lengths())
    short, long = "a red cat", "red cat " * most + "dog"
    assert backbone.lost_words([short, long, short])[::2] == ["", ""]
    (lost,) = backbone.lost_words([long])
    assert long.endswith(lost)
    words, first = long.split(), len(long[: -len(lost)].split())  # the word that it begins with or in
    beyond, within = ([*words[:at], "dog", *words[at + 1 :]] for at in (first + 1, first - 2))
    assert same(backbone, long, " ".join(beyond))
    assert not same(backbone, long, " ".join(within))


def test_cut_prompts_are_counted(backbone: Backbone) -> None:
    cut = CutPrompts(backbone)
    long = "cat " * max(backbone.lengths())
    cut([long + "red"])
    assert len(cut.lines()) == 1
    assert "red" in cut.lines()[0]
    cut(["a", "b"])
    cut([long + f"{i}" for i in range(9)])
    cut.add_up()
    assert (cut.count, cut.of) == (10, 12)
    assert "10 of 12 captions" in cut.lines("caption")[0]
    assert CutPrompts(backbone).lines() == []


@pytest.mark.slow
def test_sampling_and_distilling_report_cut_prompts(
    tiny_pipeline: Path, tiny_overrides: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Sampling reports the cut words; distilling a count, once: encoded captions are not counted again."""
    api.sample("a red disc " * 3 + "blue", teacher=tiny_pipeline, out=tmp_path / "a.png", settings={"steps": 1})
    assert "blue" in capsys.readouterr().err
    api.sample("a red disc", teacher=tiny_pipeline, out=tmp_path / "a.png", settings={"steps": 1})
    assert "cut" not in capsys.readouterr().err
    folder = tmp_path / "pictures"
    folder.mkdir()
    (source,) = [text.partition("=")[2] for text in tiny_overrides if text.startswith("data.source=")]
    for number, file in enumerate(sorted(Path(source).glob("*.png"))):
        (folder / file.name).write_bytes(file.read_bytes())
        (folder / file.with_suffix(".txt").name).write_text("a red disc " * (1 + 4 * (number < 3)) + str(number))
    (folder / ".thumbnails").mkdir()
    config = resolve("tcd", None, [*tiny_overrides, f"data.source={folder}", "loop.steps=1"])
    for first in (True, False):
        distillation.distill(config, tmp_path / f"run{first}", cache=tmp_path / "cache")
        printed = capsys.readouterr().err
        assert ("3 of 16 captions" in printed) == first
        assert "16 pictures with 16 captions; left out: 1 hidden" in printed
    (estimated,) = estimate_run(config)
    assert "16 pictures with 16 captions; left out: 1 hidden" in estimated.data
    assert estimated.data in estimated.lines()
