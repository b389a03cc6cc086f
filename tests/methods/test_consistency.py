"""The consistency objective: its draws, its guidance, and that it is zero exactly where it should be."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fewstep.common.choices import Prediction, omega_of
from fewstep.common.config import validate
from fewstep.common.errors import UserError
from fewstep.common.rng import KeyedRng
from fewstep.diffusion.config import Guidance
from fewstep.diffusion.denoiser import BASE, Denoiser
from fewstep.diffusion.schedule import Estimate, interpret, scaled_linear, target_of
from fewstep.distillation.batches import fetch_of
from fewstep.distillation.config import resolve
from fewstep.methods import next_points as points
from fewstep.methods.config import ConsistencyConfig
from fewstep.methods.consistency import consistency_loss, make_pair, target_landing
from fewstep.methods.cost import step_calls
from fewstep.methods.distances import feature_distance, huber, huber_norm, l2
from fewstep.methods.pair import MicroBatch
from fewstep.methods.times import draw_times
from support.exact import Mixture, gaussian, three_modes, times_of

PATH = scaled_linear()
TCD = ConsistencyConfig()
LCM = ConsistencyConfig(s="edge", jump="skip", distance="huber")
STEPS = 400
"""Of the small student's training."""


def rng(count: int, step: int = 0, seed: int = 7) -> KeyedRng:
    return KeyedRng(seed, step, tuple(range(count)))


# ---- times


@pytest.mark.parametrize(("end", "value"), [("index0", 0.0), ("clean", -1.0)])
def test_times_lie_on_the_grid(end: Any, value: float) -> None:
    times = draw_times(ConsistencyConfig(end=end), PATH, rng(6_000))
    grid = torch.arange(1, 51, dtype=torch.float64) * 20 - 1
    assert set(times.t_nk.tolist()) == set(grid.tolist())
    assert set(times.t_n.tolist()) == {value, *grid[:-1].tolist()}
    lowest = times.t_nk == 19
    assert (times.t_nk - times.t_n)[~lowest].unique().tolist() == [20.0]
    assert times.t_n[lowest].unique().tolist() == [value]
    assert set(times.s.tolist()) <= {value, *grid[:-1].tolist()}
    assert bool((times.s <= times.t_n).all())
    assert bool(((times.s == times.t_n) & (times.t_n > 500)).any())  # both ends are drawn
    assert bool(((times.s == value) & (times.t_n > 500)).any())


def test_times_are_uniform() -> None:
    """n over the grid, and s over end .. t_n with both ends, by chi-square at 1 in 1000."""
    stats = pytest.importorskip("scipy.stats")
    times = draw_times(TCD, PATH, rng(25_000))
    counts = np.bincount(((times.t_nk + 1) / 20).long().numpy())[1:]
    assert stats.chisquare(counts).pvalue > 1e-3
    for t_nk, choices in ((999.0, 50), (199.0, 10), (39.0, 2)):
        s = times.s[times.t_nk == t_nk]
        place = torch.where(s == 0, 0, (s + 1) / 20).long().numpy()
        counts = np.bincount(place, minlength=choices)
        assert len(counts) == choices
        assert stats.chisquare(counts).pvalue > 1e-3


def test_a_wider_skip_and_the_end_rule() -> None:
    times = draw_times(ConsistencyConfig(k=3), PATH, rng(5_000))
    assert (times.t_nk - times.t_n)[times.t_nk > 59].unique().tolist() == [60.0]
    assert times.t_nk.unique().tolist() == [20.0 * i - 1 for i in range(1, 51)], "every time that sampling needs"
    assert times.t_n[times.t_nk <= 59].unique().tolist() == [0.0], "the grid ends there"
    assert times.s[times.t_nk <= 59].unique().tolist() == [0.0]
    assert times.s[times.t_nk == 119].unique().tolist() == [0.0, 19.0, 39.0, 59.0]
    zero = draw_times(LCM, PATH, rng(1_000))
    assert zero.s.unique().tolist() == [0.0]


def test_draws_do_not_depend_on_the_split() -> None:
    whole = draw_times(TCD, PATH, KeyedRng(3, 5, tuple(range(8))))
    part = draw_times(TCD, PATH, KeyedRng(3, 5, (2, 3)))
    for name in ("t_nk", "t_n", "s"):
        assert torch.equal(getattr(whole, name)[2:4], getattr(part, name))
    assert not torch.equal(whole.t_nk, draw_times(TCD, PATH, KeyedRng(3, 6, tuple(range(8)))).t_nk)


# ---- choices


def test_guidance_conventions() -> None:
    assert (omega_of(7.5, "lcm"), omega_of(7.5, "imagen")) == (7.5, 6.5)
    assert Guidance(convention="lcm", low=2, high=14).omegas == (2.0, 14.0)
    imagen = Guidance(convention="imagen", low=3, high=15)
    assert imagen.omegas == (2.0, 14.0)
    assert imagen.mean_omega == 8.0
    with pytest.raises(UserError) as error:
        validate(ConsistencyConfig, {"guidance": {"low": 5, "high": 1}})
    assert error.value.field == "guidance.high"


@pytest.mark.parametrize(("recipe", "override", "field"), [("lcm", "s=uniform", "jump"), ("tcd", "k=50", "k")])
def test_the_grid_and_the_skip_connection_bound_what_they_reach(recipe: str, override: str, field: str) -> None:
    with pytest.raises(UserError) as error:
        resolve(recipe, None, [f"method.{override}"])
    assert error.value.field == f"method.{field}"


def test_distances() -> None:
    a, b = torch.tensor([[1.0, 3.0], [0.0, 0.0]]), torch.tensor([[0.0, 1.0], [0.0, 0.0]])
    assert l2(a - b).tolist() == [2.5, 0.0]
    expected = ((1 + 0.25) ** 0.5 - 0.5 + (4 + 0.25) ** 0.5 - 0.5) / 2
    assert huber(a - b, 0.5).tolist() == pytest.approx([expected, 0.0])
    tiny = huber(a - b, 1e-3)[0].item()
    assert tiny == pytest.approx(1.5, abs=1e-3)  # nearly L1
    whole = (5 + 2 * 0.25) ** 0.5 - 0.5 * 2**0.5  # of the sample as one vector, c sqrt(2)
    assert huber_norm(a - b, 0.5).tolist() == pytest.approx([whole, 0.0])


def test_feature_distance_is_of_directions_at_each_place() -> None:
    """(1, 0) and (0, 2) are sqrt 2 apart once both are unit vectors; equal directions are not apart at all."""
    a = torch.tensor([[[1.0, 3.0], [0.0, 0.0]]])  # [1, C = 2, places = 2]
    b = torch.tensor([[[0.0, 1.0], [2.0, 0.0]]])
    assert feature_distance([a], [b]).item() == pytest.approx((2 + 0) / 2)
    assert feature_distance([a, a], [b, a]).item() == pytest.approx(1.0)


# ---- the loss


class Recorder:
    """A network without weights that records its calls by role; its output is eps = theta."""

    def __init__(self) -> None:
        self.theta = torch.zeros((), requires_grad=True)
        self.calls: list[SimpleNamespace] = []

    def __call__(self, x: Tensor, t: Tensor, condition: Any, role: str) -> Tensor:
        self.calls.append(
            SimpleNamespace(role=role, n=len(x), t=t, grad=torch.is_grad_enabled(), text=condition["text"])
        )
        # with the prompt 1 + theta, without it theta: guidance by omega is 1 + omega + theta
        return torch.zeros_like(x) + self.theta + condition["text"][:, None]


def loss_of(config: ConsistencyConfig, network: Any, count: int = 16) -> Any:
    denoiser = Denoiser(network, PATH, "eps")
    x_0 = torch.from_numpy(np.random.default_rng(0).standard_normal((count, 3))).float()
    sample = MicroBatch(x_0, {"text": torch.ones(count)}, {"text": torch.zeros(count)})
    return consistency_loss(make_pair(config, denoiser, sample, rng(count)), rng(count))


@pytest.mark.parametrize(("target", "role"), [("self", "student"), ("ema", "target")])
def test_who_is_called_and_who_learns(target: Any, role: str) -> None:
    network = Recorder()
    loss = loss_of(ConsistencyConfig(target=target), network)
    assert [(c.role, c.n, c.grad) for c in network.calls] == [
        ("student", 16, True),
        (BASE, 32, False),
        (role, 16, False),
    ]
    student, teacher, aim = network.calls
    assert teacher.text.tolist() == [1.0] * 16 + [0.0] * 16
    assert torch.equal(teacher.t[:16], student.t)
    assert bool((aim.t < student.t).all())
    assert loss.per_sample.shape == (16,)
    torch.testing.assert_close(loss.t, (student.t + 1) / 1000)
    torch.testing.assert_close(loss.value, loss.per_sample.mean())
    loss.value.backward()
    assert network.theta.grad is not None
    assert network.theta.grad.abs() > 0


@pytest.mark.parametrize(("convention", "low"), [("lcm", 3.0), ("imagen", 4.0)])
def test_the_teacher_step_is_guided_by_omega(convention: Any, low: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """omega = 3 in either convention: eps = (1 + 3) * 1 - 3 * 0 = 4."""
    seen: list[Estimate] = []

    def solver(denoise: Any, path: Any, x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
        seen.append(denoise(x_t, t))
        return x_t

    monkeypatch.setattr(points, "SOLVERS", {"ddim": solver})
    loss_of(ConsistencyConfig(guidance=Guidance(convention=convention, low=low, high=low)), Recorder())
    torch.testing.assert_close(seen[0].eps, torch.full((16, 3), 4.0))


def exact_network(mixture: Mixture, times: Any) -> Any:
    """A network whose first-order jump to s is the exact one, with s as an input of student and target.

    The teacher's DDIM step to t_n is made exact in the same way. With eps the network's output,
    x_s = alpha_s (x - sigma eps)/alpha + sigma_s eps is solved for eps.
    """

    def call(x: Tensor, t: Tensor, condition: Any, role: str) -> Tensor:
        goal = times.t_n.repeat(len(x) // len(times.t_n)) if role == BASE else times.s
        alpha, sigma = PATH.alpha(t)[:, None], PATH.sigma(t)[:, None]
        alpha_s, sigma_s = PATH.alpha(goal)[:, None], PATH.sigma(goal)[:, None]
        x = x.double()
        landed = mixture.flow(x, t, goal)
        gain = sigma_s - alpha_s * sigma / alpha
        same = (goal == t)[:, None]
        away = (landed - alpha_s / alpha * x) / torch.where(same, 1, gain)
        return torch.where(same, mixture.denoise(x, t).eps, away)

    return call


def predicting(prediction: Prediction, network: Any) -> Any:
    """An eps network's output in another parametrisation."""

    def call(x: Tensor, t: Tensor, condition: Any, role: str) -> Tensor:
        eps = network(x, t, condition, role)
        alpha, sigma = PATH.alpha(t)[:, None], PATH.sigma(t)[:, None]
        return target_of(prediction, (x.double() - sigma * eps) / alpha, eps, alpha, sigma)

    return call


@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
@pytest.mark.parametrize("config", [TCD, ConsistencyConfig(end="clean"), ConsistencyConfig(s="edge")])
def test_the_exact_jump_has_no_loss(config: ConsistencyConfig, prediction: Prediction) -> None:
    """On a Gaussian, with the exact flow for teacher, student and target, every pair of jumps agrees."""
    mixture = gaussian(PATH)
    count = 256
    keyed = rng(count)
    times = draw_times(config, PATH, keyed)
    denoiser = Denoiser(predicting(prediction, exact_network(mixture, times)), PATH, prediction)
    x_0 = mixture.sample(count, -1.0, torch.Generator().manual_seed(1))
    text = {"text": torch.zeros(count, 1)}
    unguided = config.model_copy(update={"guidance": Guidance(low=0, high=0)})
    loss = consistency_loss(make_pair(unguided, denoiser, MicroBatch(x_0, text, text), keyed), keyed)
    assert loss.per_sample is not None
    assert loss.per_sample.dtype == torch.float64
    assert float(loss.per_sample.max()) < 1e-20

    spoilt = replace(denoiser, call=lambda x, t, c, role: denoiser.call(x, t, c, role) + 0.05 * (role == "student"))
    assert float(consistency_loss(make_pair(unguided, spoilt, MicroBatch(x_0, text, text), keyed), keyed).value) > 1e-6


def test_the_skip_jump_has_no_loss_for_the_exact_end_point() -> None:
    """LCM's student that returns the clean end of each path agrees with itself along the path."""
    mixture = gaussian(PATH)
    count = 256
    keyed = rng(count)
    times = draw_times(LCM, PATH, keyed)

    def call(x: Tensor, t: Tensor, condition: Any, role: str) -> Tensor:
        x = x.double()
        alpha, sigma = PATH.alpha(t)[:, None], PATH.sigma(t)[:, None]
        if role == BASE:
            return exact_network(mixture, times)(x, t, condition, role)
        clean = mixture.flow(x, t, times_of(-1.0, x))
        return (x - alpha * clean) / sigma

    x_0 = mixture.sample(count, -1.0, torch.Generator().manual_seed(1)).float()
    text = {"text": torch.zeros(count, 1)}
    unguided = LCM.model_copy(update={"guidance": Guidance(low=0, high=0), "distance": "l2"})
    loss = consistency_loss(make_pair(unguided, Denoiser(call, PATH, "eps"), MicroBatch(x_0, text, text), keyed), keyed)
    assert loss.per_sample is not None
    inside = times.t_n > 0
    assert float(loss.per_sample[inside].max()) < 1e-5  # c_out is not quite 1, c_skip not quite 0
    assert float(loss.per_sample[~inside].max()) < 5e-3  # at t_n = 0 the target is x itself, sigma = .029
    estimate = interpret("eps", torch.zeros(1, 1), torch.ones(1, 1), torch.ones(1, 1), torch.zeros(1, 1))
    assert estimate.x0.item() == 1.0


# ---- a network that learns


class Learner(nn.Module):
    """The exact teacher's eps plus a correction that starts at zero, as LoRA's does."""

    def __init__(self, mixture: Mixture) -> None:
        super().__init__()
        self.mixture = mixture
        self.correct = nn.Sequential(
            nn.Linear(12, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, 2)
        ).double()
        nn.init.zeros_(self.correct[-1].weight)
        nn.init.zeros_(self.correct[-1].bias)

    def forward(self, x: Tensor, t: Tensor, condition: Any, role: str) -> Tensor:
        x = x.double()
        eps = self.mixture.denoise(x, t).eps
        if role == BASE:
            return eps
        angles = (t[:, None] + 1) / 1000 * torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0], dtype=torch.float64)
        correction: Tensor = self.correct(torch.cat([x, angles.sin(), angles.cos()], 1))
        return eps + correction


@pytest.mark.slow
@pytest.mark.parametrize("config", [TCD, LCM], ids=["tcd", "lcm"])
def test_a_student_of_the_exact_teacher_learns_its_flow(config: ConsistencyConfig) -> None:
    """One jump from noise lands far nearer to where the teacher's ODE ends than one step of the teacher."""
    mixture = three_modes(PATH)
    torch.manual_seed(0)
    learner = Learner(mixture)
    denoiser = Denoiser(learner, PATH, "eps")
    unguided = config.model_copy(update={"guidance": Guidance(low=0, high=0), "k": 5})
    optimiser = torch.optim.Adam(learner.parameters(), lr=3e-3)
    text = {"text": torch.zeros(256, 1)}
    for step in range(STEPS):
        optimiser.param_groups[0]["lr"] = 3e-3 * (1 - step / STEPS)
        x_0 = mixture.sample(256, -1.0, torch.Generator().manual_seed(step))
        keyed = rng(256, step)
        loss = consistency_loss(make_pair(unguided, denoiser, MicroBatch(x_0, text, text), keyed), keyed).value
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    x = mixture.sample(2000, 999.0, torch.Generator().manual_seed(STEPS))
    t, end = times_of(999.0, x), times_of(0.0, x)
    wanted = mixture.flow(x, t, end)

    def error(role: str) -> float:
        with torch.no_grad():
            x_0 = denoiser.estimate(x, t, {}, role).x0
        return float((x_0 - wanted).square().sum(1).mean().sqrt())

    assert error("student") < 0.65 * error(BASE)


# ---- a real network


@pytest.fixture
def small(tiny_overrides: list[str]) -> list[str]:
    return [*tiny_overrides, "student.targets=[to_q,to_v,conv1,conv2,conv_out]", "optim.lr=3e-3"]


@pytest.mark.parametrize("target", ["self", "ema"])
def test_gradients_reach_the_student_alone(target: str, small: list[str], tiny_cache: Path) -> None:
    from fewstep.distillation import distill as distillation

    run = distillation.prepare(
        resolve("tcd", None, [*small, f"method.target={target}"]), tiny_cache, torch.device("cpu")
    )
    (update,) = run.update_plan()
    loss = update.loss(fetch_of(run)(np.arange(4), rng(4)), rng(4))
    loss.value.backward()
    learnt = {name for name, p in run.backbone.network.named_parameters() if p.grad is not None}
    assert learnt
    assert all(".student." in name for name in learnt)
    assert {f"{name}" for name in update.parameters} == {name.replace(".student.", ".") for name in learnt}
    ups = [p.grad for name, p in update.parameters.items() if "lora_B" in name]
    assert all(g is not None and bool(g.abs().sum() > 0) for g in ups)
    if target == "ema":
        for name, parameter in run.student.parameters("target").items():
            assert torch.equal(parameter, update.parameters[name])


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["tcd", "lcm"])
def test_the_loss_falls_in_thirty_steps(recipe: str, small: list[str], tiny_cache: Path, tmp_path: Path) -> None:
    """RankComparison on the same draws before and after, since the loss depends on t far more than on thirty steps."""
    from fewstep.distillation import distill as distillation

    config = resolve(recipe, None, [*small, "loop.steps=30", "loop.save_every=30", "optim.lr=1e-2"])
    file = distillation.distill(config, tmp_path, cache=tiny_cache, quiet=True)
    assert file.is_file()
    logged = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in logged] == list(range(1, 31))

    run = distillation.prepare(config, tiny_cache, torch.device("cpu"))
    (update,) = run.update_plan()
    fetch = fetch_of(run)

    def judge() -> float:
        with torch.no_grad():
            keyed = [KeyedRng(99, step, tuple(range(16))) for step in range(3)]
            values = [update.loss(fetch(np.arange(16), drawn), drawn).value for drawn in keyed]
        return float(torch.stack(values).mean())

    before = judge()
    from safetensors.torch import load_file

    trained = load_file(tmp_path / "checkpoints" / "step-00000030" / "student.safetensors")
    with torch.no_grad():
        for name, parameter in update.parameters.items():
            parameter.copy_(trained[name])
    assert judge() < 0.9 * before


@pytest.mark.parametrize(
    ("guidance", "empty", "teacher"),
    [
        ({"convention": "lcm", "low": 2.0, "high": 14.0}, 0.0, 2),
        ({"convention": "lcm", "low": 0.0, "high": 14.0}, 0.0, 2),
        ({"convention": "lcm", "low": 0.0, "high": 0.0}, 0.0, 1),
        ({"convention": "imagen", "low": 1.0, "high": 1.0}, 0.0, 1),
        ({"convention": "none"}, 0.0, 1),
        ({"convention": "imagen", "low": 3.0, "high": 3.0}, 0.5, 2),  # two calls for one output
    ],
)
def test_what_a_teachers_call_costs_is_what_is_stated(guidance: dict[str, Any], empty: float, teacher: int) -> None:
    """The unconditional half of a call is skipped for all samples or for none, in whichever batch."""
    config = validate(ConsistencyConfig, {"grid": 8, "k": 1, "guidance": guidance})
    assert step_calls(config)["teacher"] == teacher
    calls, outputs = [], torch.tensor([[1.0], [2.0], [3.0], [4.0]])

    def call(x: Tensor, t: Tensor, condition: Any, role: str) -> Tensor:
        if role == BASE:
            calls.append(len(x))
        return x * condition["text"]

    for step in range(3):
        keyed = KeyedRng(0, step, (0, 1, 2, 3))
        dropped = keyed.chance("empty prompt", empty)
        text = torch.where(dropped[:, None], 0.0, outputs)
        sample = MicroBatch(torch.ones(4, 1), {"text": text}, {"text": torch.zeros(4, 1)})
        pair = make_pair(config, Denoiser(call, PATH, "eps"), sample, keyed)
        target_landing(pair)
        found = pair.teacher.denoise(torch.ones(4, 1), torch.full((4,), 499.0, dtype=torch.float64))
        assert not found.eps[dropped].any(), "guided or not, the empty prompt's own answer"
    assert set(calls) == {4 * teacher}


def test_without_guidance_the_unconditional_branch_is_not_evaluated() -> None:
    sizes = []

    def call(x: Tensor, t: Tensor, condition: Any, role: str) -> Tensor:
        sizes.append(len(x))
        return x * condition["text"]

    denoiser = Denoiser(call, PATH, "eps")
    x, t = torch.ones(3, 1), times_of(499.0, torch.ones(3, 1))
    text, null = {"text": torch.full((3, 1), 2.0)}, {"text": torch.ones(3, 1)}
    for omega, size, eps in ((torch.zeros(3), 3, 2.0), (torch.tensor([0.0, 1.0, 0.0]), 6, 3.0)):
        found = denoiser.guided(x, t, text, null, omega.double(), BASE)
        assert sizes[-1] == size
        assert float(found.eps[1]) == eps
        assert float(found.eps[0]) == 2.0
