"""`fewstep evaluate` with chosen metrics and several settings: what is drawn, compared, tabulated and refused."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import fewstep as api
from fewstep.commands import app as cli
from fewstep.common.errors import UserError
from fewstep.common.files import read_json
from fewstep.diffusion.config import TEACHER_SAMPLING, Sampling
from fewstep.evaluation import run as measuring
from fewstep.evaluation.diversity import NOISES, pairwise_distance
from fewstep.evaluation.evaluate import TeacherPictures
from fewstep.evaluation.features import Features
from fewstep.evaluation.kid import KernelDistance, between_matched, within
from fewstep.evaluation.metric import Figure, Identity, Pictures
from fewstep.evaluation.standard import inception
from fewstep.evaluation.standard.loader import Loader, load_metrics
from fewstep.evaluation.standard.registry import Column, choose
from fewstep.evaluation.sweep import Cell, curves, draw_curves, table_lines
from fewstep.inference.generator import ImageGenerator, load_image_generator
from support import metric_references as reference
from support import scorer_references as scorers

PROMPTS = [f"a {colour} {shape}" for colour in ("red", "green", "blue") for shape in ("disc", "ring", "bar", "square")]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("weights")
    scorers.write_clip(base / "clip-vit-large-patch14", seed=1)
    reference.write(base / "aesthetic", reference.aesthetic_state(16))
    reference.write(base / "inception", {"Conv2d_1a_3x3.conv.weight": torch.zeros(1)})
    return base


@pytest.fixture
def prompt_file(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(PROMPTS) + "\n", encoding="utf-8")
    return file


@pytest.fixture(autouse=True)
def no_world(monkeypatch: pytest.MonkeyPatch) -> None:
    """None of these metrics needs the bundled world or its feature network."""

    def forbidden(*_: Any, **__: Any) -> None:
        raise AssertionError("asked for")

    monkeypatch.setattr(measuring, "world", forbidden)
    monkeypatch.setattr(measuring, "Lite0Features", forbidden)


def sampled(pipeline: Path, seeds: Sequence[int], prompts: Sequence[str] = PROMPTS, **changes: Any) -> Pictures:
    generator = load_image_generator(pipeline)
    return generator.draw(prompts, seeds, Sampling(**(generator.sampling.model_dump() | changes)))


@pytest.mark.slow
def test_steps_by_gamma_are_a_table_with_curves(
    prompt_file: Path, tiny_pipeline: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        *("evaluate", "--prompt-file", str(prompt_file), "--teacher", str(tiny_pipeline), "--lora", "none"),
        *("--metrics", "clip", "--metrics", "aesthetic", "--weights", str(weights), "--split", "twelve"),
        *("--sampler", "sss", "--omega", "0", "--steps", "1", "2", "--gamma", "0", "1", "--seed", "3"),
        *("--device", "cpu", "--out", str(tmp_path / "out")),
    ]
    with pytest.raises(SystemExit) as stop:
        cli.main(words)
    printed = capsys.readouterr().out
    assert stop.value.code == 0
    rows = read_json(tmp_path / "out" / "figures.json")
    assert list(rows) == [f"tiny {steps} steps, gamma {gamma}" for steps in (1, 2) for gamma in (0, 1)]
    clip, aesthetic = load_metrics(choose(None, ["clip", "aesthetic"], weights), Loader(torch.device("cpu"))).metrics
    cells = {}
    for steps in (1, 2):
        for gamma in (0.0, 1.0):
            drawn = sampled(tiny_pipeline, range(3, 15), sampler="sss", steps=steps, gamma=gamma, omega=0.0)
            own = rows[f"tiny {steps} steps, gamma {gamma:g}"]
            assert own["CLIP score"]["value"] == pytest.approx(clip.features(drawn, PROMPTS).mean(), rel=1e-6)
            assert own["aesthetic v2"]["value"] == pytest.approx(aesthetic.features(drawn, ()).mean(), rel=1e-6)
            cells[steps, gamma] = own["CLIP score"]["value"]
    assert cells[2, 0.0] != cells[2, 1.0]
    lines = [line.split("|")[1:-1] for line in printed.splitlines() if line.startswith("| ")]
    assert [[float(word) for word in line[:2]] for line in lines[2:]] == [[1, 0], [1, 1], [2, 0], [2, 1]]
    assert [float(line[2]) for line in lines[2:]] == pytest.approx(list(cells.values()), rel=1e-3)
    record = rows["tiny 2 steps, gamma 1"]["CLIP score"]["identity"]
    assert (record["split"], record["n"]) == ("twelve", 12)
    assert record["prompts_sha256"] in printed
    with Image.open(tmp_path / "out" / "curves.png") as picture:
        assert len(np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0)) > 20


@pytest.fixture
def pooled_inception(monkeypatch: pytest.MonkeyPatch) -> None:
    """Means of a 2 x 2 grid in place of the network's layers."""
    monkeypatch.setattr(inception, "load_inception", lambda model, device: nn.AvgPool2d(149))
    monkeypatch.setattr("fewstep.common.extras.check_installed", lambda *_, **__: None)


@pytest.mark.slow
def test_a_teacher_is_drawn_once_and_from_other_noise(
    prompt_file: Path,
    tiny_pipeline: Path,
    weights: Path,
    tmp_path: Path,
    pooled_inception: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []
    draw = ImageGenerator.draw

    def counted(self: ImageGenerator, prompts: Sequence[str], seeds: Any, *rest: Any) -> np.ndarray:
        asked.append((len(prompts), seeds[0]))
        return draw(self, prompts, seeds, *rest)

    monkeypatch.setattr(ImageGenerator, "draw", counted)
    figures = api.evaluate(
        prompt_file=prompt_file, teacher=tiny_pipeline, lora=None, reference=tiny_pipeline, reference_omega=1.0,
        metrics=["kid_teacher", "diversity"], weights=weights, steps=2, omega=1.0, seed=7, device="cpu",
        out=tmp_path / "out",
    )  # fmt: skip
    assert asked == [(12, 19), (12, 7), (12 * NOISES, 7)]
    assert list(figures) == ["KID (to teacher)", "diversity-Inception"]
    ours = sampled(tiny_pipeline, range(7, 19), steps=2, omega=1.0)
    ends = load_image_generator(tiny_pipeline).draw(
        PROMPTS, range(19, 31), TEACHER_SAMPLING.model_copy(update={"omega": 1.0})
    )
    x, y = (((inception.clean(rows) - 128) / 128).numpy() for rows in (ours, ends))
    x, y = (rows[..., :298, :298].reshape(12, 3, 2, 149, 2, 149).mean((3, 5)).reshape(12, -1) for rows in (x, y))
    one = np.ones((1, 12))
    expected = within(x, one) + within(y, one) - 2 * between_matched(x, y, one)
    assert figures["KID (to teacher)"].value == pytest.approx(float(expected[0]), rel=1e-3)
    repeated = [prompt for prompt in PROMPTS for _ in range(NOISES)]
    noises = sampled(tiny_pipeline, range(7, 7 + len(repeated)), repeated, steps=2, omega=1.0)
    z = ((inception.clean(noises) - 128) / 128).numpy()[..., :298, :298]
    z = z.reshape(12, NOISES, 3, 2, 149, 2, 149).mean((4, 6)).reshape(12, NOISES, -1)
    assert figures["diversity-Inception"].value == pytest.approx(pairwise_distance(z).mean(), rel=1e-3)
    assert figures["diversity-Inception"].n == 12


def test_real_pictures_are_measured_against_where_a_folder_of_them_is_given(
    prompt_file: Path,
    tiny_pipeline: Path,
    picture_folder: Path,
    weights: Path,
    tmp_path: Path,
    pooled_inception: None,
) -> None:
    figures = api.evaluate(
        prompt_file=prompt_file, teacher=tiny_pipeline, lora=None, real=picture_folder, metrics="kid", weights=weights,
        steps=1, omega=1.0, device="cpu", out=tmp_path / "out",
    )  # fmt: skip
    (figure,) = figures.values()
    assert figure.value > 0
    assert figure.identity is not None
    assert figure.identity.split == f"prompts.txt and {picture_folder.name}"


def test_what_is_refused_before_anything_is_drawn(
    prompt_file: Path,
    tiny_pipeline: Path,
    picture_folder: Path,
    weights: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def forbidden(*_: Any, **__: Any) -> np.ndarray:
        raise AssertionError("drawn")

    monkeypatch.setattr(ImageGenerator, "draw", forbidden)

    def refused(words: str, *metrics: str, **changes: Any) -> UserError:
        given = {"prompt_file": prompt_file, "lora": None, "teacher": str(tiny_pipeline), "weights": weights} | changes
        with pytest.raises(UserError, match=words) as caught:
            api.evaluate(out=tmp_path / "out", metrics=metrics, device="cpu", **given)
        return caught.value

    assert refused("12 prompts; fid needs at least 500", "fid").field == "prompt_file"
    assert refused("compares with a teacher", "kid_teacher").field == "metrics"
    assert refused("complexity, image_reward, pickscore;.*--skip-unavailable", suite="tcd").field == "weights"
    many = tmp_path / "many.txt"
    many.write_text("a red disc\n" * 500, encoding="utf-8")
    assert refused("16 pictures; fid needs at least 500", "fid", prompt_file=many, real=picture_folder).field == "real"
    small = refused("pictures of 299 pixels a side, not 64", "patch_fid", prompt_file=many, real=None)
    assert small.field == "metrics"
    with pytest.raises(UserError, match=r"'4\.5' is not an integer") as caught:
        cli.run(["evaluate", "--prompt-file", str(prompt_file), "--steps", "2", "4.5"])
    assert caught.value.field == "steps"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    refused(r"torch_fidelity, which is not installed.*\[fidelity\]", "kid", real=picture_folder)


def test_what_cannot_be_measured_is_named_and_the_rest_is(
    prompt_file: Path, tiny_pipeline: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Missing weights and too few pictures; a run with nothing left to measure is refused."""
    own = {"prompt_file": prompt_file, "lora": None, "teacher": str(tiny_pipeline), "steps": 1, "device": "cpu"}
    chosen = ["clip", "complexity", "fid", "aesthetic"]
    figures = api.evaluate(metrics=chosen, weights=weights, skip_unavailable=True, out=tmp_path / "out", **own)
    assert list(figures) == ["CLIP score", "aesthetic v2"]
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("left out")]
    assert [line.split(":")[0] for line in lines] == ["left out complexity", "left out fid"]
    for names, field in ((["complexity"], "weights"), (["fid"], "prompt_file")):
        with pytest.raises(UserError) as caught:
            api.evaluate(metrics=names, weights=weights, skip_unavailable=True, out=tmp_path / "none", **own)
        assert caught.value.field == field


def test_sets_are_compared_with_the_teachers_pictures() -> None:
    draw = np.random.default_rng(1)
    numbered = np.zeros((40, 8, 8, 3), np.uint8)
    numbered[:, 0, 0, 1] = np.arange(40)
    kid = KernelDistance(Features(reference.Numbered(draw.normal(size=(40, 4)))), "KID")
    plan = measuring.Plan([], [kid], None, None)
    ends = TeacherPictures(other=numbered[20:])
    figures = measuring.measure(plan, numbered[:20], None, [f"prompt {row}" for row in range(20)], ends, 0)
    assert list(figures) == ["KID (to teacher)"]
    rows = kid.features(numbered, ())
    expected = kid.reduce(rows[:20], rows[20:], 0, matched=True)
    assert figures["KID (to teacher)"].value == expected.value
    assert figures["KID (to teacher)"].floor is None


# ------------------------------------------------------------------------------------------------- tables


def figure(value: float, better: Any = "lower") -> Figure:
    return Figure(value, value - 1, value + 1, 5, identity=Identity("FID", "distance", better, "", "mean"))


def test_a_column_has_the_papers_unit() -> None:
    cells = [Cell(4, 0.3, {"HPSv2": figure(29.3, "higher")}), Cell(8, None, {})]
    lines = table_lines(cells, {"HPSv2": Column("HPS", "hpsv2", 0.01)})
    assert [word.strip() for word in lines[0].split("|")[1:-1]] == ["steps", "gamma", "HPS ↑"]
    assert [word.strip() for word in lines[2].split("|")[1:-1]] == ["4", "0.3", "0.293"]
    assert [word.strip() for word in lines[3].split("|")[1:-1]] == ["8", "", ""]


def test_curves_run_along_what_varies(tmp_path: Path) -> None:
    by_both = [Cell(steps, gamma, {"FID": figure(steps + gamma)}) for steps in (8, 2) for gamma in (0.0, 0.5)]
    axis, found = curves(by_both)
    assert axis == "steps"
    assert {name: [x for x, _ in points] for name, points in found.items()} == {"gamma 0": [2, 8], "gamma 0.5": [2, 8]}
    axis, found = curves(by_both[:2])
    assert axis == "gamma"
    assert {name: [x for x, _ in points] for name, points in found.items()} == {"8 steps": [0.0, 0.5]}
    draw_curves(tmp_path / "a.png", by_both, None)
    draw_curves(tmp_path / "b.png", [Cell(c.steps, c.gamma, {"FID": figure(9.0)}) for c in by_both], None)
    pictures = [np.asarray(Image.open(tmp_path / name)) for name in ("a.png", "b.png")]
    assert not np.array_equal(*pictures)
