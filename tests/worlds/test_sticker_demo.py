"""The demo from end to end on sticker scenes, with a tiny teacher and a random reader."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fewstep_worlds.common import location
from fewstep_worlds.report.results import load_results
from fewstep_worlds.stickers import world
from fewstep_worlds.stickers.metrics import claim_of, in_category
from fewstep_worlds.stickers.reader import Reader, save_reader
from fewstep_worlds.stickers.settings import ReaderConfig
from fewstep_worlds.stickers.sprites import FOLDER_VARIABLE
from fewstep_worlds.studies import api, comparison, demo, sheets
from support.pooled import Pooled

CATEGORIES = ("single", "counting", "two", "position", "background", "style")


@pytest.mark.slow
def test_the_demo_runs_on_sticker_scenes(
    sticker_sheets: Path, tiny_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "world"
    place.mkdir()
    (place / location.STICKERS).symlink_to(sticker_sheets)
    (place / "teacher").symlink_to(tiny_pipeline)
    (place / "distill.yaml").write_text(
        "method: {guidance: {low: 1.0, high: 3.0}}\nstudent: {rank: 2, targets: [to_q, conv1]}\ndata: {captions: 1}\n"
    )
    torch.manual_seed(0)
    save_reader(Reader(ReaderConfig(channels=(8, 8, 8), blocks=(1, 1, 1))), place / "reader")
    monkeypatch.setenv(location.ENVIRONMENT, str(place))
    monkeypatch.delenv(FOLDER_VARIABLE, raising=False)
    monkeypatch.setattr(world, "SCENES", 40)
    monkeypatch.setattr(comparison, "Lite0Features", Pooled)
    monkeypatch.setattr(demo, "STEPS", (2, 4))
    monkeypatch.setattr(demo, "TEACHER_STEPS", 6)
    rows: list[int] = []
    spread = sheets.spread_rows
    monkeypatch.setattr(sheets, "spread_rows", lambda *given: rows.extend(spread(*given)) or rows)

    out = tmp_path / "demo"
    report = api.demo(out=out, overrides=["steps=2", "batch=2", "prompts=100", "shown=6"])
    results = load_results(out / "results.json")
    assert results.of("prompt") == ["scene accuracy"]
    assert {f"scene accuracy, {category}" for category in CATEGORIES} <= set(results.metrics)
    assert results.prompts == world.read_prompts("benchmark")[:100]
    for category, row in zip(CATEGORIES, rows, strict=True):
        assert in_category(category, claim_of(results.prompts[row]))
    page = report.read_text(encoding="utf-8")
    assert page.index(results.prompts[rows[0]]) < page.index("Before you read the figures")
