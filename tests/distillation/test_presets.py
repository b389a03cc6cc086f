"""`fewstep init`: settings that fit a GPU's memory, on paper, and that train."""

from __future__ import annotations

import shlex
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

import fewstep
from fewstep.backbones.families import FAMILIES
from fewstep.commands import app as cli
from fewstep.common.errors import UserError
from fewstep.distillation.config import resolve
from fewstep.distillation.preset_file import Names, commands
from fewstep.distillation.presets import (
    ASIDE,
    BATCH,
    GIB,
    LEARNS,
    MEMORY,
    MODELS,
    Plan,
    base_bytes,
    choose,
    fits,
    phases,
)
from support import tiny_pipelines


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("source", ["pictures", "prompt_file"])
def test_the_estimate_of_each_file_fits(model: str, memory: int, source: str) -> None:
    """By the settings that the file resolves to; its commands are command lines."""
    words: dict[str, Any] = {"model": model, "memory": memory, source: "data.txt", "teacher": "a/b"}
    file = fewstep.init(**words)
    config = resolve("tcd", file)
    micro = config.loop.batch // config.loop.accumulate
    drawn = config.data.source == f"runs/{model}-set"
    plan = Plan(
        "pictures" if source == "pictures" else "set" if drawn else "rollout",
        config.student.base,  # type: ignore[arg-type]
        config.student.offload,
        config.student.rank,
        config.student.checkpointing,
        micro,
        config.data.encoder_precision,
        config.loop.validate_every is not None,
    )
    assert max(phases(MODELS[model], plan).values()) <= memory * 1e9 / GIB
    assert (config.loop.batch, config.sampling.steps, config.loop.precision) == (BATCH, 4, "bf16")
    assert config.teacher == "a/b"
    assert config.method.guidance.omegas == MODELS[model].guidance
    assert drawn or config.data.source == "data.txt"
    assert (config.method.start == "rollout") == (plan.source == "rollout")
    for line in commands(MODELS[model], plan, Names(model, "a/b", "data.txt", "distill.yaml"), memory):
        cli.app.parse_args(shlex.split(line)[1:])


@pytest.mark.parametrize("model", MODELS)
def test_more_memory_is_never_worse(model: str) -> None:
    plans = [plan for memory in MEMORY if (plan := choose(MODELS[model], memory, True))]
    for small, large in pairwise(plans):
        assert large.rank >= small.rank
        assert large.rank > small.rank or large.offload <= small.offload
        assert large.validates >= small.validates
        assert large.micro_batch * (1 + 9 * (not large.checkpointing)) >= small.micro_batch


def test_a_phase_that_is_too_large_does_not_fit() -> None:
    """The memory of each phase is counted with what else is held in it, by hand for one plan."""
    model = MODELS["sdxl"]
    plan = Plan("pictures", "bf16", False, 16, True, 4, "fp32", True)
    held = phases(model, plan)
    adapter = 16 * model.adapter
    assert held["step"] * GIB == pytest.approx(
        ASIDE * GIB + 2 * model.weights + LEARNS * adapter + 4 * model.recomputed * GIB
    )
    most = max(held.values()) * GIB / 1e9
    assert fits(model, plan, int(most) + 1)
    assert not fits(model, plan, int(most))
    moved = phases(model, plan._replace(offload=True))
    blocks = model.weights - model.outside - 2 * model.largest
    assert (held["step"] - moved["step"]) * GIB == pytest.approx(2 * blocks)
    narrow = phases(model, plan._replace(base="4bit"))
    left = 4 * (model.weights - model.matrices) + 0.56 * model.matrices
    assert (held["step"] - narrow["step"]) * GIB == pytest.approx(2 * model.weights - left)


@pytest.mark.parametrize(
    ("words", "field"),
    [
        ({"model": "sd2", "memory": 24}, "model"),
        ({"model": "sd15", "memory": 2}, "memory"),
        ({"model": "SD15", "memory": 24, "pictures": "a", "prompt_file": "b"}, "prompt_file"),
    ],
)
def test_what_is_refused(words: dict[str, Any], field: str) -> None:
    with pytest.raises(UserError) as error:
        fewstep.init(**words)
    assert error.value.field == field
    assert not Path("distill.yaml").exists()


def test_a_file_is_not_lost() -> None:
    Path("mine.yaml").write_text("recipe: lcm\n")
    with pytest.raises(UserError) as error:
        fewstep.init(model="sd15", memory=24, out="mine.yaml")
    assert error.value.field == "out"
    assert Path("mine.yaml").read_text() == "recipe: lcm\n"


SMALL = [
    "device=cpu", "loop.steps=2", "loop.batch=2", "loop.accumulate=1", "student.rank=2", "loop.validate_every=null",
]  # fmt: skip


@pytest.mark.parametrize(
    ("model", "kind"),
    [
        ("sd15", "sd"),
        pytest.param("sdxl", "sdxl", marks=pytest.mark.slow),
        pytest.param("sd3", "sd3", marks=pytest.mark.slow),
        ("flux", "flux"),
    ],
)
def test_each_file_trains(model: str, kind: str, picture_folder: Path, tmp_path: Path) -> None:
    """A tiny network of the class, two steps, in the formats of 16 GB."""
    teacher = tiny_pipelines.FAMILIES[kind](tmp_path / "teacher")
    file = fewstep.init(model=model, memory=16, teacher=teacher, pictures=picture_folder)
    student = fewstep.distill(config=file, out="run", overrides=SMALL)
    assert fewstep.sample("a red disc", lora=student, teacher=teacher, device="cpu").is_file()


def test_prompts_alone_train_too(tmp_path: Path) -> None:
    teacher = tiny_pipelines.sd(tmp_path / "teacher")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red disc\na blue bar\na green ring\n")
    file = fewstep.init(model="sd15", memory=16, teacher=teacher, prompt_file=prompts)
    draw = next(line[4:] for line in file.read_text().splitlines() if line.startswith("#   fewstep synthesize"))
    with pytest.raises(SystemExit) as stop:
        cli.main([*shlex.split(draw)[1:], "-s", "grid=2", "--device", "cpu"])
    assert stop.value.code == 0
    assert fewstep.distill(config=file, out="run", overrides=SMALL).is_file()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "name"), [("sd15", "SD 1.5"), ("sdxl", "SDXL"), ("sd3", "SD 3"), ("flux", "Flux dev")]
)
def test_the_counts_are_those_of_the_real_networks(model: str, name: str) -> None:
    """On meta tensors: weights, matrices of linear layers, adapter, and what a sample holds in a step."""
    import scale
    from torch import nn

    from fewstep.training.live_bytes import LiveBytes
    from fewstep.training.offload import swapped_blocks
    from fewstep.training.roles import add_adapter

    shape, known = scale.SHAPES[name], MODELS[model]
    with scale.on_paper():
        network = shape.network().requires_grad_(False)
        linear = sum(module.weight.numel() for module in network.modules() if type(module) is nn.Linear)
        assert sum(weight.numel() for weight in network.parameters()) == known.weights
        blocks = [sum(weight.numel() for weight in block.parameters()) for block in swapped_blocks(network)]
        assert (max(blocks), known.weights - sum(blocks)) == (known.largest, known.outside)
        assert known.matrices == pytest.approx(linear, rel=0.02)  # time embedding and output layers stay wide
        with torch.no_grad(), LiveBytes() as drawn:
            shape.call(network, 1)
        assert drawn.peak / GIB == pytest.approx(known.drawn, rel=0.02)
        add_adapter(network, "student", 64, 64, list(FAMILIES[shape.family].targets), 0)
        adapter = sum(weight.numel() for weight in network.parameters()) - known.weights
        assert adapter == 64 * known.adapter
        network.to(torch.bfloat16)
        assert scale.sample_holds(network, shape) / GIB == pytest.approx(known.held, rel=0.02)
        network.enable_gradient_checkpointing()
        assert scale.sample_holds(network, shape) / GIB == pytest.approx(known.recomputed, rel=0.02)


@pytest.mark.slow
def test_a_network_of_fewer_blocks_is_counted_as_the_whole() -> None:
    import cards

    one, known = cards.sizes_of(cards.MODELS["SD 3"]), MODELS["sd3"]
    assert (one.weights, one.adapter) == (known.weights, known.adapter)
    assert one.resident == 2 * known.largest + known.outside
    assert one.sample / GIB == pytest.approx(known.recomputed, rel=0.05)
    assert cards.bases(one)[2] == pytest.approx(base_bytes(known, "bf16", True) / GIB)
