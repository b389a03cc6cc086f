"""The continuous-time recipes: steps written from the papers, exact teachers, and the limit of discrete losses."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.common.choices import Prediction
from fewstep.common.errors import UserError
from fewstep.common.rng import KeyedRng
from fewstep.diffusion.config import Guidance
from fewstep.diffusion.denoiser import Denoiser
from fewstep.diffusion.grid import end_time
from fewstep.diffusion.jump import land
from fewstep.diffusion.schedule import (
    FlowMatching,
    Path,
    VarianceExploding,
    VariancePreserving,
    add_noise,
    scaled_linear,
    target_of,
)
from fewstep.distillation.config import resolve
from fewstep.methods import consistency, tangent
from fewstep.methods.config import ConsistencyConfig
from fewstep.methods.consistency import consistency_loss, make_pair
from fewstep.methods.distances import LearnedWeight
from fewstep.methods.pair import MicroBatch, Pair
from fewstep.methods.term_config import TangentConfig
from fewstep.methods.times import draw_times
from support.exact import gaussian, three_modes, times_of

PATHS: dict[str, Path] = {"vp": scaled_linear(), "flow": FlowMatching(), "ve": VarianceExploding()}
RECIPES = ["scm", "meanflow", "ayf", "ayf lagrangian"]
COUNT = 64
RNG = KeyedRng(3, 0, tuple(range(COUNT)))
NO_GUIDANCE = Guidance(convention="none")
PLAIN = {"guidance": NO_GUIDANCE, "distance": "l2", "weight": "none", "tangent": {}}


def method_of(recipe: str, **changes: Any) -> ConsistencyConfig:
    name, _, variant = recipe.partition(" ")
    if variant:
        changes = {"point": variant, "end": "index0", **changes}
    method = resolve(name).method
    if isinstance(changes.get("tangent"), dict):
        changes["tangent"] = method.tangent.model_copy(update={"warmup": 0.0, "most": 1.0, **changes["tangent"]})
    return method.model_copy(update=changes)


class Net(nn.Module):
    """A smooth network of x, t, s and a condition, float64; its last layer can be moved."""

    def __init__(self, seed: int, scale: float) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        self.enter, self.leave = (
            nn.Parameter(torch.randn(n, m, generator=g, dtype=torch.float64)) for n, m in ((5, 16), (16, 2))
        )
        self.scale = scale

    def forward(self, x: Tensor, t: Tensor, s: Tensor, c: Tensor) -> Tensor:
        """Take times in units of the path's length."""
        inside = torch.cat([x, (t / self.scale)[:, None], (s / self.scale)[:, None], c[:, None]], 1)
        return torch.tanh(inside @ self.enter) @ self.leave


STUDENT, TEACHER = (lambda scale: Net(1, scale)), (lambda scale: Net(2, scale))
CONDITION, NULL = ({"c": torch.full((COUNT,), c, dtype=torch.float64)} for c in (0.3, -0.5))


def networks(path: Path, prediction: Prediction) -> tuple[Denoiser, Net, Net]:
    """A student and a teacher of their own weights; the student takes s where it is told."""
    scale = path.noisiest
    student, teacher = STUDENT(scale), TEACHER(scale)

    def call(x: Tensor, t: Tensor, condition: Any, role: str) -> Tensor:
        net = teacher if role == "teacher" else student
        s = condition["s"] * (1 if scale > 1 else 1e-3) if "s" in condition else torch.zeros_like(t)
        return net(x, t, s, condition["c"])

    return Denoiser(call, path, prediction), student, teacher


def data() -> Tensor:
    return torch.randn(COUNT, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def pair_of(method: ConsistencyConfig, denoiser: Denoiser, rng: KeyedRng = RNG) -> Pair:
    """A pair; on an indexed path half an index below, since log alpha has a kink at each index."""
    pair = make_pair(method, denoiser, MicroBatch(data(), CONDITION, NULL), rng)
    if not isinstance(denoiser.path, VariancePreserving):
        return pair
    t = pair.times.t_nk - 0.5
    times, x = replace(pair.times, t_nk=t), add_noise(denoiser.path, data(), rng.normal("noise", (2,)), t)
    return replace(pair, times=times, x_nk=x)


def guided(teacher: Callable[[Tensor], Tensor], omega: Tensor) -> Tensor:
    """The papers' guided velocity, with 1 + omega as the scale."""
    return (1 + omega)[:, None] * teacher(CONDITION["c"]) - omega[:, None] * teacher(NULL["c"])


def agree(method: ConsistencyConfig, denoiser: Denoiser, student: Net, wanted: Tensor, weigh: Any = None) -> None:
    """Loss and gradient equal the reference's."""
    loss = consistency_loss(pair_of(method, denoiser), RNG, weigh=weigh).value
    found, own = (torch.autograd.grad(value, list(student.parameters())) for value in (loss, wanted))
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-6)
    for a, b in zip(found, own, strict=True):
        assert float((a - b).norm() / b.norm()) < 1e-6


@pytest.mark.parametrize("prediction", ["eps", "v", "flow"])
@pytest.mark.parametrize("r", [1.0, 0.25])
def test_scm_is_the_papers_step(prediction: Prediction, r: float) -> None:
    """sCM, algorithm 1, in TrigFlow's own variables, with a flow network's F by SANA-Sprint's conversion."""
    path = FlowMatching() if prediction == "flow" else PATHS["vp"]
    denoiser, student, teacher = networks(path, prediction)
    method = method_of("scm", tangent={"most": r})
    pair = pair_of(method, denoiser)
    alpha, sigma = (f(pair.times.t_nk)[:, None] for f in (path.alpha, path.sigma))
    angle = torch.atan2(sigma, alpha)
    x_t = angle.cos() * data() + angle.sin() * RNG.normal("noise", (2,))

    def flow_of(net: Net, x: Tensor, angle: Tensor, c: Tensor) -> Tensor:
        """F of a network in its own variables."""
        cos, sin, zero = angle.cos(), angle.sin(), torch.zeros(COUNT, dtype=torch.float64)
        if prediction == "flow":  # t = sin/(sin + cos), x_FM = x/(sin + cos)
            t, own = sin / (sin + cos), x / (sin + cos)
            u = net(own, t[:, 0], zero, c)
            return ((1 - 2 * t) * own + (1 - 2 * t + 2 * t * t) * u) / torch.sqrt(t * t + (1 - t) ** 2)
        output = net(x, path.time_of(torch.log(cos / sin))[:, 0], zero, c)
        return output if prediction == "v" else (output - sin * x) / cos

    speed = guided(lambda c: flow_of(teacher, x_t, angle, c), pair.omega)
    here = flow_of(student, x_t, angle, CONDITION["c"])
    with torch.no_grad():
        still, along = torch.func.jvp(
            lambda x, a: flow_of(student, x, a, CONDITION["c"]), (x_t, angle), (speed, torch.ones_like(angle))
        )
        g = -(angle.cos() ** 2) * (still - speed) - r * angle.cos() * angle.sin() * (x_t + along)
        g = g / (g.norm(dim=1, keepdim=True) / math.sqrt(2) + 0.1)
    weight = LearnedWeight()
    nn.init.normal_(weight.layer.weight, std=0.05, generator=torch.Generator().manual_seed(1))
    t_share = (pair.times.t_nk - path.clean) / (path.noisiest - path.clean)
    w = -weight(torch.zeros(COUNT, dtype=torch.float64), t_share)
    wanted = (w.exp() / 2 * (here - still - g).square().sum(1) - w).mean()
    agree(method, denoiser, student, wanted, weight)


def mean_flow_variables(pair: Pair) -> tuple[Tensor, Tensor, Tensor]:
    """(z, t, r) of a batch."""
    t, r = pair.times.t_nk, pair.times.s
    return (1 - t)[:, None] * data() + t[:, None] * RNG.normal("noise", (2,)), t, r


@pytest.mark.parametrize("p", [1.0, 0.5])
def test_meanflow_is_the_papers_step(p: float) -> None:
    """MeanFlow, equations 9 to 11 and 22, with the teacher's guided velocity as v."""
    denoiser, student, teacher = networks(PATHS["flow"], "flow")
    method = method_of("meanflow", adaptive_power=p)
    pair = pair_of(method, denoiser)
    z, t, r = mean_flow_variables(pair)
    assert 0.5 < float((t == r).double().mean()) < 0.95
    zero = torch.zeros_like(t)
    v = guided(lambda c: teacher(z, t, zero, c), pair.omega)
    with torch.no_grad():
        _, dudt = torch.func.jvp(
            lambda z, r, t: student(z, t, r, CONDITION["c"]), (z, r, t), (v, zero, torch.ones_like(t))
        )
        u_tgt = v - (t - r)[:, None] * dudt
    square = (student(z, t, r, CONDITION["c"]) - u_tgt).square().sum(1)
    agree(method, denoiser, student, (square / (square.detach() + 1e-3) ** p).mean())


@pytest.mark.parametrize("r", [0.99, 0.25])
def test_ayf_emd_is_the_papers_step(r: float) -> None:
    """AYF, algorithm 1: the tangent of the flow map, normalised, with the derivative's share r."""
    denoiser, student, teacher = networks(PATHS["flow"], "flow")
    method = method_of("ayf", tangent={"most": r})
    pair = pair_of(method, denoiser)
    x_t, t, s = mean_flow_variables(pair)
    zero = torch.zeros_like(t)
    dx_dt = guided(lambda c: teacher(x_t, t, zero, c), pair.omega)
    made = student(x_t, t, s, CONDITION["c"])
    with torch.no_grad():
        _, df_dt = torch.func.jvp(lambda x, t: student(x, t, s, CONDITION["c"]), (x_t, t), (dx_dt, torch.ones_like(t)))
        g = made - dx_dt + r * (t - s)[:, None] * df_dt
        g = g / (g.norm(dim=1, keepdim=True) / math.sqrt(2) + 0.1)
    agree(method, denoiser, student, (made - made.detach() + g).square().mean())


def test_ayf_lmd_is_the_papers_step() -> None:
    """AYF, theorem 3.3: sign(s - t) f^T (df/ds - v(f, s)); the squared loss of its gap has that gradient over t - s."""
    denoiser, student, teacher = networks(PATHS["flow"], "flow")
    method = method_of("ayf lagrangian", **PLAIN)
    pair = pair_of(method, denoiser)
    x_t, t, s = mean_flow_variables(pair)
    c = CONDITION["c"]

    def f(s: Tensor) -> Tensor:
        return x_t + (s - t)[:, None] * student(x_t, t, s, c)

    landed = f(s)
    with torch.no_grad():
        _, df_ds = torch.func.jvp(f, (s,), (torch.ones_like(s),))
        gap = df_ds - teacher(landed, s, torch.zeros_like(s), c)
    loss = consistency_loss(pair, RNG).value
    away = (t > s)[:, None]
    by_paper = torch.where(away, torch.sign(s - t)[:, None] * landed * gap / torch.where(away, (t - s)[:, None], 1), 0)
    at_s = torch.where(away, 0, student(x_t, t, s, c) * gap)  # the limit s -> t
    assert loss.item() == pytest.approx(gap.square().mean().item(), rel=1e-6)
    found, own = (
        torch.autograd.grad(value, list(student.parameters())) for value in (loss, 2 * (by_paper + at_s).mean())
    )
    for a, b in zip(found, own, strict=True):
        assert float((a - b).norm() / b.norm()) < 1e-6


# ---- exact teachers


def exact_network(path: Path, prediction: Prediction, kind: str, theta: Tensor, told: bool) -> Denoiser:
    """A network whose first-order jumps are the exact flow's, from s as a number; its output is bent by theta."""
    mixture = gaussian(path) if kind == "gaussian" else three_modes(path)
    scale = 1.0 if isinstance(path, VariancePreserving) else 1e-3 * path.noisiest

    def call(x: Tensor, t: Tensor, condition: Any, role: str) -> Tensor:
        if role == "teacher":
            estimate = mixture.denoise(x, t)
            return target_of(prediction, estimate.x0, estimate.eps, path.alpha(t)[:, None], path.sigma(t)[:, None])
        s = condition["s"] * scale if told else times_of(path.clean, x)
        alpha, sigma, low, high = (f(u)[:, None] for u in (t, s) for f in (path.alpha, path.sigma))
        near = ((t - s).abs() < 1e-9 * path.noisiest)[:, None]  # s comes back from an index
        landed, slope = mixture.flow(x, t, s), mixture.denoise(x, t)
        # x = alpha x0 + sigma eps and landed = low x0 + high eps; at s = t the slope's x0
        det = torch.where(near, 1, alpha * high - sigma * low)
        x0 = torch.where(near, slope.x0, (high * x - sigma * landed) / det)
        eps = torch.where(near, slope.eps, (alpha * landed - low * x) / det)
        return target_of(prediction, x0, eps, alpha, sigma) + theta * torch.cos(t / path.noisiest)[:, None]

    return Denoiser(call, path, prediction)


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_the_exact_flow_is_a_fixed_point(recipe: str, name: str) -> None:
    """No gap there, so that no gradient; beside it both, and a step down the gradient comes back."""
    path = PATHS[name]
    method = method_of(recipe, guidance=NO_GUIDANCE, tangent={})
    prediction: Prediction = {"vp": "v", "flow": "flow", "ve": "x0"}[name]  # type: ignore[assignment]
    told = bool(method.extra_conditioning)

    def gap_and_slope(theta: Tensor) -> tuple[float, Tensor]:
        denoiser = exact_network(path, prediction, "gaussian", theta, told)
        pair = make_pair(
            method,
            denoiser,
            MicroBatch(gaussian(path).sample(COUNT, path.clean, torch.Generator().manual_seed(1)), {}, {}),
            RNG,
        )
        made = tangent.limit_outputs(pair, RNG)
        (slope,) = torch.autograd.grad(consistency_loss(pair, RNG).value, theta)
        return float((made.output - made.wanted).detach().abs().max()), slope

    still, slope = gap_and_slope(torch.zeros(2, dtype=torch.float64, requires_grad=True))
    assert still < 1e-7
    assert float(slope.abs().max()) < 1e-4  # a gap of rounding, over c
    bent, slope = gap_and_slope(torch.full((2,), 0.2, dtype=torch.float64, requires_grad=True))
    assert bent > 1e-3
    assert float(slope.abs().min()) > 1e-4


# ---- the limit of the discrete losses


@pytest.mark.parametrize("recipe", ["scm", "meanflow", "ayf lagrangian"])
def test_it_is_the_limit_of_the_discrete_loss(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient of two jumps a step apart, over the step, tends to that of the derivative, as the step shrinks.

    With L2 between landings: |A x - B F - landed|^2 has the gradient -2 B (h d landing/dtau) dF, the limit
    -2 A (d landing/dtau) dF; for the Lagrangian pair the step is the landing's, and the sign the other.
    """
    path = PATHS["flow"]
    denoiser, student, _ = networks(path, "flow")
    limit = method_of(recipe, **PLAIN)
    low, high = (250, 750) if recipe != "scm" else (0, 750)
    end = end_time(path, limit.end)

    def at(t: float) -> Tensor:
        return times_of(t, data())

    def gradient(pair: Pair) -> Tensor:
        loss = consistency_loss(pair, RNG).value
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(student.parameters()))])

    def placed(pair: Pair, t: float, n: float, s: float) -> Pair:
        times = replace(pair.times, t_nk=at(t), t_n=at(n), s=at(s))
        return replace(pair, times=times, x_nk=add_noise(path, data(), RNG.normal("noise", (2,)), at(t)))

    t, s = high / 1000, low / 1000 or end
    pair = placed(pair_of(limit, denoiser), t, t, s)
    wanted = gradient(pair)
    here, there = (tangent.place_of(limit.tangent.coordinates, path, at(when)).tau[0].item() for when in (t, s))
    a, b, _ = tangent.jump_factors(limit.tangent.coordinates, torch.tensor([here - there], dtype=torch.float64))
    errors = []
    for count in (50, 100, 200, 400):
        h = 1 / count
        if recipe.endswith("lagrangian"):
            steps = placed(pair, t, s + h, s)
            # the shorter jump, and a step of the teacher from there: the pair of shortcut models with a teacher's step
            monkeypatch.setattr(consistency, "target_landing", lambda pair: by_teacher(pair))
            discrete = replace(steps, config=limit.model_copy(update={"point": "self"}))
            factor = 1 / (h * b)
        else:
            discrete = replace(placed(pair, t, t - h, s), config=limit.model_copy(update={"point": "solver"}))
            step = here - tangent.place_of(limit.tangent.coordinates, path, at(t - h)).tau[0].item()
            factor = a / (b * step)
        errors.append(((factor * gradient(discrete) - wanted).norm() / wanted.norm()).item())
    assert errors[0] < 0.3
    rates = [math.log2(one / other) for one, other in pairwise(errors)]
    assert rates == pytest.approx([1, 1, 1], abs=0.2)


@torch.no_grad()
def by_teacher(pair: Pair) -> Tensor:
    """The target's jump to t_n, and the teacher's DDIM step from there to s."""
    landed = pair.target(pair.x_nk, pair.times.t_nk, pair.times.t_n)
    return land(pair.followed.denoise(landed, pair.times.t_n), pair.denoiser.path, pair.times.s)


# ---- the derivative


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_differences_agree_with_forward_mode(recipe: str, name: str) -> None:
    """Their error falls with the square of the width, at every time where both neighbours are on the path."""
    path = PATHS[name]
    denoiser, _, _ = networks(path, "flow")

    def gap(**how: Any) -> Tensor:
        made = tangent.limit_outputs(pair_of(method_of(recipe, **{**PLAIN, "tangent": how}), denoiser), RNG)
        return (made.output - made.wanted).detach()

    pair = pair_of(method_of(recipe, **PLAIN), denoiser)
    moved = pair.times.s if "lagrangian" in recipe else pair.times.t_nk
    place = tangent.place_of("linear", path, moved).tau
    ends = [tangent.place_of("linear", path, times_of(t, moved)).tau[0] for t in (path.least, path.noisiest)]
    inside = (place > ends[0] + 0.03) & (place < ends[1] - 0.03)
    exact = gap(derivative="forward")
    assert torch.equal(gap(derivative="auto"), exact), "this network has forward mode"
    errors = [(gap(derivative="finite", width=w) - exact)[inside].norm() / exact[inside].norm() for w in (0.01, 0.0025)]
    assert float(errors[0]) < (0.3 if name == "ve" else 0.02)
    assert 8 < float(errors[0] / errors[1]) < 32 or float(errors[1]) < 1e-6


class Attentive(nn.Module):
    """A network with torch's attention, whose fused kernels have no forward mode."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(3, 16), nn.Linear(16, 2)
        self.calls = 0

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.calls += 1
        h = self.enter(torch.cat([x, t[:, None].to(x)], 1)).view(1, 1, len(x), 16)
        return self.leave(torch.nn.functional.scaled_dot_product_attention(h, h, h).view(len(x), 16))


def test_attention_decides_how_the_derivative_is_taken() -> None:
    """Fused attention: differences, after one attempt. On request the math kernel, in forward mode; both agree."""
    torch.manual_seed(0)
    net, path = Attentive(), PATHS["flow"]
    denoiser = Denoiser(lambda x, t, *_: net(x, t), path, "flow")

    def gap(how: str) -> tuple[Tensor, int]:
        method = method_of("scm", **{**PLAIN, "tangent": {"derivative": how}})
        pair = make_pair(method, denoiser, MicroBatch(data().float(), {}, {}), RNG)
        net.calls = 0
        made = tangent.limit_outputs(pair, RNG)
        return (made.output - made.wanted).detach(), net.calls

    (by_attempt, first), (again, second), (differences, third) = gap("auto"), gap("auto"), gap("finite")
    (exact, forward) = gap("forward")
    assert (first, second, third, forward) == (5, 4, 4, 3)  # the student, the teacher, and the derivative's
    assert torch.equal(by_attempt, differences)
    assert torch.equal(again, differences)
    assert float((differences - exact).abs().max()) < 1e-3 * float(exact.abs().max())
    assert float(exact.abs().max()) > 0.01


def test_an_error_of_the_network_is_not_hidden() -> None:
    def broken(x: Tensor, *_: Any) -> Tensor:
        if torch.is_grad_enabled():
            return x
        raise RuntimeError("no such layer")

    pair_with = MicroBatch(data(), {}, {})
    pair = make_pair(method_of("scm", **PLAIN), Denoiser(broken, PATHS["flow"], "flow"), pair_with, RNG)
    with pytest.raises(RuntimeError, match="no such layer"):
        tangent.limit_outputs(pair, RNG)


# ---- times, warm-up and weight


def test_a_share_of_the_samples_stays() -> None:
    """s = t for the anchor's share, and on the few that draw t itself; the others reach the end point."""
    path, rng = PATHS["vp"], KeyedRng(3, 0, tuple(range(4000)))
    times = draw_times(method_of("meanflow"), path, rng)
    assert torch.equal(times.t_n, times.t_nk)
    assert float((times.s == times.t_nk).double().mean()) == pytest.approx(0.75, abs=0.03)
    free = draw_times(method_of("meanflow", anchor=0.0), path, rng)
    assert torch.equal(free.s[times.s < times.t_nk], times.s[times.s < times.t_nk])
    assert float((free.s == free.t_nk).double().mean()) < 0.02
    assert bool((draw_times(method_of("scm"), path, rng).s == path.clean).all())


def test_the_derivative_comes_in_over_the_warm_up() -> None:
    config = TangentConfig(warmup=0.5, most=0.9)
    shares = [tangent.share_of_derivative(config, KeyedRng(0, step, (0,), steps=100)) for step in (0, 10, 45, 50, 99)]
    assert shares == pytest.approx([0, 0.2, 0.9, 0.9, 0.9])
    assert tangent.share_of_derivative(config, RNG) == 0.9
    assert tangent.share_of_derivative(TangentConfig(), KeyedRng(0, 0, (0,), steps=100)) == 1


def test_the_learned_weight_makes_all_times_weigh_alike() -> None:
    """Its minimum is e^-w = E[L | t], of a loss that differs by three orders of magnitude over the times."""
    weight, t_share = LearnedWeight(), torch.linspace(0, 1, 64, dtype=torch.float64)
    loss = torch.exp(7 * t_share - 3).float()
    optimiser = torch.optim.Adam(weight.parameters(), lr=0.02)
    for _ in range(300):
        optimiser.zero_grad()
        weight(loss, t_share).mean().backward()
        optimiser.step()
    w = -weight(torch.zeros(64), t_share).detach()
    torch.testing.assert_close(w.exp() * loss, torch.ones(64), rtol=0.1, atol=0)


LIMIT_CONFLICTS = [
    ("scm", "method.jump=second_order", "method.jump"),
    ("scm", "method.target=ema", "method.target"),
    ("scm", "method.substeps=2", "method.substeps"),
    ("scm", "method.weight=v", "method.weight"),
    ("scm", "method.distance=features", "method.distance"),
    ("scm", "method.start=trajectory", "method.start"),
    ("scm", "method.anchor=0.5", "method.anchor"),
    ("ayf", "method.point=lagrangian", "method.end"),
    ("scm", "student.base=8bit", "student.base"),
    ("meanflow", "loop.shard=true", "method.tangent.derivative"),
    ("meanflow", "loop.compile=true", "method.tangent.derivative"),
]


@pytest.mark.parametrize(("recipe", "word", "field"), LIMIT_CONFLICTS)
def test_settings_that_have_no_limit_are_refused(recipe: str, word: str, field: str) -> None:
    with pytest.raises(UserError) as error:
        resolve(recipe, None, [word])
    assert error.value.field == field
