"""Blocks in main memory: the same bits as without, two resident at a time, adapters always on the device.

Main memory is the device here. A block's weights lie in a slot that the next block overwrites, so that a backward pass
which reads a block too late finds other weights.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fewstep.backbones.base import Backbone, load_backbone
from fewstep.common.errors import UserError
from fewstep.diffusion.denoiser import BASE, Condition
from fewstep.distillation import distill as distillation
from fewstep.distillation.config import resolve
from fewstep.distillation.estimate import estimate
from fewstep.distillation.prepare import prepare
from fewstep.training.config import StudentConfig
from fewstep.training.offload import ALIGNED, OffloadedBlocks, swapped_blocks
from fewstep.training.student import Student, make_student, unique_bytes
from support import tiny_pipelines

CPU = torch.device("cpu")
PROMPTS = ["a red disc", "a ring"]
narrow = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="extra `quantize` is missing")


def student_of(place: Path, base: str, offload: bool) -> tuple[Backbone, Student, OffloadedBlocks | None]:
    """A student and its target, whose adapters differ and are not zero."""
    backbone = load_backbone(place)
    config = StudentConfig(rank=2, checkpointing=True, offload=offload, base=base)  # type: ignore[arg-type]
    student = make_student(backbone, config, ("student", "target"), seed=0)
    for number, role in enumerate(("student", "target")):
        generator = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for weight in student.parameters(role).values():
                weight.copy_(0.1 * torch.randn(weight.shape, generator=generator))
    offloaded = OffloadedBlocks(backbone.network, CPU, student.roles.recompute) if offload else None
    return backbone, student, offloaded


def step(backbone: Backbone, student: Student, condition: Condition) -> list[Tensor]:
    """The outputs of two consistency steps, teacher and target called in them, and the student's gradients."""
    weights, found = list(student.parameters("student").values()), []
    for number in range(2):
        x = torch.randn(2, *backbone.latent_shape, generator=torch.Generator().manual_seed(number))
        t = torch.full((2,), backbone.path.noisiest / (2 + number), dtype=torch.float64)
        landed = student.call(x, t, condition, "student")
        with torch.no_grad():
            wanted = student.call(x + 0.1 * student.call(x, t, condition, BASE), t, condition, "target")
        loss = (landed - wanted).square().sum()
        grads = torch.autograd.grad(loss, weights, allow_unused=True, materialize_grads=True)
        found += [landed.detach(), wanted, *grads]
    return found


def alike(place: Path, base: str = "fp32") -> OffloadedBlocks:
    """Assert that steps with and without offloading have the same bits; return the offloaded blocks."""
    backbone, student, _ = student_of(place, base, False)
    condition = backbone.encode(PROMPTS)
    if backbone.embedded_guidance:
        condition = {**condition, "guidance": torch.tensor([2.0, 4.0])}
    plain = step(backbone, student, condition)
    backbone, student, offloaded = student_of(place, base, True)
    assert offloaded
    moved = step(backbone, student, condition)
    assert sum(bool(value.any()) for value in plain) > 0.8 * len(plain), "a last text branch has no part in the output"
    assert all(torch.equal(one, other) for one, other in zip(plain, moved, strict=True))
    return offloaded


FAST = {"sd", "sd3"}
REST = sorted(set(tiny_pipelines.FAMILIES) - FAST)
KINDS = [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in tiny_pipelines.FAMILIES]


@pytest.mark.parametrize("kind", KINDS)
def test_steps_have_the_bits_of_steps_without(kind: str, tmp_path: Path) -> None:
    """Of every family: its blocks are found, and each is resident in its own backward pass."""
    assert len(alike(tiny_pipelines.FAMILIES[kind](tmp_path / kind)).resident) == 2


@narrow
def test_a_base_in_4_bits_is_moved_with_its_scales(tmp_path: Path) -> None:
    offloaded = alike(tiny_pipelines.sd3(tmp_path / "sd3"), "4bit")
    matrices = [part for block in offloaded.resident for part in block.modules() if type(part).__name__ == "Linear4bit"]
    matrices = [part for part in matrices if hasattr(part.weight, "quant_state")]
    assert matrices
    for part in matrices:
        for tensor in (part.weight, part.weight.quant_state.absmax):
            assert tensor.untyped_storage().data_ptr() in offloaded.storages


def test_two_blocks_are_resident_and_adapters_stay(tmp_path: Path) -> None:
    backbone, student, offloaded = student_of(tiny_pipelines.sd(tmp_path / "sd"), "fp32", True)
    assert offloaded
    blocks = swapped_blocks(backbone.network)
    slots = {slot.memory.untyped_storage().data_ptr() for slot in offloaded._slots}
    places = {name: weight.data_ptr() for name, weight in student.parameters("student").items()}
    seen: list[nn.Module] = []

    def on_device(block: nn.Module) -> bool:
        frozen = [weight for name, weight in block.named_parameters() if "lora_" not in name]
        inside = {weight.untyped_storage().data_ptr() in slots for weight in frozen}
        assert len(inside) == 1, "whole blocks"
        return inside.pop()

    def look(block: nn.Module) -> Any:
        def hook(*_: Any) -> None:
            resident = [each for each in blocks if on_device(each)]
            assert block in resident
            assert len(resident) <= 2
            assert set(resident) == set(offloaded.resident)
            seen.append(block)

        return hook

    for block in blocks:
        next(part for part in block.modules() if not list(part.children())).register_forward_hook(look(block))
    step(backbone, student, backbone.encode(PROMPTS))
    assert set(seen) == set(blocks)
    assert len(seen) == 2 * 4 * len(blocks), "student, teacher, target, and again in the backward pass"
    assert places == {name: weight.data_ptr() for name, weight in student.parameters("student").items()}


@pytest.mark.parametrize("kind", ["sd", "sd3", *(pytest.param(kind, marks=pytest.mark.slow) for kind in REST)])
def test_text_encoders_in_main_memory_read_the_same(kind: str, tmp_path: Path) -> None:
    place = tiny_pipelines.FAMILIES[kind](tmp_path / kind)
    plain, moved = load_backbone(place), load_backbone(place)
    moved.text_offload = True
    wanted, found = plain.encode(PROMPTS), moved.encode(PROMPTS)
    assert all(weight.is_meta for encoder in moved.text_encoders for weight in encoder.parameters())
    assert wanted.keys() == found.keys()
    assert all(torch.equal(value, found[name]) for name, value in wanted.items())


def test_a_block_that_followed_once_is_copied_ahead() -> None:
    class Row(nn.Module):
        _no_split_modules = ("Linear",)

        def __init__(self) -> None:
            super().__init__()
            self.rows = nn.ModuleList(nn.Linear(4, 4) for _ in range(4)).requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            for row in self.rows:
                x = row(x)
            return x

    network = Row()
    offloaded = OffloadedBlocks(network, CPU, lambda f, *args: checkpoint(f, *args, use_reentrant=False))
    rows = list(network.rows)
    loaded: list[int] = []
    load = offloaded._load
    offloaded._load = lambda block: (loaded.append(rows.index(block)), load(block))[1]  # type: ignore[method-assign]
    x = torch.ones(1, 4, requires_grad=True)
    network(x).sum().backward()
    assert loaded == [0, 1, 2, 3, 3, 2, 1, 0]
    loaded.clear()
    network(x).sum().backward()
    ahead = [(0, 1), (1, 2), (2, 3), (3, 3), (3, 2), (2, 1), (1, 0), (0, 0)]
    assert loaded == [row for pair in ahead for row in pair]


def test_bytes_are_those_of_two_blocks_and_the_rest(tiny_overrides: list[str], tiny_cache: Path) -> None:
    """By hand, and in the estimate of a step, whose activations do not change."""
    found = {}
    for words in (["student.checkpointing=true"], ["student.checkpointing=true", "student.offload=true"]):
        config = resolve("tcd", None, [*tiny_overrides, "loop.batch=2", *words])
        run = prepare(config, tiny_cache, CPU)
        found[len(words)] = run, estimate(run, run.update_plan())
    (whole, plain), (run, apart) = found[1], found[2]
    sizes = []
    for block in swapped_blocks(whole.backbone.network):
        frozen = [weight for name, weight in block.named_parameters() if "lora_" not in name]
        sizes.append((sum(w.nbytes for w in frozen), sum(-(-w.nbytes // ALIGNED) * ALIGNED for w in frozen)))
    outside = plain.base_bytes - sum(bare for bare, _ in sizes)
    assert outside > 0
    assert apart.base_bytes == outside + 2 * max(padded for _, padded in sizes)
    assert apart.offloaded_bytes == sum(padded for _, padded in sizes)
    assert plain.weights_bytes - apart.weights_bytes == plain.base_bytes - apart.base_bytes
    assert apart.saved_bytes == pytest.approx(plain.saved_bytes, rel=0.1)
    assert (plain.offloaded_bytes, plain.base_bytes) == (0, unique_bytes(run.backbone.fresh_network()))
    assert apart.step_bytes == apart.weights_bytes + apart.trained_bytes + apart.saved_bytes


def distilled(words: list[str], out: Path, cache: Path) -> Mapping[str, Tensor]:
    config = resolve("tcd", None, [*words, "student.rank=2", "student.checkpointing=true"])
    distillation.distill(config, out, cache=cache, quiet=True)
    return load_file(out / "checkpoints" / f"step-{config.loop.steps:08d}" / "student.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_run_may_be_resumed_with_its_blocks_in_main_memory(
    kind: str, tiny_overrides: list[str], tiny_cache: Path, tmp_path: Path
) -> None:
    words = [*tiny_overrides, f"student.kind={kind}"]
    plain = distilled([*words, "loop.steps=4"], tmp_path / "plain", tiny_cache)
    distilled([*words, "loop.steps=2"], tmp_path / "moved", tiny_cache)
    moved = distilled([*words, "loop.steps=4", "student.offload=true"], tmp_path / "moved", tiny_cache)
    assert all(torch.equal(weight, moved[name]) for name, weight in plain.items())


def test_features_of_the_teacher_have_their_gradient(tiny_overrides: list[str], tiny_cache: Path) -> None:
    found = []
    for offload in (False, True):
        words = [*tiny_overrides, "student.checkpointing=true", f"student.offload={offload}".lower()]
        run = prepare(resolve("tcd", None, words), tiny_cache, CPU)
        x = torch.randn(2, *run.backbone.latent_shape, generator=torch.Generator().manual_seed(0)).requires_grad_()
        condition = run.data.states(torch.zeros(2, dtype=torch.int64), CPU)
        maps = run.features(x, torch.full((2,), 499.0, dtype=torch.float64), condition)
        found.append(torch.autograd.grad(sum(each.square().sum() for each in maps), x)[0])
    assert found[0].any()
    assert torch.equal(*found)


@pytest.mark.parametrize(
    ("words", "field"),
    [
        (["student.checkpointing=false"], "student.checkpointing"),
        (["student.base=8bit"], "student.base"),
        (["loop.shard=true"], "student.offload"),
        (["loop.compile=true"], "loop.compile"),
    ],
)
def test_what_does_not_go_with_it_is_refused(words: list[str], field: str) -> None:
    with pytest.raises(UserError) as refusal:
        resolve("tcd", None, ["student.checkpointing=true", "student.offload=true", *words])
    assert refusal.value.field == field
    with pytest.raises(UserError) as refusal:
        OffloadedBlocks(nn.Linear(2, 2), CPU, checkpoint)
    assert refusal.value.field == "student.offload"
