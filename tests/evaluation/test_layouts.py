"""Folders of GenEval, GenEval 2 and DPG-Bench, read back as their programs read them."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import fewstep as api
from fewstep.common.errors import UserError
from fewstep.common.files import read_json
from fewstep.evaluation.layouts import LAYOUTS
from fewstep.inference.generator import ImageGenerator, load_image_generator

PROMPTS = ["a red disc", "a blue ring", "two green bars"]
FEW: dict[str, Any] = {"steps": 2, "omega": 1.0}


@pytest.fixture
def sources(tmp_path: Path) -> dict[str, Path]:
    """Three prompts as each benchmark stores them."""
    records = [{"tag": "single_object", "include": [{"class": "disc", "count": 1}], "prompt": p} for p in PROMPTS]
    lines = tmp_path / "prompts.jsonl"
    lines.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    texts = tmp_path / "texts"
    texts.mkdir()
    for name, prompt in zip(("0", "10", "COCOval2014000000"), PROMPTS):
        (texts / f"{name}.txt").write_text(f"{prompt}\n", encoding="utf-8")
    return {"geneval": lines, "geneval2": lines, "dpg": texts}


def drawn(tiny_pipeline: Path, seeds: range, prompts: list[str]) -> np.ndarray:
    generator = load_image_generator(tiny_pipeline)
    return generator.draw(prompts, seeds, generator.sampling.model_copy(update=FEW))


def read(file: Path) -> np.ndarray:
    with Image.open(file) as image:
        return np.asarray(image.convert("RGB"))


def test_geneval_as_its_program_walks_it(sources: dict[str, Path], tiny_pipeline: Path, tmp_path: Path) -> None:
    """The walk of evaluation/evaluate_images.py."""
    place = api.draw_folder(
        "geneval", sources["geneval"], teacher=tiny_pipeline, lora=None, seed=5, out=tmp_path / "out", device="cpu",
        settings=FEW,
    )  # fmt: skip
    found: dict[str, list[np.ndarray]] = {}
    for subfolder in sorted(os.listdir(place)):
        assert (place / subfolder).is_dir()
        assert subfolder.isdigit()
        with open(place / subfolder / "metadata.jsonl") as stream:
            metadata = json.load(stream)
        names = sorted(os.listdir(place / subfolder / "samples"))
        assert all(re.match(r"\d+\.png", name) for name in names)
        found[metadata["prompt"]] = [read(place / subfolder / "samples" / name) for name in names]
        assert metadata["include"] == [{"class": "disc", "count": 1}]
    assert list(found) == PROMPTS
    expected = drawn(tiny_pipeline, range(5, 17), [prompt for prompt in PROMPTS for _ in range(4)])
    assert np.array_equal(np.concatenate(list(found.values())), expected)
    assert read_json(tmp_path / "out" / "settings.json")["sampling"]["steps"] == 2


def test_geneval2_maps_prompts_to_files(sources: dict[str, Path], tiny_pipeline: Path, tmp_path: Path) -> None:
    place = api.draw_folder(
        "geneval2", sources["geneval2"], teacher=tiny_pipeline, lora=None, out=tmp_path / "out", device="cpu",
        settings=FEW,
    )  # fmt: skip
    paths = read_json(place / "image_paths.json")
    assert list(paths) == PROMPTS
    found = np.stack([read(Path(paths[prompt])) for prompt in PROMPTS])
    assert np.array_equal(found, drawn(tiny_pipeline, range(3), PROMPTS))
    assert all(Path(path).is_absolute() for path in paths.values())


def test_dpg_grids_are_cut_as_its_program_cuts_them(
    sources: dict[str, Path], tiny_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def draw(out: Path, **changes: Any) -> Path:
        return api.draw_folder(
            "dpg", sources["dpg"], teacher=tiny_pipeline, lora=None, out=out, device="cpu", settings=FEW, **changes
        )

    place = draw(tmp_path / "out")
    side = 64
    assert sorted(file.name for file in place.iterdir()) == ["0.png", "10.png", "COCOval2014000000.png"]
    expected = drawn(tiny_pipeline, range(4, 8), [PROMPTS[1]] * 4)
    with Image.open(place / "10.png") as grid:
        boxes = [(0, 0), (side, 0), (0, side), (side, side)]
        cut = np.stack([np.asarray(grid.crop((x, y, x + side, y + side))) for x, y in boxes])
    assert np.abs(cut.astype(int) - expected).max() <= 1, "batches of another size round otherwise"

    (place / "10.png").unlink()
    asked: list[list[str]] = []
    draw_all = ImageGenerator.draw

    def counted(self: ImageGenerator, prompts: list[str], *rest: Any) -> np.ndarray:
        asked.append(list(prompts))
        return draw_all(self, prompts, *rest)

    monkeypatch.setattr(ImageGenerator, "draw", counted)
    draw(tmp_path / "out")
    assert asked == [[PROMPTS[1]] * 4], "the others are kept"
    with Image.open(place / "10.png") as grid:
        assert np.array_equal(np.asarray(grid)[:side, side:], expected[1])
    with pytest.raises(UserError, match="seed = 0, not 1"):
        draw(tmp_path / "out", seed=1)


def test_prompts_of_another_layout_are_refused(sources: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no \.txt file"):
        LAYOUTS["dpg"].read(tmp_path)
    with pytest.raises(UserError, match="cannot be read"):
        LAYOUTS["geneval"].read(sources["dpg"])
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"prompt": "a"}\n["no mapping"]\n', encoding="utf-8")
    with pytest.raises(UserError, match="line 2"):
        LAYOUTS["geneval2"].read(broken)
    with pytest.raises(UserError, match="layout = 'genevall'") as caught:
        api.draw_folder("genevall", broken)
    assert caught.value.field == "layout"
