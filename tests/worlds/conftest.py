"""A small world of sticker scenes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from fewstep_worlds.common import location
from fewstep_worlds.stickers import world
from fewstep_worlds.stickers.sprites import FOLDER_VARIABLE
from support.pooled import Pooled
from support.sticker_world import PROMPTS, make_world


@pytest.fixture
def small_world(
    sticker_sheets: Path, tiny_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Path]:
    """The bundled world with a tiny random teacher and reader, few scenes and short lists."""
    place = make_world(tmp_path / "world", sticker_sheets, tiny_pipeline)
    monkeypatch.setenv(location.ENVIRONMENT, str(place))
    monkeypatch.delenv(FOLDER_VARIABLE, raising=False)
    monkeypatch.setattr(world, "SCENES", PROMPTS)
    lists = {name: replace(own, count=PROMPTS) for name, own in world.LISTS.items()}
    monkeypatch.setattr(world, "LISTS", lists)
    for study in ("comparison", "chinese"):
        monkeypatch.setattr(f"fewstep_worlds.studies.{study}.Lite0Features", Pooled)
    stored = (world.read_prompts, world._captions)
    for function in stored:
        function.cache_clear()
    yield place
    for function in stored:
        function.cache_clear()
