"""Distilling a student further: the steps of a frozen student in the place of the teacher's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.common.errors import UserError
from fewstep.common.files import read_json
from fewstep.common.rng import KeyedRng
from fewstep.common.tensors import digest, load_tensors
from fewstep.diffusion.config import Sampling
from fewstep.diffusion.denoiser import Denoiser
from fewstep.diffusion.schedule import scaled_linear
from fewstep.distillation import distill as distillation
from fewstep.distillation.checks import check_followed
from fewstep.distillation.config import resolve
from fewstep.methods.config import ConsistencyConfig
from fewstep.methods.consistency import consistency_loss, make_pair
from fewstep.methods.cost import step_calls
from fewstep.methods.pair import MicroBatch
from fewstep.students.lora_header import LoraHeader
from support.interrupt import stopped_in_call

FURTHER = ["method.follow=start", "method.k=12"]
GAINS = {"student": 0.3, "start": 0.5, "teacher": 0.9}


def test_the_pair_is_a_jump_of_the_frozen_student() -> None:
    """Networks eps = gain * x: x_{t_n} is the start's DDIM step, unguided, and the target jumps on from there."""
    path = scaled_linear()
    config = ConsistencyConfig(follow="start", k=12)
    calls: list[tuple[str, int]] = []

    def call(x: Tensor, t: Tensor, condition: Any, role: str) -> Tensor:
        calls.append((role, len(x)))
        return GAINS[role] * x

    x_0, text = torch.randn(8, 3, generator=torch.Generator().manual_seed(0)), {"text": torch.ones(8)}
    rng = KeyedRng(0, 0, tuple(range(8)))
    pair = make_pair(config, Denoiser(call, path, "eps"), MicroBatch(x_0, text, text), rng)
    loss = consistency_loss(pair, rng)
    assert calls == [("student", 8), ("start", 8), ("student", 8)]
    assert step_calls(config) == {"start": 1, "student": 2}

    def jump(role: str, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        (a, b), (a_s, b_s) = ((path.alpha(u)[:, None], path.sigma(u)[:, None]) for u in (t, s))
        return a_s * (x - b * GAINS[role] * x) / a + b_s * GAINS[role] * x

    times, x = pair.times, pair.x_nk.double()
    landed = jump("student", jump("start", x, times.t_nk, times.t_n), times.t_n, times.s)
    wanted = (jump("student", x, times.t_nk, times.s) - landed).square().mean(1)
    torch.testing.assert_close(loss.per_sample.double(), wanted, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def eight(tiny_overrides: list[str], tiny_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = resolve("tcd", None, [*tiny_overrides, "optim.lr=0.01", "sampling.steps=8"])
    return distillation.distill(config, tmp_path_factory.mktemp("eight"), cache=tiny_cache, quiet=True)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_student_is_distilled_further(
    kind: str, eight: Path, tiny_overrides: list[str], tiny_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The start stays as it was, in a resumed run too, and the teacher itself is never called."""
    words = [*tiny_overrides, f"student.kind={kind}"]
    start = eight
    if kind == "full":
        start = distillation.distill(resolve("tcd", None, words), tmp_path / "start", cache=tiny_cache, quiet=True)
    config = resolve("tcd", None, [*words, *FURTHER, f"student.start={start}", "sampling.steps=4"])

    def weights(folder: str) -> list[str]:
        student = distillation.distill(config, tmp_path / folder, cache=tiny_cache, quiet=True)
        files = [student] if student.is_file() else sorted((student / "unet").glob("*.safetensors"))
        return [digest(load_tensors(file)) for file in files]

    whole = weights("whole")
    stopped_in_call(monkeypatch, 4, lambda: weights("cut"))
    assert weights("cut") == whole
    counted = read_json(tmp_path / "whole" / "evaluations.json")["a_sample_and_step"]
    assert counted == {"start": 1, "student": 2}, "the target is the student"
    before = [start] if start.is_file() else sorted((start / "unet").glob("*.safetensors"))
    assert [digest(load_tensors(file)) for file in before] != whole


def test_stages_follow_one_another(tiny_overrides: list[str], tiny_cache: Path, tmp_path: Path) -> None:
    file = tmp_path / "halving.yaml"
    file.write_text(
        "stages:\n  - {name: eight, share: 1, sampling: {steps: 8}}\n"
        "  - {name: four, share: 1, method: {follow: start, k: 6}}\n"
        "  - {name: two, share: 1, method: {follow: start, k: 12}, sampling: {steps: 2}}\n"
    )
    distillation.distill(resolve("tcd", file, tiny_overrides), tmp_path / "run", cache=tiny_cache, quiet=True)
    counted = [
        read_json(tmp_path / "run" / "stages" / name / "evaluations.json")["a_sample_and_step"]
        for name in ("1-eight", "2-four", "3-two")
    ]
    further = {"start": 1, "student": 2}
    assert counted == [{"student": 2, "teacher": 2}, further, further]


def header(**sampling: Any) -> LoraHeader:
    return LoraHeader(Path(), Path(), {}, "", Sampling(**sampling), {})


@pytest.mark.parametrize(
    ("start", "words", "field"),
    [
        (None, [], "student.start"),
        (header(sampler="lcm"), [], "method.follow"),
        (header(jump="second_order"), [], "method.follow"),
        (header(extra_conditioning=("s",)), [], "method.follow"),
        (header(grid=20), [], "method.grid"),
        (header(end="clean"), [], "method.end"),
    ],
)
def test_jumps_that_a_student_has_not_learned_are_refused(
    start: LoraHeader | None, words: list[str], field: str
) -> None:
    with pytest.raises(UserError) as error:
        check_followed([resolve("tcd", None, [*FURTHER, *words])], start)
    assert error.value.field == field


def test_what_a_student_has_learned_is_followed() -> None:
    coarse = ["method.grid=25", "sampling.grid=25", "method.k=6"]
    for start, words in ((header(), []), (header(), coarse), (header(spacing="tlcm", grid=8, end="index0"), None)):
        words = ["method.grid=8", "sampling.grid=8", "method.k=2"] if words is None else words
        check_followed([resolve("tcd", None, [*FURTHER, *words])], start)


@pytest.mark.parametrize(
    "words",
    [
        ["method.jump=second_order", "sampling.jump=second_order"],
        ["method.start=trajectory"],
        ["method.solver=heun"],
        ["method.extra_conditioning=[s]", "sampling.extra_conditioning=[s]"],
    ],
)
def test_settings_that_exclude_following(words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        resolve("tcd", None, [*FURTHER, *words])
    assert error.value.field == "method.follow"


def test_a_student_of_another_base_is_a_start(
    eight: Path, tiny_pipeline: Path, tiny_overrides: list[str], tiny_cache: Path, tmp_path: Path
) -> None:
    """As LCM-LoRA is of a community checkpoint: the first step's student is the start's LoRA on the new base."""
    import shutil

    from safetensors.torch import load_file, save_file

    other = tmp_path / "other"
    shutil.copytree(tiny_pipeline, other)
    weights = other / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({name: value * 1.01 for name, value in load_file(weights).items()}, weights, {"format": "pt"})
    words = [*tiny_overrides, f"teacher={other}", f"student.start={eight}", "optim.lr=1e-12", "loop.steps=1"]
    student = distillation.distill(resolve("tcd", None, words), tmp_path / "run", cache=tiny_cache, quiet=True)
    first, second = load_tensors(eight), load_tensors(student)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
