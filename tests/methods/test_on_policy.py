"""Recipes on the student's own way from noise, beside a step of each written from its paper in plain PyTorch."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.common.config import validate
from fewstep.common.errors import UserError
from fewstep.common.rng import KeyedRng
from fewstep.diffusion.config import Sampling
from fewstep.diffusion.denoiser import Denoiser
from fewstep.diffusion.draw_latents import draw_latents
from fewstep.diffusion.schedule import FlowMatching, Path, VarianceExploding, add_noise, scaled_linear
from fewstep.distillation.config import resolve
from fewstep.methods.config import ConsistencyConfig
from fewstep.methods.consistency import consistency_loss, make_pair
from fewstep.methods.cost import fake_calls, start_calls, student_calls
from fewstep.methods.distribution_matching import drawn_level, fake_loss, fake_points, matched_at, matching_loss
from fewstep.methods.pair import MicroBatch
from fewstep.methods.terms import FrozenNetworks, terms_of
from support.exact import Wide, gaussian, times_of
from support.plain_student import ROWS, WIDTH, Plain

PATHS: dict[str, Path] = {"vp": scaled_linear(), "flow": FlowMatching(), "ve": VarianceExploding()}


def simulating(**changes: Any) -> ConsistencyConfig:
    base = {"grid": 4, "start": "simulation", "s": "edge", "guidance": {"convention": "none"}, "end": "clean"}
    return validate(ConsistencyConfig, base | changes)


# ---- backward simulation


@pytest.mark.parametrize("gamma", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("name", PATHS)
def test_a_simulation_meets_the_points_of_sampling(name: str, gamma: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """x_{t_n+k} is where the sampler's own call at that time starts, from the same noise; nothing is called in vain."""
    path, count = PATHS[name], 12
    mixture = gaussian(path)
    calls: list[tuple[Tensor, Tensor]] = []

    def call(x: Tensor, t: Tensor, condition: Any, role: str) -> Tensor:
        assert role == "student"
        assert not torch.is_grad_enabled()
        calls.append((x, t))
        return mixture.denoise(x.double(), t).x0.float()

    method, rng = simulating(student_gamma=gamma), KeyedRng(3, 0, tuple(range(count)))
    denoiser = Denoiser(call, path, "x0")
    pair = make_pair(method, denoiser, MicroBatch(torch.zeros(count, 2), {}, {}), rng)
    assert sum(len(x) for x, _ in calls) == count * start_calls(method)["student"] == 1.5 * count
    calls.clear()
    noise = [rng.normal(name, (2,)) for name in ("noise", *(f"simulation's return {i}" for i in range(3)))]
    monkeypatch.setattr("fewstep.diffusion.draw_latents.picture_noise", lambda *_: (noise[0], iter(noise[1:]).__next__))
    sampling = Sampling(steps=4, gamma=gamma, grid=4, end="clean")
    draw_latents(denoiser, {}, {}, sampling, range(count), (2,), "student")
    at = {float(t[0]): x for x, t in calls}
    assert len(at) == 4
    for row, t in enumerate(pair.times.t_nk.tolist()):
        torch.testing.assert_close(pair.x_nk[row], at[t][row], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("batch", [1, 3, 4, 6])
def test_simulations_call_as_often_in_every_micro_batch(batch: int) -> None:
    calls = list[int]()

    def call(x: Tensor, t: Tensor, condition: Any, role: str) -> Tensor:
        calls.append(len(x))
        return torch.zeros_like(x)

    for step in range(6):
        rng, before = KeyedRng(3, step, tuple(range(batch))), len(calls)
        make_pair(simulating(), Denoiser(call, PATHS["vp"], "x0"), MicroBatch(torch.zeros(batch, 2), {}, {}), rng)
        assert len(calls) - before == 3


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"point": "path"}, "point"),
        ({"grid_start": 2}, "grid_start"),
        ({"jump": "skip"}, "start"),
        ({"s": "next", "point": "self"}, "s"),
        ({"start": "data", "s": "next"}, "s"),
    ],
)
def test_simulations_that_cannot_be(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(UserError) as error:
        simulating(**changes)
    assert error.value.field == field
    simulating(jump="skip", student_gamma=1.0)


# ---- SMD


def euler(plain: Plain, x: Tensor, t: Tensor, s: Tensor, role: str = "student", omega: float = 0.0) -> Tensor:
    return x + (s - t)[:, None] * plain.u(role, x, t, omega)


def own_steps(plain: Plain, times: list[float], index: Tensor) -> Tensor:
    """The student's Euler steps from noise to each sample's time."""
    x = plain.normal("noise")
    for number, (t, s) in enumerate(pairwise(times)):
        on = (len(times) - 1 - index > number)[:, None]
        with torch.no_grad():
            x = torch.where(on, euler(plain, x, times_of(t, x), times_of(s, x)), x)
    return x


@pytest.mark.parametrize("substeps", [1, 4])
def test_smd_as_its_paper_writes_it(substeps: int) -> None:
    """Squared error of the student's velocity over one segment of its own steps against the guided teacher's there."""
    plain = Plain()
    method = resolve("smd", None, [f"method.substeps={substeps}"]).method
    pair = plain.pair(method)
    index = pair.times.index_nk
    x = own_steps(plain, [1.0, 0.75, 0.5, 0.25], index)
    t, s = (index + 1).double() / 4, index.double() / 4
    with torch.no_grad():
        y = x
        for part in range(substeps):
            now, then = (t + (s - t) * n / substeps for n in (part, part + 1))
            y = euler(plain, y, now, then, "teacher", 4.0)
    wanted = (plain.u("student", x, t) - (y - x) / (s - t)[:, None]).square().mean()
    assert set(index.tolist()) == {0, 1, 2, 3}
    plain.check(consistency_loss(pair, plain.rng).value, wanted)


def test_smd_steps_towards_the_teachers_velocity() -> None:
    """A student that is off by a constant velocity is pulled back by it, at every segment."""
    path, off = FlowMatching(), torch.full((2,), 0.3, dtype=torch.float64, requires_grad=True)
    mixture = gaussian(path)

    def call(x: Tensor, t: Tensor, condition: Any, role: str) -> Tensor:
        exact = mixture.denoise(x.double(), t)
        return exact.eps - exact.x0 + (off if role == "student" else 0)

    method = resolve("smd", None, ["method.substeps=1", "method.guidance.convention=none"]).method
    rng, data = Wide(3, 0, tuple(range(ROWS))), torch.zeros(ROWS, 2, dtype=torch.float64)
    pair = make_pair(method, Denoiser(call, path, "flow"), MicroBatch(data, {}, {}), rng)
    loss = consistency_loss(pair, rng)
    assert loss.per_sample is not None
    torch.testing.assert_close(loss.per_sample.double(), torch.full((ROWS,), 0.09, dtype=torch.float64))
    (slope,) = torch.autograd.grad(loss.value, off)
    torch.testing.assert_close(slope, off.detach(), rtol=1e-6, atol=0)


# ---- distribution matching


def gap_of(plain: Plain, x_t: Tensor, t: Tensor, omega: float) -> tuple[Tensor, Tensor]:
    """x0 of the fake score less that of the guided teacher, and the latter; x0 = x_t - t u."""
    fake, real = (x_t - t[:, None] * plain.u(role, x_t, t, w) for role, w in (("fake", 0.0), ("teacher", omega)))
    return fake - real, real


def by_dmd(x0: Tensor, gap: Tensor, real: Tensor) -> Tensor:
    """DMD's gap: divided by the mean of |x0 - real x0| of each sample."""
    return gap / (x0 - real).abs().mean(1, keepdim=True)


def half_square(x0: Tensor, gap: Tensor) -> Tensor:
    """The loss whose gradient at x0 is the gap over the numbers of a batch."""
    return 0.5 * (x0 - (x0 - gap).detach()).square().mean()


def simulated(plain: Plain, index: Tensor) -> Tensor:
    """DMD2's backward simulation in four steps: x0, noised again to the next time, as often as the sample needs."""
    x = plain.normal("noise")
    for number in range(3):
        on, t, then = (3 - index > number)[:, None], times_of(1 - number / 4, x), 1 - (number + 1) / 4
        with torch.no_grad():
            x0 = x - t[:, None] * plain.u("student", x, t)
        x = torch.where(on, (1 - then) * x0 + then * plain.normal(f"simulation's return {number}"), x)
    return x


def updates(plain: Plain, method: ConsistencyConfig) -> tuple[Tensor, Tensor, Tensor]:
    """The library's losses of the student and of the fake score on one pair, and the pair's grid indices."""
    pair = plain.pair(method)
    student = consistency_loss(pair, plain.rng, terms_of(method, FrozenNetworks())).value
    fake = fake_loss(method.matching, pair, *fake_points(method.matching, pair), plain.rng).value
    return student, fake, pair.times.index_nk


@pytest.mark.parametrize("apart", [False, True])
def test_dmd2_and_decoupled_dmd_as_their_papers_write_them(apart: bool) -> None:
    """DMD2: the gap at a level of 2 to 98 %. Decoupled: unguided there; guidance at one below the student's time."""
    plain = Plain()
    student, fake, index = updates(plain, resolve("decoupled-dmd" if apart else "dmd2").method)
    t = (index + 1).double() / 4
    x = simulated(plain, index)
    x0 = x - t[:, None] * plain.u("student", x, t)
    omega, drawn = 7.0, {name: plain.rng.uniform(f"{name} t") for name in ("matching", "guidance", "fake")}

    def noised(name: str, level: Tensor) -> Tensor:
        return (1 - level)[:, None] * x0.detach() + level[:, None] * plain.normal(f"{name} noise")

    level = 0.02 + 0.96 * drawn["matching"]
    with torch.no_grad():
        gap = by_dmd(x0, *gap_of(plain, noised("matching", level), level, 0.0 if apart else omega))
        if apart:
            low = 0.02 + (t.clamp(max=0.98) - 0.02) * drawn["guidance"]
            x_t = noised("guidance", low)
            guided, plainly = (x_t - low[:, None] * plain.u("teacher", x_t, low, w) for w in (omega, 0.0))
            gap = gap - by_dmd(x0, guided - plainly, guided)
    plain.check(student, half_square(x0, gap))
    level = 0.02 + 0.96 * drawn["fake"]
    wanted = plain.normal("fake noise") - x0.detach()
    plain.check(fake, (plain.u("fake", noised("fake", level), level) - wanted).square().mean(), "fake")


def test_dpdmd_as_its_paper_writes_it() -> None:
    """The first velocity against the teacher's mean one over K steps; DMD through the other steps alone."""
    plain = Plain()
    student, fake, index = updates(plain, resolve("dpdmd").method)
    assert set(index.tolist()) == {49}
    x_1, one = plain.normal("noise"), torch.ones(ROWS, dtype=torch.float64)
    times = [1.0, 0.76, 0.5, 0.26, 0.0]
    with torch.no_grad():
        z = x_1
        for part in range(5):
            t, s = (one * (1 - 0.16 * n / 5) for n in (part, part + 1))
            z = euler(plain, z, t, s, "teacher", 3.5)
        x = euler(plain, x_1, one, 0.76 * one)
    diversity = (plain.u("student", x_1, one) - (x_1 - z) / (1 - 0.84)).square().mean()
    for t, s in pairwise(times[1:]):
        x = euler(plain, x, t * one, s * one)
    level = 0.02 + 0.96 * plain.rng.uniform("matching t")
    with torch.no_grad():
        x_t = (1 - level)[:, None] * x + level[:, None] * plain.normal("matching noise")
        gap = by_dmd(x, *gap_of(plain, x_t, level, 3.5))
    plain.check(student, 0.05 * diversity + half_square(x, gap))
    level = 0.02 + 0.96 * plain.rng.uniform("fake t")
    x_t = (1 - level)[:, None] * x.detach() + level[:, None] * plain.normal("fake noise")
    error = plain.u("fake", x_t, level) - (plain.normal("fake noise") - x.detach())
    plain.check(fake, error.square().mean(), "fake")


def test_tdm_as_its_paper_writes_it() -> None:
    """Each landing of its own steps, noised to a level below the time that it was jumped from; pseudo-Huber in x0.

    The fake score is fitted by denoising score matching of q(x_t | x_s): its score is -z/std.
    """
    plain = Plain()
    student, fake, index = updates(plain, resolve("tdm").method)
    t, s = (index + 1).double() / 4, index.double() / 4
    x = own_steps(plain, [1.0, 0.75, 0.5, 0.25], index)
    u = plain.u("student", x, t)
    x0, x_s = x - t[:, None] * u, (x + (s - t)[:, None] * u).detach()

    def noised(name: str) -> tuple[Tensor, Tensor, Tensor]:
        low, high = s.clamp(min=0.02), t.clamp(max=0.98)
        level = low + (high - low) * plain.rng.uniform(f"{name} t")
        ratio = (1 - level) / (1 - s)
        std = (level.square() - (ratio * s).square()).sqrt()[:, None]
        return ratio[:, None] * x_s + std * plain.normal(f"{name} noise"), level, std

    x_t, level, _ = noised("matching")
    with torch.no_grad():
        gap, _ = gap_of(plain, x_t, level, 3.5)
    c = 0.00054 * WIDTH**0.5
    wanted = (((x0 - (x0 - gap).detach()).square().sum(1) + c * c).sqrt() - c).mean()
    plain.check(student, wanted)
    x_t, level, std = noised("fake")
    sigma = level[:, None]
    score = -(x_t - (1 - sigma) * (x_t - sigma * plain.u("fake", x_t, level))) / sigma.square()
    # the network's error in u, which is that of the score times sigma/(1 - sigma), with the weight (std/sigma)^2
    error = (score + plain.normal("fake noise") / std) * sigma / (1 - sigma) * std / sigma
    plain.check(fake, error.square().mean(), "fake")


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("recipe", ["dmd2", "decoupled-dmd", "dpdmd", "tdm"])
def test_a_student_with_the_exact_law_stays(recipe: str, name: str) -> None:
    """Where every landing has the teacher's law the fake score fits best as the teacher, and the gap is then 0."""
    path, count = PATHS[name], 6000
    mixture = gaussian(path)
    shift = torch.zeros(count, 2, dtype=torch.float64, requires_grad=True)
    method = resolve(recipe, None, ["method.guidance.convention=none"]).method

    def call(x: Tensor, t: Tensor, condition: Any, role: str) -> Tensor:
        exact = mixture.denoise(x.double(), t).x0
        return exact + shift if role == "fake" else exact

    rng = Wide(3, 0, tuple(range(count)))
    pair = make_pair(method, Denoiser(call, path, "x0"), MicroBatch(torch.zeros(count, 2), {}, {}), rng)
    lands = mixture.sample(count, path.clean, torch.Generator().manual_seed(1))
    eps = rng.normal("landing's noise", (2,))
    points, at = add_noise(path, lands, eps, matched_at(pair)), matched_at(pair)
    (slope,) = torch.autograd.grad(fake_loss(method.matching, pair, points, at, rng).value, shift)
    assert bool((slope.mean(0).abs() < 5 * slope.std(0) / count**0.5).all())
    x = points.requires_grad_()
    if method.matching.matched == "landing":
        (slope,) = torch.autograd.grad(matching_loss(method.matching, pair, x, at, rng).sum(), x)
        assert float(slope.abs().max()) < 1e-9


@pytest.mark.parametrize("recipe", ["dmd2", "decoupled-dmd", "tdm"])
def test_a_student_beside_the_data_is_moved_back(recipe: str) -> None:
    """The fake score of a student that lands too far right: every sample's gradient points right, down the gap."""
    path = PATHS["flow"]
    real, own = gaussian(path), gaussian(path, mean=(1.7, -0.4))
    method = resolve(recipe, None, ["method.guidance.convention=none"]).method

    def call(x: Tensor, t: Tensor, condition: Any, role: str) -> Tensor:
        return (own if role == "fake" else real).denoise(x.double(), t).x0

    rng = Wide(3, 0, tuple(range(64)))
    pair = make_pair(method, Denoiser(call, path, "x0"), MicroBatch(torch.zeros(64, 2), {}, {}), rng)
    at = matched_at(pair)
    points = add_noise(path, own.sample(64, 0.0, torch.Generator().manual_seed(1)), rng.normal("n", (2,)), at)
    (slope,) = torch.autograd.grad(matching_loss(method.matching, pair, points.requires_grad_(), at, rng).sum(), points)
    assert bool((slope[:, 0] > 0).all())
    assert float(slope[:, 1].abs().max()) < 1e-9


def test_noise_levels_of_a_jump_lie_between_its_times() -> None:
    method = resolve("tdm").method
    rng = KeyedRng(3, 0, tuple(range(4000)))
    pair = make_pair(
        method, Denoiser(lambda x, *_: x, PATHS["flow"], "x0"), MicroBatch(torch.zeros(4000, 2), {}, {}), rng
    )
    t = drawn_level(method.matching, "jump", pair, rng, "matching t")
    for low, high in pairwise([0.0, 0.25, 0.5, 0.75, 1.0]):
        inside = t[pair.times.s == low]
        assert max(low, 0.02) <= float(inside.min()) < low + 0.03
        assert high - 0.03 < float(inside.max()) <= high
    every = drawn_level(method.matching, "all", pair, rng, "matching t")
    assert (float(every.min()), float(every.max())) == pytest.approx((0.02, 0.98), abs=0.002)


def test_guidance_apart_at_the_level_of_the_gap_is_guidance_within() -> None:
    """Without a normaliser, and with one draw for both, the two forms have one gradient."""
    found = []
    for words in ([], ["method.matching.guidance_levels=all"]):
        plain = Plain()
        plain.rng = Alike(*[getattr(plain.rng, part) for part in ("seed", "step", "indices")])
        method = resolve("dmd2", None, ["method.matching.normaliser=none", *words]).method
        loss = consistency_loss(plain.pair(method), plain.rng, terms_of(method, FrozenNetworks())).value
        found.append(torch.autograd.grad(loss, list(plain.roles["student"].parameters())))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
        assert bool(one.any())


class Alike(Wide):
    """Guidance drawn as the gap is."""

    def normal(self, purpose: str, shape: tuple[int, ...]) -> Tensor:
        return super().normal(purpose.replace("guidance", "matching"), shape)

    def uniform(self, purpose: str, low: float = 0.0, high: float = 1.0) -> Tensor:
        return super().uniform(purpose.replace("guidance", "matching"), low, high)


@pytest.mark.parametrize("recipe", ["dmd2", "decoupled-dmd", "dpdmd", "tdm"])
def test_calls_of_every_update_are_counted(recipe: str) -> None:
    """Those of the start, the student's update and the fake score's, by the networks themselves."""
    plain, seen = Plain(), dict[str, int]()
    method = resolve(recipe).method

    def counted(role: str, inner: torch.nn.Module) -> torch.nn.Module:
        inner.register_forward_hook(lambda module, inputs, out: seen.update({role: seen.get(role, 0) + len(out)}))
        return inner

    for role, inner in plain.roles.items():
        counted(role, inner)
    pair = plain.pair(method)
    assert {role: n / ROWS for role, n in seen.items()} == start_calls(method)
    seen.clear()
    consistency_loss(pair, plain.rng, terms_of(method, FrozenNetworks()))
    assert {role: n / ROWS for role, n in seen.items()} == {role: n for role, n in student_calls(method).items() if n}
    seen.clear()
    fake_loss(method.matching, pair, *fake_points(method.matching, pair), plain.rng)
    assert {role: n / ROWS for role, n in seen.items()} == {role: n for role, n in fake_calls(method).items() if n}


@pytest.mark.parametrize(
    ("recipe", "words", "field"),
    [
        ("dpdmd", ["method.start=simulation"], "method.matching.matched"),
        ("dpdmd", ["method.student_steps=1"], "method.matching.matched"),
        ("tdm", ["method.matching.levels=all"], "method.matching.weight"),
        ("tdm", ["method.matching.fit=sample"], "method.matching.fit"),
        ("dmd2", ["method.s=next"], "method.matching.weight"),
    ],
)
def test_what_cannot_be_matched(recipe: str, words: list[str], field: str) -> None:
    with pytest.raises(UserError) as error:
        resolve(recipe, None, words)
    assert error.value.field == field
