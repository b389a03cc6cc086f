"""Every recipe of the family on an exact teacher: fixed points, data-only training, and the terms beside the loss."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.common.errors import UserError
from fewstep.common.rng import KeyedRng
from fewstep.diffusion.config import Guidance
from fewstep.diffusion.denoiser import Denoiser
from fewstep.diffusion.grid import end_time, training_grid
from fewstep.diffusion.schedule import FlowMatching, Path, VarianceExploding, expand, scaled_linear
from fewstep.distillation.config import resolve
from fewstep.methods import consistency
from fewstep.methods import next_points as points
from fewstep.methods.config import ConsistencyConfig
from fewstep.methods.consistency import consistency_loss, critic_loss, make_pair
from fewstep.methods.cost import critic_calls, start_calls, step_cost, student_calls
from fewstep.methods.pair import MicroBatch, StoredPoints
from fewstep.methods.recipes import names, rows
from fewstep.methods.term_config import AdversarialConfig, TangentConfig
from fewstep.methods.terms import FrozenNetworks, terms_of
from fewstep.methods.times import draw_times
from support.exact import Mixture, Wide, gaussian, three_modes, times_of

PATHS: dict[str, Path] = {"vp": scaled_linear(), "flow": FlowMatching(), "ve": VarianceExploding()}
COUNT = 200
AT_THE_END = KeyedRng(0, 0, tuple(range(64)))
"""Outside of a run, where every term is in."""
NO_GUIDANCE = Guidance(convention="none")
LIMITS = [name for name in rows() if resolve(name).method.continuous]
"""Recipes in continuous time; `test_tangent` has their fixed points."""
TAUGHT = [name for name in rows() if name not in ("ct", *LIMITS) and resolve(name).method.consistency]
"""Recipes whose next point lies on the teacher's path; CT's lies on it on average alone, others match laws."""


def method_of(recipe: str, **changes: Any) -> ConsistencyConfig:
    """A recipe's objective without guidance, critic and denoising loss."""
    bare = {"guidance": NO_GUIDANCE, "adversarial": AdversarialConfig(), "denoising": 0.0}
    return resolve(recipe).method.model_copy(update=bare | changes)


def batch_for(method: ConsistencyConfig, mixture: Mixture, rng: KeyedRng) -> MicroBatch:
    """Data, or exact trajectories where the recipe stores them."""
    path, count = mixture.path, len(rng.indices)
    generator = torch.Generator().manual_seed(1)
    if method.start != "trajectory":
        return MicroBatch(mixture.sample(count, path.clean, generator), {}, {})
    times = torch.cat([torch.tensor([end_time(path, method.end)]).double(), training_grid(path, method.grid)])
    x = mixture.sample(count, float(times[-1]), generator)
    top = times_of(float(times[-1]), x)
    points = [mixture.flow(x, top, times_of(float(t), x)) for t in times]
    stored = StoredPoints.of(torch.stack(points, 1), draw_times(method, path, rng))
    return MicroBatch(points[0], {}, {}, torch.zeros(count, dtype=torch.float64), stored)


def bend(t: Tensor, s: Tensor, path: Path) -> Tensor:
    """A perturbation of a jump that vanishes at t = s, and grows with the jump."""
    return (t - s) / (path.noisiest - path.clean)


def exact_everywhere(monkeypatch: pytest.MonkeyPatch, mixture: Mixture, theta: Tensor, power: int = 1) -> None:
    """The exact flow in place of jump, solver and network; the student's jump is bent by theta."""

    def solver(denoise: Any, path: Path, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return mixture.flow(x, t, s)

    def jump(denoise: Any, path: Path, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        away = theta if torch.is_grad_enabled() else theta.detach()
        return mixture.flow(x, t, s) + away * expand(bend(t, s, path) ** power, x)

    monkeypatch.setattr(consistency, "student_step", lambda *_: jump)
    monkeypatch.setattr(points, "SOLVERS", dict.fromkeys(points.SOLVERS, solver))


def loss_and_gradient(method: ConsistencyConfig, mixture: Mixture, theta: Tensor) -> tuple[float, float]:
    denoiser = Denoiser(lambda x, *_: x, mixture.path, "x0")
    rng = Wide(5, 0, tuple(range(COUNT)))
    loss = consistency_loss(make_pair(method, denoiser, batch_for(method, mixture, rng), rng), rng).value
    (slope,) = torch.autograd.grad(loss, theta)
    return float(loss.detach()), float(slope.abs().max())


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("recipe", TAUGHT)
def test_the_exact_flow_is_a_fixed_point(recipe: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No loss and no gradient there; beside it both. On the exact flow the same holds for every jump and every rule."""
    mixture = gaussian(PATHS[name])
    method = method_of(recipe)
    if method.distance == "features":
        method = method.model_copy(update={"distance": "l2"})
    still = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    exact_everywhere(monkeypatch, mixture, still)
    loss, slope = loss_and_gradient(method, mixture, still)
    assert loss < 1e-20
    assert slope < 1e-9
    bent = torch.full((2,), 0.3, dtype=torch.float64, requires_grad=True)
    exact_everywhere(monkeypatch, mixture, bent)
    loss, slope = loss_and_gradient(method, mixture, bent)
    assert loss > 1e-6
    assert slope > 1e-6


@pytest.mark.parametrize("recipe", ["tcd", "pcm", "kd"])
def test_the_exact_flow_of_a_mixture_is_a_fixed_point(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The flow is followed numerically there: two ways to one point agree to its error."""
    mixture = three_modes(PATHS["vp"])
    still = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    exact_everywhere(monkeypatch, mixture, still)
    loss, slope = loss_and_gradient(method_of(recipe), mixture, still)
    assert loss < 1e-9
    assert slope < 1e-5


class Mirrored:
    """KeyedRng whose noise is given; times are those of the step."""

    def __init__(self, noise: Tensor, rng: KeyedRng) -> None:
        self.noise, self.rng = noise, rng

    def normal(self, purpose: str, shape: tuple[int, ...]) -> Tensor:
        return self.noise

    def __getattr__(self, name: str) -> Any:
        return getattr(self.rng, name)


def mirrored_pairs(mixture: Mixture, t: float, count: int) -> tuple[Tensor, Tensor]:
    """(x_0, eps) of a Gaussian in pairs that share x_t and lie opposite each other around E[x_0 | x_t].

    What is linear in them is then averaged without chance.
    """
    path, std, mean = mixture.path, float(mixture.stds[0]), mixture.means[0]
    g = torch.Generator().manual_seed(4)
    u, v = (torch.randn(count, 2, generator=g, dtype=torch.float64) for _ in range(2))
    a, b = (float(f(torch.tensor(t, dtype=torch.float64))) for f in (path.alpha, path.sigma))
    a = a * std
    along, across = (a * u + b * v) / math.hypot(a, b), (b * u - a * v) / math.hypot(a, b)
    both = []
    for sign in (1, -1):
        u2 = (a * along + b * sign * across) / math.hypot(a, b)
        v2 = (b * along - a * sign * across) / math.hypot(a, b)
        both.append((mean + std * u2, v2))
    return torch.cat([both[0][0], both[1][0]]), torch.cat([both[0][1], both[1][1]])


def test_consistency_training_is_right_on_average(monkeypatch: pytest.MonkeyPatch) -> None:
    """CT: with the exact jump the expected gradient falls with the square of the grid's step.

    Given x_{t_n+k} the mean of its x_{t_n} is the DDIM step of the exact denoiser, whose local error is O(step^2).
    """
    path = FlowMatching()
    mixture = gaussian(path)
    slopes = []
    counts = [20, 40, 80, 160]
    for count in counts:
        method = method_of("ct", grid=count, k=1, end="clean", distance="l2")
        theta = torch.zeros(2, dtype=torch.float64, requires_grad=True)
        exact_everywhere(monkeypatch, mixture, theta)
        index = count * 3 // 4 - 1  # t = .75 on every grid
        monkeypatch.setattr(KeyedRng, "integers", lambda self, *_, i=index: torch.full((len(self.indices),), i))
        x_0, eps = mirrored_pairs(mixture, 0.75, 2000)
        rng = Mirrored(eps, KeyedRng(0, 0, tuple(range(len(x_0)))))
        denoiser = Denoiser(lambda x, *_: x, path, "x0")
        loss = consistency_loss(make_pair(method, denoiser, MicroBatch(x_0, {}, {}), rng), rng).value  # type: ignore[arg-type]
        (slope,) = torch.autograd.grad(loss, theta)
        slopes.append(float(slope.norm()))
    rates = [math.log2(a / b) for a, b in pairwise(slopes)]
    assert rates == pytest.approx([2, 2, 2], abs=0.15)


def test_the_denoising_loss_wants_the_posterior_mean() -> None:
    """Its expected gradient is 0 at E[x0 | x_t], and points back beside it."""
    path = PATHS["vp"]
    mixture = gaussian(path)
    method = resolve("ctm").method
    theta = torch.zeros(2, dtype=torch.float64, requires_grad=True)

    def call(x: Tensor, t: Tensor, condition: Any, role: str) -> Tensor:
        assert torch.equal(condition["s"], t), "called at s = t"
        return mixture.denoise(x, t).x0 + theta

    from fewstep.methods.terms import denoising_loss

    x_0, eps = mirrored_pairs(mixture, 499.0, 500)
    rng = Mirrored(eps, KeyedRng(0, 0, tuple(range(len(x_0)))))
    rng.integers = lambda *_: torch.full((len(x_0),), 24)  # type: ignore[attr-defined]  # t = 499

    def slope() -> Tensor:
        fit = denoising_loss(method, Denoiser(call, path, "x0"), x_0, {}, rng).mean()  # type: ignore[arg-type]
        return torch.autograd.grad(fit, theta)[0]

    assert float(slope().abs().max()) < 1e-12
    with torch.no_grad():
        theta += 0.1
    assert bool((slope() > 0.01).all())


@pytest.mark.slow
def test_a_gan_alone_moves_a_wrong_student_to_the_right_distribution() -> None:
    """No consistency loss: a student that lands .8 beside the data, and too narrow, is brought to them."""
    from fewstep.methods.consistency import critic_loss
    from fewstep_worlds.plane.network import PlaneCritic

    path = FlowMatching()
    mixture = gaussian(path, mean=(0.7, -0.4), std=0.6)
    wrong = torch.nn.Parameter(torch.tensor([0.8, 0.8]))
    narrow = torch.nn.Parameter(torch.tensor(-0.7))
    method = resolve("cd").method.model_copy(
        update={
            "guidance": NO_GUIDANCE,
            "consistency": 0.0,
            "jump": "first_order",
            "target": "self",
            "end": "clean",
            "adversarial": AdversarialConfig(weight=1.0, kind="nonsaturating", real="data", r1=0.1),
        }
    )

    def call(x: Tensor, t: Tensor, condition: Any, role: str) -> Tensor:
        end_point = mixture.flow(x.double(), t, times_of(0.0, x)).float()  # the exact end point, bent
        middle = mixture.means[0].float()
        return middle + (end_point - middle) * narrow.exp() + wrong

    denoiser, critic = Denoiser(call, path, "x0"), PlaneCritic(64, seed=2)
    student = torch.optim.Adam([wrong, narrow], lr=0.02, betas=(0.0, 0.99))
    judge = torch.optim.Adam(critic.parameters(), lr=5e-3, betas=(0.0, 0.99))
    terms = terms_of(method, FrozenNetworks(critic=critic))
    for step in range(400):
        x_0 = mixture.sample(256, 0.0, torch.Generator().manual_seed(step)).float()
        rng = KeyedRng(1, step, tuple(range(256)))
        pair = make_pair(method, denoiser, MicroBatch(x_0, {}, {}), rng)
        for optimiser, loss in (
            (judge, lambda: critic_loss(pair, rng, critic)),  # noqa: B023
            (student, lambda: consistency_loss(pair, rng, terms)),  # noqa: B023
        ):
            optimiser.zero_grad()
            loss().value.backward()
            optimiser.step()
    assert float(wrong.detach().norm()) < 0.2
    assert float(narrow.detach().exp()) == pytest.approx(1, abs=0.2)


# ---- times


@pytest.mark.parametrize("recipe", rows())
def test_times_of_every_recipe(recipe: str) -> None:
    """t_{n+k} on every point of the grid; s <= t_n < t_{n+k}, none of them below the segment's edge."""
    method = method_of(recipe)
    path = PATHS["vp"]
    times = draw_times(method, path, KeyedRng(3, 0, tuple(range(max(6000, 12 * method.points)))))
    grid = training_grid(path, method.grid)
    end = end_time(path, method.end)
    assert torch.equal(times.t_nk.unique(), grid[-1:] if method.start == "noise" else grid)
    assert bool((times.t_n == times.t_nk if method.continuous else times.t_n < times.t_nk).all())
    assert bool((times.s <= times.t_n).all())
    assert bool((times.s >= end).all())
    width = len(grid) // method.segments
    edge = torch.cat([grid.new_tensor([end]), grid])[times.index_nk // width * width]
    assert bool((times.t_n >= edge).all())
    assert bool((times.s >= edge).all())
    assert torch.equal(times.t_nk, grid[times.index_nk])
    grid_times = torch.cat([grid.new_tensor([end]), grid])
    k = 0 if method.continuous else method.k
    below = torch.maximum(times.index_nk - k, times.index_nk // width * width - 1)
    assert bool((times.t_n >= grid_times[below + 1]).all())
    if method.k_low is None:
        assert torch.equal(times.t_n, grid_times[below + 1])
    if method.s == "edge":
        assert torch.equal(times.s, edge)
    if method.s == "uniform":
        assert bool((times.s == times.t_n)[times.t_n > edge].any())
        assert bool((times.s == edge)[times.t_n > edge].any())
    assert torch.equal(times.top, grid[(times.index_nk // width + 1) * width - 1])


def test_k_is_drawn_where_a_smallest_is_named() -> None:
    method = method_of("tcd", k_low=2, k=5)
    times = draw_times(method, PATHS["vp"], KeyedRng(3, 0, tuple(range(4000))))
    high = times.t_nk > 200
    gaps = ((times.t_nk - times.t_n)[high] / 20).unique(return_counts=True)
    assert gaps[0].tolist() == [2, 3, 4, 5]
    assert float(gaps[1].min() / gaps[1].max()) > 0.85
    low = times.t_nk == 59  # three points are left: 39, 19 and the end
    assert times.t_n[low].unique(return_counts=True)[0].tolist() == [0, 19]
    assert times.t_n[times.t_nk == 19].unique().tolist() == [0]


def test_segments_land_on_their_lower_edge() -> None:
    method = method_of("pcm")
    times = draw_times(method, PATHS["vp"], KeyedRng(3, 0, tuple(range(4000))))
    assert times.s.unique().tolist() == [0, 249, 499, 749]
    for t_nk, t_n, s in ((249, 224, 0), (274, 249, 249), (999, 974, 749)):
        rows = times.t_nk == t_nk
        assert times.t_n[rows].unique().tolist() == [t_n]
        assert times.s[rows].unique().tolist() == [s]
    wide = draw_times(method_of("pcm", k=4), PATHS["vp"], KeyedRng(3, 0, tuple(range(4000))))
    for t_nk, t_n in ((249, 149), (274, 249), (324, 249), (374, 274)):
        assert wide.t_n[wide.t_nk == t_nk].unique().tolist() == [t_n], "clamped at the edge"


@pytest.mark.parametrize("name", PATHS)
def test_tdd_stays_in_its_segment_and_reaches_as_far_on_every_path(name: str) -> None:
    """Reach is counted in points of the grid: on EDM's, times do not give the distance."""
    path = PATHS[name]
    method = method_of("tdd", segments=5, spread=0.0)
    times = draw_times(method, path, KeyedRng(3, 0, tuple(range(4000))))
    grid = training_grid(path, method.grid)
    edge = torch.cat([grid.new_tensor([end_time(path, method.end)]), grid])[times.index_nk // 10 * 10]
    assert bool((times.s >= edge).all())
    assert bool((times.s <= times.t_n).all())
    whole = draw_times(method_of("tdd", spread=0.0), path, KeyedRng(3, 0, tuple(range(4000))))
    from_noise = whole.index_nk == 49
    landed = torch.searchsorted(grid, whole.s[from_noise])
    sampled_times = {49 - i * 50 // steps for steps in range(4, 9) for i in range(1, steps)}
    assert set(landed.tolist()) == {index for index in sampled_times if 48 - 13 <= index <= 48}


def test_differences_are_divided_by_the_pull() -> None:
    """One wrong eps (or x0) at every pair of times costs the same, under each distance; no jump costs nothing."""
    from types import SimpleNamespace

    from fewstep.methods.distances import distance, landing_derivative

    def pair_at(method: ConsistencyConfig, path: Path, t: Tensor, s: Tensor) -> Any:
        return SimpleNamespace(config=method, denoiser=SimpleNamespace(path=path), times=SimpleNamespace(t_nk=t, s=s))

    for name, path in PATHS.items():
        grid = training_grid(path, 50)
        t, s = grid[[5, 20, 40, 48]], grid[[0, 3, 4, 40]]
        for weight in ("eps", "x0", "v"):
            pull = landing_derivative(weight, path, t, s)  # type: ignore[arg-type]
            assert pull is not None
            for kind in ("l2", "huber", "huber_norm"):
                method = method_of("tcd", distance=kind, huber_c=0.1)
                off = torch.full((4, 2), 0.3, dtype=torch.float64) * pull[:, None]
                pair = pair_at(method.model_copy(update={"weight": weight}), path, t, s)
                costs = distance(pair, off, torch.zeros_like(off), s)
                wanted = distance(pair_at(method, path, t, s), torch.full((4, 2), 0.3), torch.zeros(4, 2), s)
                assert costs.tolist() == pytest.approx(wanted.tolist()), (name, weight, kind)
            nowhere = pair_at(method.model_copy(update={"weight": weight}), path, s, s)
            assert distance(nowhere, off, -off, s).tolist() == [0.0] * 4
    alpha, sigma = PATHS["vp"].alpha(t), PATHS["vp"].sigma(t)
    x0, v = (landing_derivative(weight, PATHS["vp"], t, s) for weight in ("x0", "v"))
    assert x0 is not None
    assert v is not None
    torch.testing.assert_close((x0 / v).square(), alpha.square() / sigma.square() + 1)


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("clip", [(0.0, 1e4), (0.01, 10.0), (0.01, 0.1)])
def test_terms_are_balanced_at_the_last_layer(kind: str, clip: tuple[float, float]) -> None:
    """CTM's factors |g_consistency| / (|g_term| + 1e-4) at the student's outlet; the critic's alone has a clip."""
    from fewstep_worlds.plane.settings import resolve_plane
    from fewstep_worlds.plane.train import fetch_of, plane_plan, set_up, training_points

    words = ["base=exact", f"student.kind={kind}", "width=16", "count=200"]
    words.append(f"method.adversarial.clip=[{clip[0]},{clip[1]}]")
    without = {"denoising": "method.adversarial.weight=0", "critic": "method.denoising=0"}

    def slope(*more: str) -> Tensor:
        play = set_up(resolve_plane("ctm", [*words, *more]))
        outlet = play.student.outlet("student")
        assert any(outlet is p for n, p in play.student.parameters("student").items() if n.startswith("leave"))
        with torch.no_grad():  # away from the start, where the student is the teacher and has no gradient
            for parameter in play.student.parameters("student").values():
                parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
        batch = fetch_of(play, training_points(play))(torch.arange(64).numpy(), AT_THE_END)
        loss = plane_plan(play)[0].loss(batch, AT_THE_END)
        return torch.autograd.grad(loss.value, outlet)[0]

    own = slope(*without.values(), "method.balance=fixed")
    for name, other in without.items():
        term = slope(other, "method.balance=fixed") - own
        factor = float(own.norm() / (term.norm() + 1e-4))
        if name == "critic":
            factor = min(max(factor, clip[0]), clip[1])
        torch.testing.assert_close(slope(other) - own, factor * term, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("first", "second", "clip", "wanted"),
    [
        ((3.0, 4.0), (0.6, 0.8), (0.0, 1e4), 5 / 1.0001),
        ((3.0, 4.0), (0.0, 0.0), (0.0, 1e4), 1e4),  # 5 / 1e-4 is 5e4
        ((3.0, 4.0), (0.0, 0.0), (0.01, 10.0), 10.0),
        ((3e-4, 4e-4), (0.0, 0.0), (0.01, 10.0), 5.0),
        ((0.0, 0.0), (3.0, 4.0), (0.01, 10.0), 0.01),
        ((0.0, 0.0), (3.0, 4.0), (0.0, 1e4), 0.0),
    ],
)
def test_the_ratio_of_gradients(
    first: tuple[float, float], second: tuple[float, float], clip: tuple[float, float], wanted: float
) -> None:
    from fewstep.methods.adversarial import gradient_ratio

    weight = torch.ones(2, dtype=torch.float64, requires_grad=True)
    one, other = ((torch.tensor([slope, slope], dtype=torch.float64) * weight).sum(1) for slope in (first, second))
    ratio = gradient_ratio(one, other, weight, clip)
    assert float(ratio) == pytest.approx(wanted, rel=1e-12)
    assert not ratio.requires_grad


def test_the_critic_starts_at_its_share_of_the_run() -> None:
    """Before it the student's loss is that without a critic, and the critic has no update: its first ones are together.

    A critic that is trained alone first has a slope that the student follows for many steps before it can answer. The
    recipe has the released clip, and the start is a share: a run of any length comes to it.
    """
    from fewstep_worlds.plane.settings import resolve_plane
    from fewstep_worlds.plane.train import fetch_of, plane_plan, set_up, training_points

    adversarial = resolve("ctm").method.adversarial
    assert adversarial.clip == (0.01, 10.0)
    assert 0 < adversarial.start < 1
    assert AdversarialConfig().start == 0

    def loss_at(step: int, steps: int, *more: str) -> tuple[Tensor, set[str]]:
        words = ["base=exact", "width=16", "count=200", "method.adversarial.start=0.3", *more]
        play = set_up(resolve_plane("ctm", words))
        updates = plane_plan(play)
        rng = KeyedRng(0, step, tuple(range(16)), steps=steps)
        due = {update.name for update in updates if update.due(step, steps)}
        loss = updates[0].loss(fetch_of(play, training_points(play))(torch.arange(16).numpy(), rng), rng)
        assert ("critic" in due) == ("adversarial" in loss.scalars)
        return loss.value.detach(), set(loss.scalars)

    for steps, first in ((10, 3), (100, 30), (7, 3), (1, 1)):
        for step in {0, max(first - 1, 0)} - {first}:
            with_critic, names = loss_at(step, steps)
            assert names == {"consistency", "denoising"}
            assert torch.equal(with_critic, loss_at(step, steps, "method.adversarial.weight=0")[0])
        if first < steps:
            with_critic, names = loss_at(first, steps)
            assert names == {"consistency", "denoising", "adversarial"}
            assert not torch.equal(with_critic, loss_at(first, steps, "method.adversarial.weight=0")[0])


def test_a_critic_sees_its_segment_alone() -> None:
    """PCM: noised to anywhere inside the phase; the two points of a pair to one time."""
    from fewstep.methods.adversarial import noised_for_critic

    method = resolve("pcm").method
    path = PATHS["vp"]
    rng = KeyedRng(3, 0, tuple(range(4000)))
    times = draw_times(method, path, rng)
    x = torch.zeros(4000, 2)
    seen, to = noised_for_critic(method.adversarial, path, x, times.s, times.top, rng, "fake")
    for edge, top in ((0, 249), (249, 499), (499, 749), (749, 999)):
        inside = to[times.s == edge]
        assert edge <= float(inside.min()) < edge + 10
        assert top - 10 < float(inside.max()) < top
    real, same = noised_for_critic(method.adversarial, path, x, times.s, times.top, rng, "real", to=to)
    assert same is to
    assert not torch.equal(seen, real), "noise of its own"


def tdd_landing(
    grid: list[float], end: float, sampled_times: list[float], index: int, method: ConsistencyConfig, u: float, v: float
) -> float:
    """Where TDD lands from grid[index], in plain numbers, from uniform draws u (of the time) and v (of gamma)."""
    width = len(grid) // method.segments
    edge = index // width * width - 1
    below = max(index - method.k, edge)

    def at(place: int) -> float:
        return end if place < 0 else grid[place]

    places = [edge, *(place for place in map(grid.index, sorted(set(sampled_times))) if edge < place <= below)]
    near = [place for place in places if place >= below - method.reach * len(grid) or place == max(places)]
    place = near[int(u * len(near))]
    return at(edge) if place == edge else max(at(edge), (1 - v * method.spread) * at(place))


@pytest.mark.parametrize("segments", [1, 5])
@pytest.mark.parametrize("end", ["index0", "clean"])
@pytest.mark.parametrize(
    ("name", "grid"), [("vp", 50), ("flow", 50), ("ve", 50), ("vp", 1000), ("vp", (9.0, 19.0, 99.0, 499.0, 999.0))]
)
def test_tdd_lands_where_sampling_does(name: str, grid: Any, end: Any, segments: int) -> None:
    """On a time of an inference list or its shrunk one, within [edge, t_n]; and on the end point itself."""
    from fewstep.diffusion.grid import inference_times

    path, method = PATHS[name], method_of("tdd", grid=grid, end=end, segments=segments, inference_steps=(4, 5))
    rng = KeyedRng(3, 0, tuple(range(3000)))
    times = draw_times(method, path, rng)
    points, lowest = training_grid(path, grid).tolist(), end_time(path, end)
    sampled_times = [t for steps in (4, 5) for t in inference_times(path, steps, grid=grid).tolist()]
    u, v = rng.uniform("s").tolist(), rng.uniform("spread").tolist()
    numbers = zip(times.index_nk.tolist(), u, v, strict=True)
    wanted = [tdd_landing(points, lowest, sampled_times, index, method, a, b) for index, a, b in numbers]
    assert times.s.tolist() == pytest.approx(wanted, rel=1e-12, abs=1e-12)
    assert bool((times.s <= times.t_n).all())
    assert bool((times.s >= lowest).all())
    assert bool((times.s == lowest).any()), "the end point that sampling uses"


@pytest.mark.parametrize("end", ["index0", "clean"])
def test_every_jump_that_tdd_is_sampled_with_is_trained(end: Any) -> None:
    """At each of its step counts: from each time to the next, and from the last to the end point."""
    from fewstep.diffusion.grid import inference_times

    path, method = PATHS["vp"], method_of("tdd", spread=0.0, end=end)
    times = draw_times(method, path, KeyedRng(3, 0, tuple(range(30_000))))
    trained = set(zip(times.t_nk.tolist(), times.s.tolist(), strict=True))
    for steps in range(4, 9):
        assert set(pairwise([*inference_times(path, steps).tolist(), end_time(path, end)])) <= trained


@pytest.mark.parametrize("end", ["index0", "clean"])
def test_tdd_shrinks_as_gamma_does(end: Any) -> None:
    path = PATHS["vp"]
    rng = KeyedRng(3, 0, tuple(range(6000)))
    exact = draw_times(method_of("tdd", spread=0.0, end=end), path, rng)
    spread = draw_times(method_of("tdd", end=end), path, rng)
    share = (spread.s / exact.s)[exact.s > 0]
    assert 0.7 <= float(share.min()) < 0.71
    assert 0.99 < float(share.max()) <= 1
    assert torch.equal(spread.s[exact.s <= 0], exact.s[exact.s <= 0])


# ---- a growing grid, and the weight of a step


def test_the_grid_grows_by_the_schedule_of_ict() -> None:
    """N(k) = min(s_0 2^floor(k/K'), s_1) with K' = floor(K/(log2(s_1/s_0) + 1)), written out for 3 to 4 sizes."""
    method = method_of("ct", grid=40, grid_start=5)
    assert [method.points_at(step, 10) for step in range(10)] == [5, 5, 10, 10, 20, 20, 40, 40, 40, 40]
    assert [method.points_at(step, 4) for step in range(4)] == [5, 10, 20, 40]
    big = method_of("ct", grid=1280, grid_start=10)
    assert [big.points_at(step, 400_000) for step in (0, 49_999, 50_000, 349_999, 350_000, 399_999)] == [
        *(10, 10, 20, 640, 1280, 1280)
    ]
    assert method.points_at(0, None) == 40
    assert method_of("ct").points_at(0, 10) == 50


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("recipe", ["ct", "tcd", "tdd", "pcm", "ctm"])
def test_a_growing_grid_trains_points_of_the_whole_one(recipe: str, name: str) -> None:
    """Pairs are neighbours of the coarse grid, whose times are in the last one; that is trained as without growth."""
    own = method_of(recipe)
    path, method = PATHS[name], own.model_copy(update={"grid_start": own.points // 2})
    grid = training_grid(path, method.grid)
    grid_times = torch.cat([grid.new_tensor([end_time(path, method.end)]), grid])
    first, last = (KeyedRng(3, step, tuple(range(4000)), steps=10) for step in (0, 9))
    times = draw_times(method, path, first)
    assert torch.equal(times.t_nk.unique(), grid[1::2])
    gaps = times.index_nk - times.index_n
    edge = times.index_nk // (len(grid) // method.segments) * (len(grid) // method.segments) - 1
    inside = times.index_n > edge
    counted = {2 * k for k in range(method.k_low or method.k, method.k + 1)}
    assert set(gaps[inside].tolist()) <= counted
    assert bool((times.t_n >= grid_times[edge + 1]).all())
    assert bool((times.s <= times.t_n).all())
    assert set(times.t_n.tolist()) <= set(grid_times.tolist())
    plain = draw_times(own, path, last)
    for part in ("t_nk", "t_n", "s", "top"):
        assert torch.equal(getattr(draw_times(method, path, last), part), getattr(plain, part))


@pytest.mark.parametrize("name", PATHS)
def test_icts_weight_is_one_over_the_step(name: str) -> None:
    """1/(t_{n+1} - t_n) in sigma, which is EDM's time and a flow's; on an indexed path in sigma/alpha."""
    from types import SimpleNamespace

    from fewstep.methods.distances import distance

    path = PATHS[name]
    method = resolve("ct", None, ["method.weight=step", "method.k=3"]).method
    times = draw_times(method, path, KeyedRng(3, 0, tuple(range(COUNT))))
    level = [path.sigma(t) / (path.alpha(t) if name == "vp" else 1) for t in (times.t_nk, times.t_n)]
    pair: Any = SimpleNamespace(config=method, denoiser=SimpleNamespace(path=path), times=times)
    gap = torch.randn(COUNT, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = distance(pair, gap, torch.zeros_like(gap), times.s)
    pair.config = method.model_copy(update={"weight": "none"})
    plain = distance(pair, gap, torch.zeros_like(gap), times.s)
    apart = level[0] > level[1]
    torch.testing.assert_close((found * (level[0] - level[1]))[apart], plain[apart], rtol=1e-9, atol=0)
    assert bool((found[apart] > 0).all()), "every time of the grid is trained"
    assert bool((found[~apart] == 0).all())


# ---- who is called


Counted = dict[str, int]


@pytest.mark.parametrize("recipe", [name for name in rows() if not resolve(name).method.matching.weight])
def test_network_calls_match_the_recipe(recipe: str) -> None:
    """`calls` is what estimates and docs are made from: counted here by the network itself, in samples of the batch."""
    plain = {"balance": "fixed", "tangent": TangentConfig(derivative="finite")}  # this network has no derivative
    method = resolve(recipe).method.model_copy(update=plain)
    seen: Counted = {"student": 0, "target": 0, "teacher": 0, "features": 0}
    mixture = gaussian(PATHS["vp"])

    def call(x: Tensor, t: Tensor, condition: Any, role: str) -> Tensor:
        who = role if role == "teacher" or (torch.is_grad_enabled() and role == "student") else "target"
        seen[who] += len(x)
        extra = {"s", "w"} & condition.keys()
        assert extra == (set() if role == "teacher" else set(method.extra_conditioning))
        return torch.zeros_like(x)

    rng = KeyedRng(5, 0, tuple(range(8)))
    sample = batch_for(method, mixture, rng)
    text = {"text": torch.zeros(8, 1)}
    sample = replace(sample, data=sample.data.float(), condition=text, null=text)
    none: Counted = dict.fromkeys(seen, 0)

    def critic(x: Tensor, t: Tensor, condition: Any) -> Tensor:
        seen["features"] += len(x)
        return x.sum(1, keepdim=True)

    pair = make_pair(method, Denoiser(call, PATHS["vp"], "eps"), sample, rng)
    assert {who: count / 8 for who, count in seen.items()} == none | {"target": start_calls(method).get("student", 0)}
    seen |= none
    consistency_loss(pair, rng, terms_of(method, FrozenNetworks(critic=critic)))  # type: ignore[arg-type]
    assert {who: count // 8 for who, count in seen.items()} == none | student_calls(method)
    if method.adversarial.weight:
        seen |= none
        critic_loss(pair, rng, critic)
        own = none | critic_calls(method)  # nothing has a gradient there: the student's count as the target's
        wanted = own | {"student": 0, "target": own["student"] + own["target"]}
        assert {who: count // 8 for who, count in seen.items()} == wanted


def test_cost_counts_a_backward_as_two() -> None:
    """Worked out by hand: what equal training costs are made of."""
    wanted = {"tcd": 1 + 1 + 2 + 2, "tcd-2": 2 + 2 + 2 + 4, "kd": 1 + 2, "ct": 1 + 1 + 2, "cd": 1 + 1 + 4 + 2}
    # PCM: as TCD, and the critic's features with gradient; its own step needs both jumps, two teachers, two features
    wanted["pcm"] = 6 + 3 + (1 + 1 + 2 + 2)
    # CTM: two calls of the student, three Heun steps, one jump of the target, two pushes of which one with gradient,
    # features; its critic sees data and where the student's jump is pushed to; both in a quarter of the steps
    wanted["ctm"] = (2 + 6 + 1 + 2 + 1 / 4) + 2 * (2 + 1 + 1 / 4) + (1 + 1 + 2) / 4
    assert {recipe: step_cost(resolve(recipe).method) for recipe in wanted} == wanted


NONE = "method.guidance.convention=none"
ILLEGAL: list[tuple[str, list[str], str]] = [
    ("pcm", ["method.segments=3"], "method.segments"),
    ("tcd", ["method.segments=5", "method.k=11"], "method.k"),
    ("tcd-2", ["method.end=clean"], "method.jump"),
    ("lcm", ["method.segments=2"], "method.jump"),
    ("lcm", ["method.extra_conditioning=[s]"], "method.extra_conditioning"),
    ("kd", ["method.point=solver"], "method.s"),
    ("tcd", ["method.s=next"], "method.s"),
    ("ct", ["method.guidance.convention=lcm"], "method.guidance.convention"),
    ("ctm", ["method.target=self"], "method.compare"),
    ("ctm", ["method.guidance.convention=lcm"], "method.denoising"),
    ("tcd", ["method.denoising=1", NONE], "method.denoising"),
    ("tcd", ["method.k_low=3"], "method.k_low"),
    ("tdd", ["method.inference_steps=[4,80]"], "method.inference_steps"),
    ("tcd-s", ["sampling.extra_conditioning=[]"], "sampling.extra_conditioning"),
    ("tcd", ["method.adversarial.weight=1"], "method.adversarial.real"),
    ("tcd", ["method.grid=[19]"], "method.grid"),
    ("tcd", ["method.grid=[5,5]"], "method.grid"),
    ("tcd-s", ["sampling.sampler=ddim", "sampling.extra_conditioning=[]"], "sampling.extra_conditioning"),
    ("cd", ["sampling.sampler=sss"], "sampling.jump"),
    ("tcd-2", ["method.r=0.3"], "sampling.r"),
    ("tcd-2", ["method.form=eps"], "sampling.form"),
    ("lcm", ["method.jump=first_order"], "sampling.jump"),
    ("tdd", ["sampling.grid=25"], "sampling.grid"),
    (
        "kd",
        ["method.extra_conditioning=[s]", "method.denoising=1", "method.guidance.convention=none"],
        "method.denoising",
    ),
    ("kd", ["method.adversarial={weight: 1, noise: .2}"], "method.adversarial.real"),
    ("mcm", ["method.jump=second_order"], "method.weight"),
    ("mcm", ["method.distance=features"], "method.weight"),
    ("lcm", ["method.point=self"], "method.point"),
    ("tcd", ["method.consistency=0"], "method.consistency"),
    ("tcd", ["method.balance=gradient"], "method.balance"),
    (
        "ct",
        ["method.extra_conditioning=[w]", "sampling.extra_conditioning=[w]", "sampling.w=5"],
        "method.extra_conditioning",
    ),
    ("ct", ["method.substeps=4"], "method.substeps"),
    ("tcd", ["method.guidance={convention: imagen, low: 0}"], "method.guidance.low"),
    ("ct", ["method.grid_start=20"], "method.grid_start"),
    ("ct", ["method.grid=40", "method.grid_start=5", "sampling.grid=40", "loop.steps=3"], "loop.steps"),
    ("shortcut", ["method.grid_start=25"], "method.grid_start"),
    ("shortcut", ["method.k_low=null", "method.k=5"], "method.k_low"),
    ("shortcut", ["method.k_low=2"], "method.k_low"),
    ("shortcut", ["method.segments=5", "method.k=10"], "method.k"),
    ("shortcut", ["method.segments=25", "method.k=2"], "method.k"),
    ("ctm", ["method.adversarial.clip=[10,1]"], "method.adversarial.clip"),
    ("ctm", ["method.adversarial.start=1"], "method.adversarial.start"),
    ("cd", ["method.consistency=0", "method.adversarial={weight: 1, start: 0.5}"], "method.adversarial.start"),
    ("tscd", ["loop.steps=3"], "loop.steps"),
]


@pytest.mark.parametrize(("recipe", "overrides", "field"), ILLEGAL)
def test_illegal_combinations_name_their_field(recipe: str, overrides: list[str], field: str) -> None:
    with pytest.raises(UserError) as error:
        resolve(recipe, None, overrides)
    assert error.value.field == field


# ---- what is written of them


def test_every_recipe_has_a_row_and_a_section_in_the_docs() -> None:
    import re
    from pathlib import Path as File

    page = (File(__file__).resolve().parents[2] / "docs" / "methods.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"^\| \[`([\w-]+)`\]\(#\1\) \|", page, re.M)) == sorted(names())
    sections = {title.lower() for title in re.findall(r"^##+ (.*)$", page, re.M)}
    assert set(names()) <= sections
