"""Alarms of validation: planted faults raise theirs, healthy runs of every recipe none."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fewstep.common import core_yaml
from fewstep.common.errors import UserError
from fewstep.common.files import read_json, write_text
from fewstep.common.run_log import log_lines, read_run
from fewstep.distillation import distill as distillation
from fewstep.distillation import validation
from fewstep.distillation.alarms import (
    Alarm,
    Appearance,
    appearance,
    critic_alarms,
    fake_alarms,
    log_alarms,
    loss_alarms,
    moved,
    picture_alarms,
    same_prompt,
)
from fewstep.distillation.config import resolve
from fewstep.inference.generator import ImageGenerator
from fewstep.methods.recipes import rows
from fewstep.training.run_folder import check_same_run
from fewstep_worlds.plane.settings import PlaneConfig, resolve_plane
from fewstep_worlds.plane.train import draw_points, landing_end, set_up, train_plane
from support.pooled import Pooled

FLAT = {"chroma": 1.0, "contrast": 1.0, "clipped": 0.0, "diversity": 1.0, "moved": 1.0}


def names(alarms: Any) -> list[str]:
    return [alarm.name for alarm in alarms]


def test_appearance_of_known_pictures() -> None:
    """Half red, half white: chroma 127.5, luminance 76.2 and 255; red is clipped and coloured, white is not."""
    picture = np.full((1, 4, 4, 3), 255, np.uint8)
    picture[:, :2, :, 1:] = 0
    features = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]], np.float32)
    found = appearance(np.repeat(picture, 3, 0), features, ["a", "a", "b"])
    assert found.chroma == 127.5
    assert found.contrast == pytest.approx((255 - 0.299 * 255) / 2, rel=1e-5)
    assert found.clipped == 0.5
    assert found.diversity == pytest.approx(1.0), "of the two of prompt a"
    assert appearance(picture, features[:1], ["a"]).diversity is None


def test_grey_pictures_are_compared_by_what_is_visible() -> None:
    """Chroma of 2 levels beside 1 is no saturation."""
    found = Appearance(2.0, 50.0, 0.0, 0.2).over(Appearance(1.0, 50.0, 0.0, 0.4))
    assert names(picture_alarms(FLAT | found, FLAT, 1.0)) == []
    assert found["diversity"] == 0.5


@pytest.mark.parametrize(
    ("figure", "value", "name"),
    [
        ("chroma", 1.4, "saturation"),
        ("contrast", 1.4, "saturation"),
        ("clipped", 0.12, "saturation"),
        ("chroma", 0.5, "fading"),
        ("contrast", 0.5, "fading"),
        ("diversity", 0.4, "collapse"),
        ("moved", 0.001, "stuck"),
    ],
)
def test_one_figure_beyond_its_limit_raises_one_alarm(figure: str, value: float, name: str) -> None:
    now = FLAT | {figure: value}
    (alarm,) = picture_alarms(now, FLAT, 0.2)
    assert (alarm.name, alarm.value) == (name, value)
    if figure != "moved":  # a start that was there already counts in the first half of a run
        assert names(picture_alarms(now, now, 0.5)) == []
        assert names(picture_alarms(now, now, 0.6)) == [name]


def test_the_loss_of_one_range_of_times() -> None:
    bands = {f"student/loss_t0.{i}": 0.1 * (i + 1) for i in range(10)}
    lines = [{"step": i, **{name: value * (1 + i / 40) for name, value in bands.items()}} for i in range(40)]
    assert names(loss_alarms(lines)) == []
    risen = [{**line, "student/loss_t0.9": 20.0} if line["step"] > 30 else line for line in lines]
    assert names(loss_alarms(risen)) == ["loss by time"]
    shifted = [{k: v + 30 * (k != "step" and line["step"] > 30) for k, v in line.items()} for line in lines]
    assert names(loss_alarms(shifted)) == [], "a term that enters later raises all"
    assert names(loss_alarms(risen[:7])) == [], "too few lines"


def test_a_critic_at_chance_is_none_beside_a_student_that_is_as_good() -> None:
    method = resolve_plane("ctm").method
    lines = [{"step": 10 * i, "critic/ranked": 0.5 + 0.01 * (-1) ** i} for i in range(40)]
    assert names(critic_alarms(lines, method, behind=True)) == ["critic at chance"]
    assert names(critic_alarms(lines, method, behind=False)) == []
    assert names(critic_alarms(lines[:9], method, behind=True)) == [], "too early"
    assert names(critic_alarms(lines, resolve_plane("pcm").method, behind=True)) == [], "its target's points are real"
    wins = [line | {"critic/ranked": 1.0} for line in lines]
    assert names(critic_alarms(wins, method, behind=True)) == ["critic wins"]


def test_a_fake_score_that_lags_behind_the_student() -> None:
    def found(ratio: float, count: int = 40) -> list[str]:
        errors = [(10 * i, 1.0 + i) for i in range(count)]
        lines = [{"step": i, "student/fake_error": ratio * e, "student/teacher_error": e} for i, e in errors]
        return names(fake_alarms(lines))

    assert found(0.9) == found(1.3) == found(2.0, count=9) == []
    assert found(2.0) == found(1.0) == ["fake score"], "worse than the teacher, or the teacher still"


# --- in the plane

PLANE = [
    "base=exact", "width=16", "count=500", "shown=200", "steps=[4]", "gammas=[0]", "loop.batch=32",
    "loop.save_every=1000", "loop.log_every=4", "loop.tracker=none", "optim.lr=1e-3",
]  # fmt: skip


def as_colours(points: torch.Tensor) -> np.ndarray:
    """Pictures of one colour whose chroma is the distance of a point, [N, 2], from 0: uint8 [N, 1, 1, 3]."""
    axes = torch.tensor([[1.0, -0.5, -0.5], [0.0, 0.87, -0.87]], dtype=points.dtype)
    return (128 + 40 * points @ axes).round().clamp(0, 255).to(torch.uint8).numpy()[:, None, None]


def plane_alarms(config: PlaneConfig, out: Path, steps: int = 4) -> list[Alarm]:
    """Train and return the alarms of all stages' logs and of the student's samples, as colours of one prompt."""
    start = set_up(config.each_stage()[0])
    run = train_plane(config, out, quiet=True)
    end, generator = landing_end(run), torch.Generator().manual_seed(7)
    exact = run.teacher.sample(config.shown, end, generator)
    points = {"exact": exact} | {
        name: draw_points(each, steps, config.sampling.gamma) for name, each in (("start", start), ("now", run))
    }
    pictures = {name: as_colours(each) for name, each in points.items()}
    prompts = ["the one"] * config.shown
    looks = {name: appearance(pictures[name], each.numpy(), prompts) for name, each in points.items()}
    found = {name: looks[name].over(looks["exact"]) for name in ("start", "now")}
    found["now"]["moved"] = moved(pictures["now"], pictures["start"], pictures["exact"])
    energy, floor = (run.teacher.energy(points[name], end) for name in ("now", "exact"))
    behind = energy > 2 * max(floor, 0.0) + 0.01
    logs = [
        alarm
        for _, folder, stage in config.runs(out)
        for alarm in log_alarms(list(log_lines(folder / "log.jsonl")), stage.method, behind)
    ]
    return [*picture_alarms(found["now"], found["start"], 1.0), *logs]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", rows())
def test_healthy_runs_in_the_plane_raise_none(recipe: str, tmp_path: Path) -> None:
    config = resolve_plane(recipe, [*PLANE, "loop.steps=120"])
    assert plane_alarms(config, tmp_path, min(4, max(config.steps))) == []


PLANTED: dict[str, tuple[str, list[str]]] = {
    "stuck": ("tcd", ["optim.lr=1e-12"]),
    "fake score": ("dpdmd", ["method.matching.lr=1e-12", "optim.lr=1e-2"]),
    "critic at chance": ("ctm", ["method.adversarial.start=0", "method.adversarial.lr=1e-12"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PLANTED)
def test_a_network_that_does_not_learn_raises_its_alarm(name: str, tmp_path: Path) -> None:
    recipe, fault = PLANTED[name]
    assert names(plane_alarms(resolve_plane(recipe, [*PLANE, "loop.steps=120", *fault]), tmp_path)) == [name]


# --- on the tiny pipeline


def stretch(factor: float) -> Callable[[np.ndarray], np.ndarray]:
    """Scale pictures around grey."""
    return lambda pictures: (128 + factor * (pictures.astype(np.float32) - 128)).clip(0, 255).astype(np.uint8)


FAULTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "saturation": stretch(2.0),
    "fading": stretch(0.4),
    "collapse": lambda pictures: pictures[np.arange(len(pictures)) % 2],  # of two prompts, one picture each
}
FAULTS["off"] = FAULTS["collapse"]


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("saturation", "fading", "none", "off")]


@pytest.mark.parametrize("name", ["collapse", *SLOW])
def test_a_faulty_student_raises_its_alarm_and_is_not_the_best(
    name: str, tiny_overrides: list[str], tiny_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that is healthy at its first validation; at the second KID is lower, but what it draws is spoilt."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red disc\na blue ring\n")
    words = [
        *tiny_overrides, "student.targets=[to_q]", "loop.steps=4", "loop.batch=1", "loop.save_every=4",
        "loop.validate_every=2", f"validation.prompts={prompts}", "validation.count=16", "validation.teacher_steps=4",
        "sampling.steps=4", "loop.tracker=none", "optim.lr=1e-2", f"validation.alarms={name != 'off'}",
    ]  # fmt: skip
    own, drawn, warned, kid = ImageGenerator.pictures, [], list[str](), iter([0.5, 0.3])

    def pictures(self: ImageGenerator, *args: Any, **options: Any) -> np.ndarray:
        found = own(self, *args, **options)
        if self.role == "student":
            drawn.append(found)
        return FAULTS[name](found) if len(drawn) == 3 and name in FAULTS else found  # after the start's and the first

    monkeypatch.setattr(ImageGenerator, "pictures", pictures)
    monkeypatch.setattr(validation, "Lite0Features", Pooled)
    monkeypatch.setattr(validation, "ENOUGH", 1)
    monkeypatch.setattr(validation.KernelDistance, "distance", lambda *_: next(kid))
    monkeypatch.setattr(logging.getLogger("fewstep"), "warning", warned.append)
    run = tmp_path / "run"
    distillation.distill(resolve("tcd", None, words), run, cache=tiny_cache, quiet=True)

    wanted = [(4, name)] if name not in ("none", "off") else []
    found = read_json(run / "alarms.json") if wanted else []
    logged = [line["validation/alarms"] for line in log_lines(run / "log.jsonl") if "validation/alarms" in line]
    shown = read_run(run)
    assert [(alarm["step"], alarm["name"]) for alarm in found] == wanted
    assert logged == ([0, len(found)] if name != "off" else [])
    assert read_json(run / "best" / "figures.json")["step"] == (2 if found else 4)
    assert len(warned) == len(shown.alarms) == len(found)
    assert all(name in text for text in (*warned, *shown.alarms, *([shown.state] if found else [])))
    assert (run / "alarms.json").is_file() == bool(found)


def test_alarms_may_be_switched_within_a_run(tmp_path: Path) -> None:
    write_text(tmp_path / "config.yaml", core_yaml.dump(resolve("tcd").model_dump(mode="json")))
    check_same_run(tmp_path, resolve("tcd", None, ["validation.alarms=false"]))
    with pytest.raises(UserError):
        check_same_run(tmp_path, resolve("tcd", None, ["validation.count=20"]))


def test_prompts_are_repeated_for_the_diversity() -> None:
    prompts = [f"prompt {i}" for i in range(32)]
    found = validation.with_repeats(prompts)
    assert found == [*prompts[:24], *prompts[:8]]
    assert same_prompt(found)[0] == [0, 24]
    assert validation.with_repeats(["a", "b"] * 8) == ["a", "b"] * 8
