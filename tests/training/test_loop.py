"""The training loop on problems small enough to be known."""

from __future__ import annotations

import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fewstep.common.accelerator import make_accelerator
from fewstep.common.errors import UserError
from fewstep.common.rng import KeyedRng
from fewstep.common.tensors import load_tensors
from fewstep.diffusion.time_conditioning import EXTRA_PREFIX
from fewstep.training import checkpoint
from fewstep.training.config import LoopConfig, OptimConfig, learning_rate
from fewstep.training.ema import Ema
from fewstep.training.loop import train
from fewstep.training.loss import Loss
from fewstep.training.optim import clip_gradients, make_optimizer
from fewstep.training.run_folder import RunLog, checkpoints
from fewstep.training.update import Batch, EmaTarget, Update
from support.small_runs import CPU, GOAL, Settings, lines, run, single, squared, weights


def test_the_loss_falls_to_the_minimum(tmp_path: Path) -> None:
    w = weights()
    done = run(tmp_path, single(w), steps=150)
    logged = [line["w/loss"] for line in lines(tmp_path)]
    assert len(logged) == 150
    assert np.mean(logged[-5:]) < 0.02 * np.mean(logged[:5])
    torch.testing.assert_close(done.weights["w"]["w"], GOAL, atol=0.05, rtol=0)


def test_four_micro_batches_equal_one_batch(tmp_path: Path) -> None:
    ends = []
    for accumulate in (1, 4):
        w = weights()
        run(tmp_path / str(accumulate), single(w), steps=20, batch=8, accumulate=accumulate)
        ends.append(w.detach().clone())
    torch.testing.assert_close(*ends, atol=1e-6, rtol=0)
    one, four = (lines(tmp_path / name) for name in ("1", "4"))
    for a, b in zip(one, four, strict=True):
        assert a["w/loss"] == pytest.approx(b["w/loss"], rel=1e-5)
        assert a["w/grad_norm"] == pytest.approx(b["w/grad_norm"], rel=1e-4)
        assert {k for k in a if "loss_t" in k} == {k for k in b if "loss_t" in k}


def test_clipping_scales_to_the_limit_and_reports_the_norm_before() -> None:
    def with_gradients() -> list[nn.Parameter]:
        parts = [nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(2))]
        parts[0].grad, parts[1].grad = torch.tensor([3.0]), torch.tensor([0.0, 4.0])
        return parts

    parts = with_gradients()
    assert float(clip_gradients(parts, 1.0)) == pytest.approx(5.0)
    torch.testing.assert_close(parts[0].grad, torch.tensor([0.6]))
    torch.testing.assert_close(parts[1].grad, torch.tensor([0.0, 0.8]))
    for limit in (None, 6.0):
        parts = with_gradients()
        assert float(clip_gradients(parts, limit)) == pytest.approx(5.0)
        assert parts[0].grad is not None
        assert parts[0].grad.item() == pytest.approx(3.0)
    assert float(clip_gradients([nn.Parameter(torch.zeros(1))], 1.0)) == 0.0


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_the_fused_optimiser_is_adamw_over_any_layout_and_after_a_resume(layout: torch.memory_format) -> None:
    def conv() -> nn.Parameter:
        drawn = torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(0))
        return nn.Parameter(drawn.contiguous(memory_format=layout))

    config = OptimConfig(lr=1e-2, weight_decay=0.1)
    plain, ours = conv(), conv()
    by_hand = torch.optim.AdamW([plain], lr=1e-2, weight_decay=0.1, betas=config.betas, eps=config.eps, foreach=False)
    fused = make_optimizer([ours], config)
    x = torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(1))
    for step in range(4):
        for weight, optimizer in ((plain, by_hand), (ours, fused)):
            optimizer.zero_grad()
            nn.functional.conv2d(x, weight).cos().sum().backward()
            optimizer.step()
        if step == 1:
            held = {name: value.clone() for name, value in checkpoint.optimizer_tensors(fused, ["w"]).items()}
            fused = make_optimizer([ours], config)
            checkpoint.restore_optimizer(fused, ["w"], held)
    assert (ours - conv()).abs().max() > 0.02
    torch.testing.assert_close(ours, plain, rtol=0, atol=1e-6)


def test_averages_follow_their_laws(tmp_path: Path) -> None:
    """The average for use warms up, min(mu, (1 + n)/(10 + n)); a target has the papers' constant decay."""
    w, target = weights(), torch.zeros(2)
    seen: list[Tensor] = []

    def evaluate_weights(step: int, judged: Any) -> dict[str, float]:
        seen.append(w.detach().clone())
        return {}

    start = w.detach().clone()
    update = Update("w", {"w": w}, squared(w), OptimConfig(lr=0.05, ema=0.3), ema_target=EmaTarget({"w": target}, 0.75))
    done = run(tmp_path, [update], steps=4, validate=evaluate_weights, validate_every=1)
    average, followed = start.clone(), start.clone()
    for n, value in enumerate(seen, start=1):
        mu = min(0.3, (1 + n) / (10 + n))
        average = mu * average + (1 - mu) * value
        followed = 0.75 * followed + 0.25 * value
    torch.testing.assert_close(done.weights["w"]["w"], average)
    torch.testing.assert_close(target, followed)
    assert not torch.equal(done.weights["w"]["w"], w.detach())


def test_an_average_starts_as_a_copy() -> None:
    w = {"w": torch.tensor([1.0])}
    ema = Ema(w, 0.5, warm_up=False)
    ema.update({"w": torch.tensor([3.0])})
    assert ema.shadow["w"].item() == 2.0
    assert w["w"].item() == 1.0
    ema.copy_from({"w": torch.tensor([7.0])})
    assert (ema.shadow["w"].item(), w["w"].item()) == (7.0, 1.0)


@pytest.mark.parametrize(
    ("law", "step", "expected"),
    [
        ("constant", 0, 0.25),  # warm-up: (step + 1)/4
        ("constant", 3, 1.0),
        ("constant", 23, 1.0),
        ("linear", 4, 1.0),
        ("linear", 14, 0.5),
        ("linear", 24, 0.0),
        ("cosine", 4, 1.0),
        ("cosine", 9, 0.5 * (1 + math.cos(math.pi / 4))),
        ("cosine", 14, 0.5),
        ("cosine", 24, 0.0),
        ("cooldown", 14, 1.0),
        ("cooldown", 20, 1.0),
        ("cooldown", 22, 0.5),
        ("cooldown", 24, 0.0),
    ],
)
def test_learning_rate_laws(law: str, step: int, expected: float) -> None:
    config = OptimConfig(lr=2.0, warmup=4, decay=law)  # type: ignore[arg-type]
    assert learning_rate(config, step, 24) == pytest.approx(2 * expected, abs=1e-12)


def test_loss_by_timestep_bin_sums_right(tmp_path: Path) -> None:
    w = weights()
    per_sample = torch.tensor([1.0, 3.0, 5.0, 7.0])
    t = torch.tensor([0.0, 0.05, 0.35, 1.0], dtype=torch.float64)

    def loss(batch: Batch, rng: KeyedRng) -> Loss:
        return Loss(w.sum() * 0 + per_sample.mean(), per_sample, t, {"extra": torch.tensor(rng.step + 1.0)})

    run(tmp_path, [Update("w", {"w": w}, loss, OptimConfig())], steps=4, log_every=2)
    first, second = lines(tmp_path)
    for line in (first, second):
        bins = {key: value for key, value in line.items() if "loss_t" in key}
        assert bins == {"w/loss_t0.0": 2.0, "w/loss_t0.3": 5.0, "w/loss_t0.9": 7.0}
        assert line["w/loss"] == 4.0
    assert (first["w/extra"], second["w/extra"]) == (1.5, 3.5)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_what_is_not_finite_is_refused_and_never_saved(tmp_path: Path, where: str) -> None:
    w = weights()
    good = squared(w)

    def loss(batch: Batch, rng: KeyedRng) -> Loss:
        ok = good(batch, rng)
        if rng.step < 5:
            return ok
        if where == "loss":
            return Loss(ok.value * float("nan"))
        return Loss((w - w.detach()).abs().sqrt().sum())  # 0, with an infinite slope

    plan = [Update("w", {"w": w}, loss, OptimConfig(lr=0.05))]
    with pytest.raises(UserError, match=r"not finite at step 6; the checkpoint at step 5 is finite.*optim.lr"):
        run(tmp_path, plan, steps=20, log_every=20, save_every=1, keep=2)
    found = checkpoints(tmp_path / "checkpoints")
    assert [path.name for path in found] == ["step-00000004", "step-00000005"]
    for file in found[-1].glob("*.safetensors"):
        assert all(tensor.isfinite().all() for tensor in load_tensors(file).values())


def test_two_updates_keep_their_rhythm_and_their_own_gradients(tmp_path: Path) -> None:
    a, b, exclusive = weights(), weights(), weights()
    steps: dict[str, list[int]] = {"a": [], "b": []}

    def loss_a(batch: Batch, rng: KeyedRng) -> Loss:
        steps["a"].append(rng.step)
        return Loss(((a - GOAL).square() + 10 * b * a).sum())  # runs through b too

    def loss_b(batch: Batch, rng: KeyedRng) -> Loss:
        steps["b"].append(rng.step)
        return squared(b)(batch, rng)

    optim = OptimConfig(lr=0.05, decay="linear")
    plan = [Update("a", {"w": a}, loss_a, optim), Update("b", {"w": b}, loss_b, optim, every=3)]
    run(tmp_path / "both", plan, steps=8)
    assert steps == {"a": list(range(8)), "b": [0, 3, 6]}
    run(tmp_path / "alone", [Update("b", {"w": exclusive}, squared(exclusive), optim, every=3)], steps=8)
    assert torch.equal(b, exclusive)
    # three updates of a linear law: rates lr, 2/3 lr, 1/3 lr; the last one still moves
    state = load_tensors(tmp_path / "both" / "checkpoints" / "step-00000008" / "b.optimizer.safetensors")
    assert state["w|step"].item() == 3
    assert [learning_rate(optim, n, 3) / 0.05 for n in range(3)] == pytest.approx([1, 2 / 3, 1 / 3])


@pytest.mark.parametrize("stop", [3, 7])
def test_a_late_update_begins_at_its_share_of_the_run(stop: int, tmp_path: Path) -> None:
    """Before it nothing of it moves; a run that stops before or after its start resumes bit for bit."""
    steps: list[int] = []

    def plan() -> tuple[list[Update], nn.Parameter]:
        a, b = weights(), weights()

        def late(batch: Batch, rng: KeyedRng) -> Loss:
            steps.append(rng.step)
            return squared(b)(batch, rng)

        optim = OptimConfig(lr=0.05, ema=0.9)
        return [Update("a", {"w": a}, squared(a), optim), Update("b", {"w": b}, late, optim, start=0.35)], b

    whole, b = plan()
    run(tmp_path / "whole", whole, steps=10, save_every=1)
    assert steps == list(range(4, 10))
    kept = load_tensors(tmp_path / "whole" / "checkpoints" / "step-00000010" / "b.safetensors")
    assert torch.equal(kept["w"], b)
    cut, b = plan()
    with pytest.raises(StopError):
        run(tmp_path / "cut", stopped_at(stop, cut), steps=10, save_every=1)
    assert torch.equal(b, weights()) == (stop < 4)
    again, _ = plan()
    run(tmp_path / "cut", again, steps=10, save_every=1)
    for one, other in zip(whole, again, strict=True):
        assert torch.equal(one.parameters["w"], other.parameters["w"])


def test_updates_that_run_through_each_other_do_not_feel_the_split_into_micro_batches(tmp_path: Path) -> None:
    """All gradients of a step are taken at the weights of its start."""

    def both(accumulate: int) -> tuple[nn.Parameter, nn.Parameter]:
        a, b = weights(), weights()

        def loss_a(batch: Batch, rng: KeyedRng) -> Loss:
            return Loss((a - b - rng.normal("x", (2,))).square().sum(1).mean())

        def loss_b(batch: Batch, rng: KeyedRng) -> Loss:
            return Loss((b + 2 * a - rng.normal("x", (2,))).square().sum(1).mean())

        optim = OptimConfig(lr=0.05)
        plan = [Update("a", {"w": a}, loss_a, optim), Update("b", {"w": b}, loss_b, optim)]
        run(tmp_path / str(accumulate), plan, steps=5, batch=4, accumulate=accumulate)
        return a, b

    for once, split in zip(both(1), both(4), strict=True):
        torch.testing.assert_close(once, split, rtol=1e-5, atol=1e-6)


def test_the_rate_of_a_rare_update_runs_over_its_own_count(tmp_path: Path) -> None:
    w = weights()
    before: list[Tensor] = []

    def loss(batch: Batch, rng: KeyedRng) -> Loss:
        before.append(w.detach().clone())
        return squared(w)(batch, rng)

    run(tmp_path, [Update("w", {"w": w}, loss, OptimConfig(lr=0.05, decay="linear"), every=3)], steps=8)
    assert not torch.equal(w.detach(), before[-1])


def test_a_batch_that_cannot_be_split_is_refused(tmp_path: Path) -> None:
    for batch, accumulate in ((6, 4), (2, 4), (31, 2)):
        with pytest.raises(ValueError, match=rf"batch = {batch} .*accumulate = {accumulate}"):
            LoopConfig(batch=batch, accumulate=accumulate)

    class Two:  # a launch of two processes
        num_processes, process_index, is_main_process, device, scaler = 2, 0, True, CPU, None

    w = weights()
    with pytest.raises(UserError, match="2 processes") as refused:
        run(tmp_path, single(w), steps=1, batch=5, accelerator=Two())
    assert refused.value.field == "loop.batch"


class StopError(Exception):
    """A run that is cut short."""


def stopped_at(step: int, plan: list[Update]) -> list[Update]:
    first = plan[0]

    def loss(batch: Batch, rng: KeyedRng) -> Loss:
        if rng.step == step:
            raise StopError
        return first.loss(batch, rng)

    cut = Update(first.name, first.parameters, loss, first.optim, first.every, first.ema_target)
    return [cut, *plan[1:]]


@pytest.mark.parametrize("cut", [1, 7])
def test_a_resumed_log_has_every_step_once(tmp_path: Path, cut: int) -> None:
    """Stopped before the first checkpoint, and after the second."""
    w = weights()
    with pytest.raises(StopError):
        run(tmp_path, stopped_at(cut, single(w)), steps=10, save_every=3)
    assert [line["step"] for line in lines(tmp_path)] == list(range(1, cut + 1))
    with (tmp_path / "log.jsonl").open("a") as stream:
        stream.write('{"step": 8, "ti')  # a line cut off by a kill
    run(tmp_path, single(weights()), steps=10, save_every=3)
    assert [line["step"] for line in lines(tmp_path)] == list(range(1, 11))


def test_a_checkpoint_with_the_old_prefix_of_extra_embeddings_is_resumed(tmp_path: Path) -> None:
    ends = []
    for name in ("told.w", f"{EXTRA_PREFIX}w"):
        w = weights()
        plan = [Update("w", {name: w}, squared(w), OptimConfig(lr=0.05, ema=0.3))]
        run(tmp_path / "run", plan, steps=2 + len(ends), save_every=1)
        ends.append(w)
    whole = weights()
    run(tmp_path / "whole", single(whole, ema=0.3), steps=3, save_every=1)
    assert torch.equal(ends[1], whole)


def test_a_run_is_not_resumed_in_another_precision(tmp_path: Path) -> None:
    """`auto` may mean another one on another machine: the steps would not be the same."""
    run(tmp_path, single(weights()), steps=3)
    with pytest.raises(UserError, match="holds a run in fp32 on cpu, this is bf16 on cpu"):
        run(tmp_path, single(weights()), steps=5, accelerator=make_accelerator("bf16", CPU))


@pytest.mark.parametrize("log_every", [1, 3])
def test_resuming_equals_going_on(log_every: int, tmp_path: Path) -> None:
    """Two updates, averages, accumulation, a falling rate: weights, averages and figures bit for bit.

    So too where the last checkpoint was taken between two log lines.
    """

    def plan() -> tuple[list[Update], Tensor]:
        a, b, target = weights(), weights(), torch.zeros(2)
        optim = OptimConfig(lr=0.05, decay="cosine", ema=0.9, weight_decay=0.01)
        first = Update("a", {"w": a}, squared(a), optim, ema_target=EmaTarget({"w": target}, 0.9))
        return [first, Update("b", {"w": b}, squared(b), optim, every=2)], target

    whole, target = plan()
    loop = {"steps": 11, "save_every": 4, "accumulate": 2, "log_every": log_every}
    expected = run(tmp_path / "whole", whole, **loop)
    cut, _ = plan()
    with pytest.raises(StopError):
        run(tmp_path / "cut", stopped_at(9, cut), **loop)
    again, target_again = plan()
    resumed = run(tmp_path / "cut", again, **loop)
    for name in ("a", "b"):
        assert torch.equal(expected.weights[name]["w"], resumed.weights[name]["w"])
    for one, other in zip(whole, again, strict=True):
        assert torch.equal(one.parameters["w"], other.parameters["w"])
    assert torch.equal(target, target_again)
    figures = [
        [{k: v for k, v in line.items() if k != "time"} for line in lines(tmp_path / n)] for n in ("whole", "cut")
    ]
    assert figures[0] == figures[1]


def test_a_run_can_be_made_longer_but_is_not_taken_back(tmp_path: Path) -> None:
    run(tmp_path, single(weights()), steps=4)
    longer = weights()
    assert run(tmp_path, single(longer), steps=6).step == 6
    whole = weights()
    run(tmp_path / "whole", single(whole), steps=6)
    assert torch.equal(longer, whole)
    shorter = run(tmp_path, single(weights()), steps=5)
    assert shorter.step == 6
    assert torch.equal(shorter.weights["w"]["w"], whole)


def test_a_run_folder_keeps_to_one_config(tmp_path: Path) -> None:
    def log(**optim: Any) -> None:
        config = Settings(loop=LoopConfig(steps=3 + len(optim), save_every=1 + len(optim)), optim=OptimConfig(**optim))
        RunLog(tmp_path, config, title="test", quiet=True)

    log()
    log(lr=1e-4)  # the default, given; steps and save_every are free
    with pytest.raises(UserError, match=r"another optim.lr \(0.0001, now 0.001\)"):
        log(lr=1e-3)
    file = tmp_path / "config.yaml"
    file.write_text(file.read_text().replace("  clip: 1.0\n", ""))
    log()  # written before there was a clip: the default counts
    assert "clip: 1.0" in file.read_text()


def test_what_killed_runs_left_is_swept_away(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    for name in (".step-00000002.abc.part", ".step-00000001.gone"):
        (folder / name).mkdir(parents=True)
        (folder / name / "w.safetensors").write_bytes(b"half")
    (tmp_path / ".student.abc.part").write_text("half")
    run(tmp_path, single(weights()), steps=2, save_every=1, keep=1)
    assert [path.name for path in folder.iterdir()] == ["step-00000002"]
    assert not (tmp_path / ".student.abc.part").exists()


def test_an_error_of_fetch_is_raised(tmp_path: Path) -> None:
    def broken(items: np.ndarray, rng: KeyedRng) -> Batch:
        raise UserError("gone")

    config = Settings(loop=LoopConfig(steps=1, batch=4))
    log = RunLog(tmp_path, config, title="test", quiet=True)
    with pytest.raises(UserError, match="gone"):
        train(single(weights()), broken, 12, config.loop, log, make_accelerator("fp32", CPU))


def test_precisions_may_change_within_a_process() -> None:
    for precision, mixed in (("fp32", "no"), ("bf16", "bf16"), ("fp32", "no")):
        assert make_accelerator(precision, CPU).mixed_precision == mixed
    with pytest.raises(UserError, match=r"fp16.*needs a GPU.*bf16"):
        make_accelerator("fp16", CPU)


class Scaling:
    """An accelerator with fp16's gradient scaler, on the CPU."""

    num_processes, process_index, is_main_process, device = 1, 0, True, CPU
    mixed_precision = "fp16"

    def __init__(self) -> None:
        self.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000)

    def autocast(self) -> Any:
        return nullcontext()

    def backward(self, loss: Tensor, **options: Any) -> None:
        self.scaler.scale(loss).backward(**options)


def test_scaled_gradients_are_unscaled_before_clipping_and_overflows_skipped(tmp_path: Path) -> None:
    plain, scaled = weights(), weights()
    run(tmp_path / "plain", single(plain, clip=0.1), steps=6)
    run(tmp_path / "scaled", single(scaled, clip=0.1), steps=6, accelerator=Scaling())
    torch.testing.assert_close(plain, scaled, atol=1e-6, rtol=0)
    norms = [[line["w/grad_norm"] for line in lines(tmp_path / n)] for n in ("plain", "scaled")]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)

    w, accelerator = weights(), Scaling()

    plan = single(w)
    hook = w.register_hook(lambda grad: grad * float("inf"))
    run(tmp_path / "over", plan, steps=1, accelerator=accelerator)
    assert torch.equal(w, weights())  # the step was skipped
    assert accelerator.scaler.get_scale() == 512.0
    hook.remove()
    resumed = Scaling()
    run(tmp_path / "over", plan, steps=2, accelerator=resumed)
    assert resumed.scaler.get_scale() == 512.0  # the scale came back with the checkpoint
    assert not torch.equal(w, weights())
