"""Other ways to compute the same step: compiled networks, narrow frozen weights, narrow moments."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from fewstep.common import compilation as compiled
from fewstep.common.compilation import compile_networks, eagerly
from fewstep.common.config import UserError, validate
from fewstep.common.cpu_kernels import speed_up
from fewstep.common.rng import KeyedRng
from fewstep.diffusion.config import Sampling
from fewstep.diffusion.denoiser import Denoiser
from fewstep.diffusion.schedule import scaled_linear
from fewstep.distillation import distill as distillation
from fewstep.distillation import prepare as preparation
from fewstep.distillation.config import resolve
from fewstep.distillation.prepare import prepare
from fewstep.inference import generator as drawing
from fewstep.methods.config import ConsistencyConfig
from fewstep.methods.consistency import make_pair
from fewstep.methods.pair import MicroBatch
from fewstep.training.roles import AdapterRoles, add_adapter

GRAPHS = ["student with gradient", "student", "fake", "teacher"]


class Small(nn.Module):
    """Two layers around a non-linearity, called as a UNet is: inductor compiles a UNet for minutes."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q = nn.Linear(64, 32)
        self.to_out = nn.Linear(32, 64)

    def forward(self, x: Tensor, t: Tensor, encoder_hidden_states: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        rows = x[..., :8, :8].reshape(len(x), -1, 64)
        hidden = torch.nn.functional.silu(self.to_q(rows)) + encoder_hidden_states.mean((1, 2))[:, None, None]
        return (self.to_out(hidden * (1 + t / 1000).reshape(-1, 1, 1)),)


def unet() -> nn.Module:
    """The smallest one that has attention."""
    from diffusers import UNet2DConditionModel

    network = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(16,), cross_attention_dim=8,
        down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",), layers_per_block=1,
        attention_head_dim=2, norm_num_groups=4,
    )  # fmt: skip
    speed_up(network)
    made: nn.Module = network
    return made


def make_roles(network: nn.Module) -> AdapterRoles:
    """Two adapters whose outputs are not zero from the start."""
    network.requires_grad_(False)
    for number, role in enumerate(("student", "fake")):
        add_adapter(network, role, 2, 2, ["to_q", "conv1"], number)
    roles = AdapterRoles(network)
    for role in ("student", "fake"):
        for name, weight in roles.parameters(role).items():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.3)
    return roles


def outputs(roles: AdapterRoles) -> dict[str, list[Tensor]]:
    """Each role's outputs, twice in turn; the student's gradients too, others called between forward and backward."""
    generator = torch.Generator().manual_seed(1)
    x, states = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 3, 8, generator=generator)
    t = torch.tensor([500.0, 20.0])

    def call(role: str, twice: bool = False) -> Tensor:
        n = 2 if twice else 1
        with roles.use(role) as network:
            out: Tensor = network(
                torch.cat([x] * n), torch.cat([t] * n), encoder_hidden_states=torch.cat([states] * n), return_dict=False
            )[0]
        return out

    found: dict[str, list[Tensor]] = {name: [] for name in GRAPHS}
    for _ in range(2):
        landed = call("student")
        with torch.no_grad():
            found["teacher"].append(call("teacher", twice=True))
            found["student"].append(call("student"))
            found["fake"].append(call("fake"))
        weights = list(roles.parameters("student").values())
        gradients = torch.autograd.grad(landed.square().mean(), weights)
        found["student with gradient"] += [landed.detach(), *gradients]
    return found


COMPILER = pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")),
    reason="inductor, loop.compile's own back end, is NOT tested here: no g++ or clang++ on the PATH",
)


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "network"), [("aot_eager", unet), pytest.param("inductor", Small, marks=COMPILER)])
def test_compiled_roles_are_the_eager_ones(backend: str, network: Callable[[], nn.Module]) -> None:
    """To 1e-4, each its own; at one shape one graph a role, and one for the student's gradient."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    torch.manual_seed(0)
    roles = make_roles(network())
    wanted = outputs(roles)
    counter = CompileCounterWithBackend(backend)
    compile_networks([roles.network], counter)
    try:
        found = outputs(roles)
        assert counter.frame_count == len(GRAPHS)
        for name, tensors in wanted.items():
            for a, b in zip(tensors, found[name], strict=True):
                assert float((a - b).abs().max()) <= 1e-4 * float(a.abs().max()), name
        student, teacher = found["student"][0], found["teacher"][0][:2]
        assert float((student - teacher).abs().max()) > 1e-2 * float(teacher.abs().max())
        with eagerly(), torch.no_grad(), roles.use("student") as eager:  # another shape makes no graph there
            eager(torch.zeros(1, 4, 16, 16), torch.tensor([3.0]), encoder_hidden_states=torch.zeros(1, 3, 8))
        assert counter.frame_count == len(GRAPHS)
    finally:
        torch._dynamo.reset()


@pytest.mark.parametrize(("batch", "graphs"), [(8, range(4, 5)), (6, range(4, 7))])
def test_a_compiled_roll_out_has_a_graph_a_round(batch: int, graphs: range) -> None:
    """As many shapes as it has rounds, in whichever step, where the batch is of whole turns; few more in others."""
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    torch.manual_seed(0)
    counter, network = CompileCounter(), Small().requires_grad_(False)
    compile_networks([network], counter)

    def call(x: Tensor, t: Tensor, condition: Any, role: str) -> Tensor:
        network(x, t.float(), condition["text"])
        return torch.zeros_like(x)

    method = validate(ConsistencyConfig, {
        "start": "rollout", "rollout": 4, "grid": 20, "k": 1, "s": "edge", "end": "clean",
        "guidance": {"convention": "none"},
    })  # fmt: skip
    sample = MicroBatch(torch.zeros(batch, 4, 8, 8), {"text": torch.zeros(batch, 3, 8)}, {})
    try:
        for step in range(12):
            rng = KeyedRng(0, step, tuple(range(step * batch, (step + 1) * batch)))
            make_pair(method, Denoiser(call, scaled_linear(), "eps"), sample, rng)
        assert counter.frame_count in graphs
    finally:
        torch._dynamo.reset()


def run(overrides: list[str], out: Path, cache: Path, *words: str) -> dict[str, Tensor]:
    config = resolve("tcd", None, [*overrides, "student.rank=2", "loop.steps=4", *words])
    distillation.distill(config, out, cache=cache, quiet=True)
    return load_file(out / "checkpoints" / "step-00000004" / "student.safetensors")


def losses(out: Path) -> list[float]:
    return [json.loads(line)["student/loss"] for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_compiled_run_learns_the_same(
    tiny_overrides: list[str], tiny_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With gradient checkpointing, too; validation draws at another batch size beside it."""
    monkeypatch.setattr(compile_networks, "__defaults__", ("aot_eager",))
    plain = run(tiny_overrides, tmp_path / "plain", tiny_cache)
    folded = run(tiny_overrides, tmp_path / "folded", tiny_cache, "loop.compile=true", "student.checkpointing=true")
    torch._dynamo.reset()
    assert losses(tmp_path / "folded") == pytest.approx(losses(tmp_path / "plain"), rel=1e-4)
    for name, weight in plain.items():
        torch.testing.assert_close(folded[name], weight, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_a_compiled_generator_draws_the_same(tiny_pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One graph and one shape, left-over pictures included: each is drawn as it would be in any other place."""
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(compile_networks, "__defaults__", (counter,))
    sampling = Sampling(steps=2, gamma=0.5, grid=10)
    prompts, seeds = ["a red disc"] * 7, range(7)
    plain = drawing.load_image_generator(tiny_pipeline)
    wanted = plain.latents(plain.encode(prompts), seeds, sampling)
    shapes: set[int] = set()
    torch._dynamo.reset()
    try:
        folded = drawing.load_image_generator(tiny_pipeline, compiled=True, batch=3)
        call = folded.denoiser.call

        def noted(x: Tensor, t: Tensor, condition: Any, role: str) -> Tensor:
            shapes.add(len(x))
            return call(x, t, condition, role)

        folded = replace(folded, denoiser=replace(folded.denoiser, call=noted))
        found = folded.latents(folded.encode(prompts), seeds, sampling)
    finally:
        torch._dynamo.reset()
    assert counter.frame_count == 1
    assert shapes == {3}
    assert float((found - wanted).abs().max()) < 1e-4 * float(wanted.abs().max())


def test_pictures_are_drawn_in_batches_of_the_given_size(tiny_pipeline: Path) -> None:
    """All at once by default, and none twice; the pictures are the same."""
    sampling, prompts = Sampling(steps=1, grid=10), ["a red disc"] * 5
    drawn, sizes = [], []
    for batch in (None, 2):
        image_generator = drawing.load_image_generator(tiny_pipeline, batch=batch)
        calls: list[int] = []

        def call(x: Tensor, *rest: Any, plain: Any = image_generator.denoiser.call, calls: list[int] = calls) -> Tensor:
            calls.append(len(x))
            found: Tensor = plain(x, *rest)
            return found

        image_generator = replace(image_generator, denoiser=replace(image_generator.denoiser, call=call))
        drawn.append(image_generator.latents(image_generator.encode(prompts), range(5), sampling))
        sizes.append(calls)
    assert sizes == [[5], [2, 2, 1]]
    assert float((drawn[0] - drawn[1]).abs().max()) < 1e-4 * float(drawn[0].abs().max())


def test_every_bucket_has_graphs_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """None is left to run eagerly because there are many: the compiler would not report it."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    monkeypatch.setattr(compiled, "MOST_GRAPHS", 2)  # with gradient and without
    with torch._dynamo.config.patch(recompile_limit=1, accumulated_recompile_limit=1):
        counter, network = CompileCounterWithBackend("eager"), Small()
        compile_networks([network], counter, shapes=5)
        for rows in range(2, 7):
            inputs = torch.zeros(rows, 4, 8, 8), torch.zeros(rows), torch.zeros(rows, 3, 8)
            network(*inputs)
            with torch.no_grad():
                network(*inputs)
    assert counter.frame_count == 10


def test_a_run_in_buckets_is_compiled_for_all_of_them(
    tiny_overrides: list[str], tiny_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    monkeypatch.setattr(preparation, "compile_networks", lambda networks, *, shapes: calls.append(shapes))
    for i, size in enumerate([(96, 64), (64, 96), (64, 64)] * 4):
        Image.new("RGB", size, "red").save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text("a red bar\n")
    wide = [f"data.source={tmp_path}", "data.buckets=true", "data.size=64"]
    for words in ([], wide):
        prepare(resolve("tcd", None, [*tiny_overrides, "loop.compile=true", *words]), tiny_cache, torch.device("cpu"))
    assert calls == [1, 3]


narrow = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="extra `quantize` is missing")


@narrow
@pytest.mark.slow
@pytest.mark.parametrize("base", ["8bit", "4bit", "bf16"])
def test_a_student_learns_on_a_narrow_base(
    base: str, tiny_overrides: list[str], tiny_cache: Path, tmp_path: Path
) -> None:
    """Its own weights stay fp32, its losses are near those on the whole base, and the trained weights are separate."""
    words = [f"student.base={base}", "loop.precision=bf16"]
    if base != "bf16":
        words = [f"student.base={base}"]
    plain = run(tiny_overrides, tmp_path / "plain", tiny_cache, *words[1:])
    other = run(tiny_overrides, tmp_path / base, tiny_cache, *words)
    assert {weight.dtype for weight in other.values()} == {torch.float32}
    assert losses(tmp_path / base) != losses(tmp_path / "plain")
    assert losses(tmp_path / base) == pytest.approx(losses(tmp_path / "plain"), rel=0.3)
    for name, weight in plain.items():
        if "lora_B" in name:
            assert weight.any()
            assert other[name].any(), name


@narrow
@pytest.mark.parametrize(("base", "share"), [("8bit", 0.25), ("4bit", 0.125)])
def test_matrices_of_a_narrow_base_take_less_room(base: Any, share: float) -> None:
    from fewstep.training.quantization import quantize

    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 256), nn.Linear(256, 4)).requires_grad_(False)
    x = torch.randn(8, 256)
    wanted = network(x)
    quantize(network, base, torch.float32, [network[2]])
    assert network[0].weight.nbytes == share * 256 * 256 * 4
    assert network[2].weight.dtype == torch.float32
    error = (network(x) - wanted).norm() / wanted.norm()
    assert 1e-5 < float(error) < (0.03 if base == "8bit" else 0.2)


@narrow
@pytest.mark.parametrize("base", ["8bit", "4bit"])
def test_a_call_without_gradient_leaves_a_narrow_matrix_as_it_is(base: Any) -> None:
    """Some CPUs have a packed form for drawing alone, which a training step cannot read."""
    from fewstep.training.quantization import quantize

    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(64, 64)).requires_grad_(False).eval()
    quantize(network, base, torch.float32, [])
    x = torch.randn(8, 64)
    learns = x.clone().requires_grad_()
    before = network(learns)
    with torch.no_grad():
        network(x)
    after = network(learns)
    assert torch.equal(before, after)
    slopes = [torch.autograd.grad(out.sum(), learns)[0] for out in (before, after)]
    assert torch.equal(*slopes)
    assert slopes[0].abs().sum() > 0


@narrow
def test_narrow_moments_resume_bit_for_bit(tiny_overrides: list[str], tiny_cache: Path, tmp_path: Path) -> None:
    """Adapters of 2 x 4,096 numbers and more have moments of a byte a number, which files keep as they are."""
    words = ["optim.kind=adamw_8bit", "student.rank=64", "student.targets=[conv1]", "loop.save_every=2"]

    def go(out: Path, steps: int) -> Path:
        config = resolve("tcd", None, [*tiny_overrides, *words, f"loop.steps={steps}", "loop.keep=9"])
        distillation.distill(config, out, cache=tiny_cache, quiet=True)
        return out / "checkpoints"

    whole = go(tmp_path / "whole", 4)
    half = tmp_path / "half"
    shutil.copytree(tmp_path / "whole", half)
    shutil.rmtree(half / "checkpoints" / "step-00000004")
    resumed = go(half, 4)
    moments = load_file(whole / "step-00000004" / "student.optimizer.safetensors")
    assert sum(value.dtype == torch.uint8 for value in moments.values()) > 2
    for name in ("student", "student.optimizer"):
        first, second = (folder / "step-00000004" / f"{name}.safetensors" for folder in (whole, resumed))
        assert first.read_bytes() == second.read_bytes(), name


@pytest.mark.parametrize(("student", "teacher"), [("fp32", "bf16"), ("bf16", "fp32")])
def test_the_teacher_computes_in_a_type_of_its_own(
    tiny_overrides: list[str], tiny_cache: Path, student: str, teacher: str
) -> None:
    """Its layers compute in that type alone; the student's and the target's stay in the loop's."""
    words = [*tiny_overrides, f"loop.precision={student}", f"student.teacher_precision={teacher}"]
    run = prepare(resolve("tcd", None, words), tiny_cache, torch.device("cpu"))
    network: Any = run.backbone.network
    x, t = torch.randn(2, *run.backbone.latent_shape), torch.full((2,), 499.0, dtype=torch.float64)
    condition = run.data.states(torch.zeros(2, dtype=torch.int64), torch.device("cpu"))
    seen: list[torch.dtype] = []
    network.conv_out.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16, enabled=student == "bf16"):
        run.counted.call(x, t, condition, "student").float().sum().backward()
        with torch.no_grad():
            output = run.counted.call(x, t, condition, "teacher")
            run.counted.call(x, t, condition, "student")
    types = {"fp32": torch.float32, "bf16": torch.bfloat16}
    assert seen == [types[student], types[teacher], types[student]]
    assert run.nfe_counter == {"student": 4, "teacher": 2}
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=teacher == "bf16"):
        assert torch.equal(output, run.student.call(x, t, condition, "teacher"))


@pytest.mark.parametrize(
    ("words", "reason", "legal"),
    [
        (["student.base=bf16"], "loop.precision = 'fp32' does not go with student.base = 'bf16'", "bf16"),
        (
            [
                *("student.checkpointing=true", "method.adversarial.real=target"),
                *("method.adversarial.weight=0.1", "method.adversarial.r1=0.2"),
            ],
            "student.checkpointing = True does not go with method.adversarial.r1 = 0.2",
            "False",
        ),
        (["loop.shard=true", "loop.compile=true"], "loop.compile = True does not go with loop.shard = True", "False"),
        (["loop.shard=true", "student.base=4bit"], "student.base = '4bit' does not go with loop.shard = True", "fp32"),
        (["loop.shard=true", "optim.kind=adamw_8bit"], "optim.kind = 'adamw_8bit' does not go with loop.sh", "adamw"),
        (["loop.shard=true", "loop.precision=fp16"], "loop.precision = 'fp16' needs a loss scale", "bf16"),
        (["student.base=5bit"], "student.base = '5bit'", "8bit"),
        (
            ["student.base=bf16", "loop.precision=bf16", "student.teacher_precision=fp32"],
            "student.teacher_precision = 'fp32' does not go with student.base = 'bf16'",
            "bf16",
        ),
        (["loop.shard=true", "student.teacher_precision=bf16"], "student.teacher_precision = 'bf16' does not", "None"),
    ],
)
def test_what_does_not_go_together_is_refused(words: list[str], reason: str, legal: str) -> None:
    with pytest.raises(UserError) as refusal:
        resolve("tcd", None, words)
    message = str(refusal.value)
    assert reason in message
    assert "\n" not in message
    assert refusal.value.field == reason.split(" = ")[0]
    assert re.search(rf"(use|did you mean) '?{legal}'?\??$", message), message
