"""What TLCM adds to the family: starts without data, distribution matching, preference; on exact teachers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

from fewstep.common.choices import Normaliser
from fewstep.common.config import validate
from fewstep.common.errors import UserError
from fewstep.common.rng import KeyedRng
from fewstep.diffusion.denoiser import Denoiser
from fewstep.diffusion.grid import inference_times, training_grid
from fewstep.diffusion.samplers import diffuse, start_size
from fewstep.diffusion.schedule import FlowMatching, Path, VarianceExploding, add_noise, expand, scaled_linear
from fewstep.diffusion.solver import ddim
from fewstep.distillation.config import resolve
from fewstep.methods.adversarial import discriminate, generator_loss
from fewstep.methods.config import ConsistencyConfig
from fewstep.methods.consistency import compared_at, consistency_loss, critic_loss, make_pair, student_landing
from fewstep.methods.cost import fake_calls, start_calls, step_calls
from fewstep.methods.distribution_matching import (
    drawn_noise,
    fake_loss,
    fake_points,
    gap_factor,
    matching_loss,
)
from fewstep.methods.pair import MicroBatch, Pair, StoredPoints
from fewstep.methods.term_config import AdversarialConfig
from fewstep.methods.terms import FrozenNetworks, other_prompts, reward_loss, terms_of
from fewstep.methods.times import draw_times, in_turn
from fewstep.methods.update_plan import PairCache
from fewstep_worlds.plane.mixture import Mixture, one_gaussian, ring, times_of
from fewstep_worlds.plane.network import PlaneCritic, PlaneNetwork

PATHS: dict[str, Path] = {"vp": scaled_linear(), "flow": FlowMatching(), "ve": VarianceExploding()}
UNGUIDED = {"convention": "none"}


def method_of(**changes: Any) -> ConsistencyConfig:
    base = {"grid": 8, "k": 1, "s": "edge", "guidance": UNGUIDED, "end": "clean", "start": "rollout"}
    return validate(ConsistencyConfig, base | changes)


def gaussian(path: Path, mean: tuple[float, float] = (0.5, -0.3), std: float = 0.5) -> Mixture:
    one = torch.ones(1, dtype=torch.float64)
    return Mixture(path, one, torch.tensor([mean], dtype=torch.float64), std * one)


def exact(mixture: Mixture) -> Callable[..., Tensor]:
    """An x0 network that is right for the mixture, in any role."""
    return lambda x, t, condition, role: mixture.denoise(x.double(), t).x0


def sample_of(count: int, **changes: Any) -> MicroBatch:
    return replace(MicroBatch(torch.zeros(()).expand(count, 2), {}, {}), **changes)


def drawn(count: int, step: int = 0) -> KeyedRng:
    return KeyedRng(3, step, tuple(range(count)))


# ---- starts


def test_a_roll_out_takes_as_many_steps_as_its_point_is_clean() -> None:
    """L = M - s: of a thousand times in eight segments, 8 steps to the cleanest, 1 to the noisiest; 562 takes four."""
    counts = method_of(grid=1000, k=20, segments=8).rollout_steps
    assert counts[562] == 4, "the paper's example: 999, 890, 780, 671, 562"
    assert [counts[i] for i in (0, 124, 125, 874, 875, 999)] == [8, 8, 7, 2, 1, 1]
    assert method_of(grid=1000, k=20, rollout=1).rollout_steps == [1] * 1000
    whole = method_of(grid=1000, k=20, segments=8)
    assert start_calls(whole)["teacher"] == pytest.approx(4.5)


@pytest.mark.parametrize("name", PATHS)
def test_a_roll_out_is_the_teachers_trajectory(name: str) -> None:
    """Each sample as if alone, in equal steps of time from pure noise; only unfinished samples are evaluated."""
    path, count = PATHS[name], 40
    mixture = gaussian(path)
    calls = 0

    def call(x: Tensor, t: Tensor, condition: Any, role: str) -> Tensor:
        nonlocal calls
        calls += len(x)
        assert role == "teacher"
        return mixture.denoise(x.double(), t).x0

    denoiser = Denoiser(call, path, "x0")
    method = method_of(grid=40, segments=8, rollout=8)
    pair = make_pair(method, denoiser, sample_of(count), drawn(count))
    counts = torch.tensor(method.rollout_steps)[pair.times.index_nk]
    assert calls == int(counts.sum())
    assert {1, 8} <= set(counts.tolist())
    noise = drawn(count).normal("noise", (2,)) * start_size(path)
    for i in range(count):
        x, top = noise[i : i + 1], path.noisiest
        goal, steps = float(pair.times.t_nk[i]), int(counts[i])
        for j in range(steps):
            t, s = (top + (goal - top) * n / steps for n in (j, j + 1))
            x = ddim(denoiser_of(denoiser), path, x, times_of(t, x), times_of(s, x)).float()
        torch.testing.assert_close(pair.x_nk[i : i + 1].float(), x, rtol=1e-4, atol=1e-5)


def denoiser_of(denoiser: Denoiser) -> Any:
    return lambda x, t: denoiser.estimate(x, t, {}, "teacher")


@pytest.mark.parametrize(("grid", "rollout"), [(40, 8), (50, 8), (8, 3), (5, 9), (10, 1)])
def test_roll_outs_are_as_long_in_every_micro_batch(grid: int, rollout: int) -> None:
    """Processes make as many calls, in whatever part of whichever step, of rows that hardly differ."""
    path, calls = PATHS["vp"], list[int]()

    def call(x: Tensor, t: Tensor, condition: Any, role: str) -> Tensor:
        calls.append(len(x))
        return torch.zeros_like(x)

    method = method_of(grid=grid, rollout=rollout)
    longest = max(method.rollout_steps)
    for batch in (1, 3, rollout, 16):
        shapes = [set[int]() for _ in range(longest)]
        for step, part in itertools.product(range(20), range(3)):
            first = (step * 3 + part) * batch
            rng = KeyedRng(3, step, tuple(range(first, first + batch)))
            calls.clear()
            pair = make_pair(method, Denoiser(call, path, "x0"), sample_of(batch), rng)
            counts = torch.tensor(method.rollout_steps)[pair.times.index_nk]
            assert calls == [max(1, int((counts > number).sum())) for number in range(longest)], "always as many"
            for seen, rows in zip(shapes, calls, strict=True):
                seen.add(rows)
        if grid % rollout:  # lengths then change within a part
            continue
        if batch % rollout == 0:
            assert shapes == [{batch * (rollout - number) // rollout} for number in range(rollout)]
        assert all(max(seen) - min(seen) <= 2 for seen in shapes)
        assert len(set[int]().union(*shapes)) <= min(batch, 2 * rollout)


@pytest.mark.parametrize(("grid", "rollout"), [(40, 8), (50, 8), (6, 9)])
def test_each_sample_of_a_roll_out_starts_anywhere(grid: int, rollout: int) -> None:
    """Over steps each sample's time is uniform, and the next sample's is no more its neighbour's than another's."""
    count = 6000
    found = torch.stack([in_turn(KeyedRng(0, step, (5, 6)), rollout, grid) for step in range(count)])
    for column in found.T:
        shares = torch.bincount(column, minlength=grid) / count
        assert float((shares - 1 / grid).abs().max()) < 5 * (1 / grid / count) ** 0.5
    block = in_turn(KeyedRng(0, 0, tuple(range(rollout))), rollout, grid * rollout)
    assert sorted((block // grid).tolist()) == list(range(rollout))


def test_a_roll_out_is_guided_as_the_next_step_is() -> None:
    """One omega for the roll-out and for the step that follows; the roll-out sees each sample's own prompt."""
    path, seen = PATHS["vp"], []

    def call(x: Tensor, t: Tensor, condition: Any, role: str) -> Tensor:
        seen.append((role, condition["text"].flatten().tolist()))
        return torch.zeros_like(x) + condition["text"][:, :1]

    text = torch.arange(1.0, 9.0)[:, None]
    sample = sample_of(8, condition={"text": text}, null={"text": torch.zeros(8, 1)})
    method = method_of(grid=8, segments=8, guidance={"convention": "imagen", "low": 3.0, "high": 3.0}, k=1, s="edge")
    pair = make_pair(method, Denoiser(call, path, "x0"), sample, drawn(8))
    assert pair.omega.tolist() == [2.0] * 8
    for role, texts in seen:
        half = len(texts) // 2
        assert role == "teacher"
        assert all(value > 0 for value in texts[:half])
        assert texts[half:] == [0.0] * half
    counts = torch.tensor(method.rollout_steps)[pair.times.index_nk]
    repeats = [sum(value in texts for _, texts in seen) for value in text[:, 0].tolist()]
    assert repeats == counts.tolist()


@pytest.mark.parametrize("name", PATHS)
def test_the_students_own_samples_follow_its_distribution(name: str) -> None:
    """An exact jump to the end draws exactly the data, in q calls; x_{t_n+k} is that sample, noised."""
    path, count = PATHS[name], 4000
    mixture, calls = gaussian(path), []

    def call(x: Tensor, t: Tensor, condition: Any, role: str) -> Tensor:
        calls.append((role, torch.is_grad_enabled()))
        return mixture.flow(x.double(), t, times_of(0.0, x))

    method = method_of(start="student", student_steps=4)
    pair = make_pair(method, Denoiser(call, path, "x0"), sample_of(count), drawn(count))
    assert calls == [("student", False)] * 4
    assert pair.clean is not None
    assert pair.clean_at == path.clean
    torch.testing.assert_close(pair.clean.double().mean(0), mixture.means[0], atol=0.04, rtol=0)
    torch.testing.assert_close(pair.clean.double().std(0), mixture.stds.expand(2), atol=0.04, rtol=0)
    z = drawn(count).normal("noise", (2,))
    low = torch.full((count,), path.clean, dtype=torch.float64)
    torch.testing.assert_close(pair.x_nk, diffuse(path, pair.clean, low, pair.times.t_nk, z))


def test_a_step_by_stored_outputs_is_the_teachers_own() -> None:
    """No call, any omega: the same point as an online guided step from the stored one."""
    path, count, n = PATHS["vp"], 32, 8
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(count, n + 1, 2, generator=generator, dtype=torch.float64)
    text, none = {"text": torch.full((count, 1), 0.7)}, {"text": torch.zeros(count, 1)}
    calls = 0

    def call(x: Tensor, t: Tensor, condition: Any, role: str) -> Tensor:
        nonlocal calls
        calls += role == "teacher"
        return torch.tanh(x) * 0.3 + condition["text"]

    denoiser, grid = Denoiser(call, path, "eps"), training_grid(path, n)
    outputs = [
        torch.stack(
            [call(points[:, i + 1], times_of(float(t), points[:, 0]), condition, "") for i, t in enumerate(grid)], 1
        )
        for condition in (text, none)
    ]
    guidance = {"convention": "lcm", "low": 1.0, "high": 5.0}
    found = {}
    for point in ("stored", "solver"):
        calls = 0
        method = method_of(start="trajectory", point=point, guidance=guidance, k=3)
        stored = StoredPoints.of(points, draw_times(method, path, drawn(count)), (outputs[0], outputs[1]))
        pair = make_pair(method, denoiser, MicroBatch(points[:, 0], text, none, None, stored), drawn(count))
        from fewstep.methods.next_points import POINTS

        found[point] = POINTS[point](pair)  # type: ignore[index]
        assert calls == (0 if point == "stored" else 1)
        assert float(pair.omega.max()) > 4
    torch.testing.assert_close(found["stored"], found["solver"], rtol=1e-12, atol=1e-12)


def test_a_pair_is_made_once_for_all_updates_of_a_micro_batch() -> None:
    calls = 0

    def call(x: Tensor, t: Tensor, condition: Any, role: str) -> Tensor:
        nonlocal calls
        calls += 1
        return x

    stage = PairCache(method_of(rollout=1), Denoiser(call, PATHS["flow"], "x0"))
    first, batch = drawn(4), {"sample": sample_of(4)}
    assert stage.pair(batch, first) is stage.pair(batch, first)
    assert calls == 1
    assert stage.pair(batch, drawn(4, 1)) is not stage.pair(batch, first)


# ---- distribution matching


def pair_from(method: ConsistencyConfig, denoiser: Denoiser, count: int, step: int) -> tuple[Pair, KeyedRng]:
    rng = drawn(count, step)
    return make_pair(method, denoiser, sample_of(count), rng), rng


@pytest.mark.parametrize("normaliser", ["dmd", "score", "none"])
def test_the_gradient_is_the_gap_of_the_scores(normaliser: Any) -> None:
    """d loss/dx0 = (fake x0 - real x0) times the normaliser, over the numbers of a sample; nothing flows elsewhere."""
    path, count = PATHS["flow"], 64
    real, fake = gaussian(path), gaussian(path, (-0.4, 0.2), 0.3)

    def call(x: Tensor, t: Tensor, condition: Any, role: str) -> Tensor:
        return (fake if role == "fake" else real).denoise(x.double(), t).x0

    method = method_of(consistency=0.0, matching={"weight": 1.0, "normaliser": normaliser})
    pair, rng = pair_from(method, Denoiser(call, path, "x0"), count, 0)
    x0 = fake.sample(count, path.clean, torch.Generator().manual_seed(1)).requires_grad_()
    at = torch.full((count,), path.clean, dtype=torch.float64)
    (slope,) = torch.autograd.grad(matching_loss(method.matching, pair, x0, at, rng).sum(), x0)
    t = path.clean + (path.noisiest - path.clean) * rng.uniform("matching t", 0.02, 0.98)
    with torch.no_grad():
        alpha, sigma = (expand(part(t), x0) for part in (path.alpha, path.sigma))
        x_t = alpha * x0 + sigma * rng.normal("matching noise", (2,))
        gap = fake.denoise(x_t, t).x0 - real.denoise(x_t, t).x0
        by_hand = {
            "dmd": 1 / (x0 - real.denoise(x_t, t).x0).abs().mean(1, keepdim=True),
            "score": (alpha / sigma).square(),
            "none": 1.0,
        }[normaliser]
        # as in KL: alpha (s_fake - s_real), with s = -eps/sigma
        scores = [-(x_t - alpha * m.denoise(x_t, t).x0) / sigma.square() for m in (fake, real)]
    torch.testing.assert_close(slope, by_hand * gap / 2)
    if normaliser == "score":
        torch.testing.assert_close(slope, alpha * (scores[0] - scores[1]) / 2)
    assert set(get_args(Normaliser)) == {"dmd", "score", "none"}


@pytest.mark.parametrize("normaliser", ["dmd", "score", "none"])
@pytest.mark.parametrize("omega", [0.0, 7.0])
def test_where_the_fake_score_is_the_students_and_that_the_teachers_only_guidance_is_left(
    omega: float, normaliser: Any
) -> None:
    """The fixed point, exactly: the gap of equal scores is 0, under guidance -omega (real - null) at every point.

    A fake score that is still the teacher gives the same gap, so that all of it is guidance.
    """
    path, count = PATHS["flow"], 64
    real, null = gaussian(path), gaussian(path, (-0.4, 0.2), 0.8)

    def call(x: Tensor, t: Tensor, condition: Any, role: str) -> Tensor:
        parts = [(null if empty else real).denoise(row[None].double(), now[None]).x0 for row, now, empty in zip(
            x, t, condition["empty"], strict=True)]  # fmt: skip
        return torch.cat(parts)

    guidance = {"convention": "lcm", "low": omega, "high": omega}
    method = method_of(consistency=0.0, matching={"weight": 1.0, "normaliser": normaliser}, guidance=guidance)
    own, empty = ({"empty": torch.full((count,), flag)} for flag in (False, True))
    rng = drawn(count)
    pair = make_pair(method, Denoiser(call, path, "x0"), sample_of(count, condition=own, null=empty), rng)
    x0 = real.sample(count, path.clean, torch.Generator().manual_seed(1)).requires_grad_()
    at = torch.full((count,), path.clean, dtype=torch.float64)
    (slope,) = torch.autograd.grad(matching_loss(method.matching, pair, x0, at, rng).sum(), x0)
    t = drawn_noise(method.matching, path, rng, "matching t")
    with torch.no_grad():
        x_t = add_noise(path, x0, rng.normal("matching noise", (2,)), t)
        plain = real.denoise(x_t, t).x0
        guided = omega * (plain - null.denoise(x_t, t).x0)
        factor = expand(gap_factor(normaliser, path, t, x0, plain + guided), x0)
    torch.testing.assert_close(slope, -factor * guided / 2, rtol=1e-6, atol=1e-9)
    assert bool(slope.any()) == (omega > 0)


@pytest.mark.parametrize("end", ["clean", "index0"])
def test_the_fake_score_is_fitted_to_landings_or_to_the_students_own_samples(end: Any) -> None:
    """A student whose x0 is the time of the call lands at t_{n+k}, and its samples end at their last time."""
    path, count = PATHS["vp"], 16
    calls: list[float] = []

    def call(x: Tensor, t: Tensor, condition: Any, role: str) -> Tensor:
        calls.extend(t.tolist())
        return t[:, None].expand(-1, 2).float()

    found = {}
    for fit in ("landing", "sample"):
        method = method_of(start="student", end=end, matching={"weight": 1.0, "fit": fit})
        pair, _ = pair_from(method, Denoiser(call, path, "x0"), count, 0)
        before = len(calls)
        points, at = fake_points(method.matching, pair)
        assert len(calls) - before == count * fake_calls(method).get("student", 0)
        assert at.tolist() == [path.clean if end == "clean" else 0.0] * count
        found[fit] = points
    if end == "clean":
        last = float(inference_times(path, 4, grid=8)[-1])
        assert found["sample"].tolist() == [[last, last]] * count
        assert found["landing"][:, 0].tolist() == pytest.approx(pair.times.t_nk.tolist())
        assert len(set(pair.times.t_nk.tolist())) > 1
    assert not torch.equal(found["sample"], found["landing"])


def test_each_stage_of_the_recipe_updates_its_roles_as_often_as_the_paper() -> None:
    """12,000, 2,000, 500 and 1,000 updates of the student; in the last five of the fake score for each."""
    stages = resolve("tlcm").each_stage()
    updates = [stage.loop.steps // stage.method.student_every for stage in stages]
    assert updates == [12_000, 2_000, 500, 1_000]
    last = stages[-1]
    assert (last.loop.steps, last.loop.batch) == (5_000, 4)
    assert last.loop.steps // last.method.adversarial.every == 1_000
    assert last.method.matching.fit == "sample"
    assert step_calls(last.method)["fake"] == pytest.approx(1 + 1 / 5)
    (quick,) = resolve("tlcm", None, ["loop.steps=15500", "stages.matching.share=1000"]).each_stage()[3:]
    assert quick.loop.steps // quick.method.student_every == 200


@pytest.mark.slow
def test_the_fake_score_converges_to_the_students_exact_score() -> None:
    """A student that lands on a known Gaussian: the fake score, which starts as the teacher, becomes its."""
    path = PATHS["flow"]
    teacher, lands = ring(path), gaussian(path, (0.9, -0.2), 0.4)
    network = PlaneNetwork(one_gaussian(teacher), "flow", 64, seed=1)

    def call(x: Tensor, t: Tensor, condition: Any, role: str) -> Tensor:
        return network(x.float(), t) if role == "fake" else torch.zeros_like(x)

    denoiser = Denoiser(call, path, "flow")
    method = method_of(consistency=0.0, matching={"weight": 1.0}, rollout=1)
    optimiser = torch.optim.Adam(network.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    at = torch.zeros(256, dtype=torch.float64)
    gaps = []
    for step in range(501):
        if step in (0, 500):
            gaps.append(score_error(denoiser, lands))
        pair, rng = pair_from(method, denoiser, 256, step)
        landed = lands.sample(256, 0.0, generator).float()
        optimiser.zero_grad()
        fake_loss(method.matching, pair, landed, at, rng).value.backward()
        optimiser.step()
    assert gaps[0] > 0.5
    assert gaps[1] < 0.02


@torch.no_grad()
def score_error(denoiser: Denoiser, lands: Mixture) -> float:
    """Mean squared error of the fake x0 against the exact posterior mean, over times and points."""
    path, generator = lands.path, torch.Generator().manual_seed(7)
    errors = []
    for t in (0.2, 0.5, 0.8):
        x = lands.sample(500, t, generator)
        now = times_of(t, x)
        found = denoiser.estimate(x.float(), now, {}, "fake").x0.double()
        errors.append(float((found - lands.denoise(x, now).x0).square().sum(1).mean()))
    assert path is denoiser.path
    return max(errors)


class Wrong(nn.Module):
    """A student whose end points are the exact ones, turned, moved and narrowed."""

    def __init__(self, mixture: Mixture) -> None:
        super().__init__()
        self.mixture = mixture
        self.matrix = nn.Parameter(torch.tensor([[0.4, 0.3], [-0.3, 0.4]]))
        self.move = nn.Parameter(torch.tensor([0.8, 0.6]))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.mixture.flow(x.double(), t, times_of(0.0, x), steps=8).float() @ self.matrix + self.move


@pytest.mark.slow
@pytest.mark.parametrize("by", ["matching", "matching by dmd", "nonsaturating", "hinge"])
def test_alone_it_moves_a_wrong_student_to_the_right_distribution(by: str) -> None:
    """No consistency loss. Three unequal modes, so that every turn shows; the student starts turned, narrowed, moved.

    Its squared energy distance to the exact law falls from above .5 to below .01, and it turns back.
    """
    path = PATHS["flow"]
    mixture = lopsided(path)
    student = Wrong(mixture)
    fake, critic = PlaneNetwork(one_gaussian(mixture), "x0", 64, seed=2), PlaneCritic(64, seed=2)

    def call(x: Tensor, t: Tensor, condition: Any, role: str) -> Tensor:
        if role == "teacher":
            return mixture.denoise(x.double(), t).x0.float()
        return fake(x.float(), t) if role == "fake" else student(x, t)

    denoiser = Denoiser(call, path, "x0")
    matches = by.startswith("matching")
    term: dict[str, Any] = {"matching": {"weight": 1.0, "normaliser": "dmd" if by.endswith("dmd") else "none"}}
    if not matches:
        term = {"adversarial": {"weight": 1.0, "kind": by, "real": "data", "r1": 0.1}}
    method = method_of(consistency=0.0, start="data", **term)
    terms = terms_of(method, FrozenNetworks(critic=critic))
    learns = torch.optim.Adam(student.parameters(), lr=0.01, betas=(0.0, 0.99))
    follows = torch.optim.Adam([*fake.parameters(), *critic.parameters()], lr=5e-3, betas=(0.0, 0.99))
    before = landed_energy(student, mixture)
    for step in range(1200):
        generator = torch.Generator().manual_seed(step)
        data = mixture.sample(128, 0.0, generator).float()
        rng = drawn(128, step)
        pair = make_pair(method, denoiser, sample_of(128, data=data), rng)
        follows.zero_grad()
        if matches:
            with torch.no_grad():
                landed = student_landing(pair)
            fake_loss(method.matching, pair, landed, compared_at(pair), rng).value.backward()
        else:
            critic_loss(pair, rng, critic).value.backward()
        follows.step()
        if step % 3 == 0:
            learns.zero_grad()
            consistency_loss(pair, rng, terms).value.backward()
            learns.step()
    assert before > 0.5
    assert landed_energy(student, mixture) < 0.01
    assert float((student.matrix.detach() - torch.eye(2)).abs().max()) < 0.05


def lopsided(path: Path) -> Mixture:
    """Three modes of .5, .3 and .2, none like another."""
    means = torch.tensor([[1.2, 0.2], [-0.9, 0.9], [-0.2, -1.1]], dtype=torch.float64)
    weights, stds = torch.tensor([[0.5, 0.3, 0.2], [0.35, 0.2, 0.3]], dtype=torch.float64)
    return Mixture(path, weights, means, stds)


@torch.no_grad()
def landed_energy(student: nn.Module, mixture: Mixture) -> float:
    noise = torch.randn(3000, 2, generator=torch.Generator().manual_seed(11), dtype=torch.float64)
    return mixture.energy(student(noise, times_of(mixture.path.noisiest, noise)).double(), 0.0)


@pytest.mark.parametrize(
    ("kind", "student", "critic"),
    [
        # logits of real points 2 and -1, of fake ones .5 and -3
        ("hinge", [-0.5, 3.0], [0 + 1.5, 2 + 0]),
        (
            "nonsaturating",
            [math.log1p(math.exp(-0.5)), math.log1p(math.exp(3))],
            [math.log1p(math.exp(-2)) + math.log1p(math.exp(0.5)), math.log1p(math.exp(1)) + math.log1p(math.exp(-3))],
        ),
    ],
)
def test_what_critic_and_student_minimise(kind: str, student: list[float], critic: list[float]) -> None:
    """By hand: the critic wants real above fake, the student its own points above."""
    config = AdversarialConfig(weight=1.0, kind=kind)  # type: ignore[arg-type]
    real, fake = torch.tensor([2.0, -1.0]), torch.tensor([0.5, -3.0])
    torch.testing.assert_close(generator_loss(config, fake), torch.tensor(student))
    now = times_of(0.5, real[:, None])
    found = discriminate(config, lambda x, t, c: x, (real, now), (fake, now), {})
    assert found.per_sample is not None
    torch.testing.assert_close(found.per_sample, torch.tensor(critic))
    torch.testing.assert_close(found.value, torch.tensor(critic).mean())
    assert (found.scalars["real"], found.scalars["fake"]) == (real.mean(), fake.mean())


# ---- reward


def test_settings_of_earlier_versions_are_read_under_their_old_names() -> None:
    old = validate(
        ConsistencyConfig,
        {"distance": "perceptual", "preference": {"weight": 2.0}, "grid": 1, "s": "edge"} | {"grid": 8},
    )
    assert (old.distance, old.reward.weight) == ("latent_lpips", 2.0)


def test_the_two_sided_hinge() -> None:
    """relu(s0 - right) + relu(wrong - s1), nothing for a sample without prompt; slopes where it bends and beyond."""
    config = method_of(reward={"weight": 1.0, "s0": 3.0, "s1": 1.0}).reward
    x0 = torch.tensor([2.0, 5.0, 2.0, 2.0], requires_grad=True)
    prompts = torch.tensor([0, 1, 2, 3])  # of three: the last sample has none

    def reward(x: Tensor, chosen: Any) -> list[Tensor]:
        assert chosen[0].tolist() == [0, 1, 2, 0]
        assert all(a != b for a, b in zip(chosen[0][:3].tolist(), chosen[1][:3].tolist()))
        return [x, x / 2 + 1]

    loss = reward_loss(config, reward, x0, prompts, 3, drawn(4))
    assert loss.tolist() == [1 + 1, 0 + 2.5, 1 + 1, 0]
    (slope,) = torch.autograd.grad(loss.sum(), x0)
    assert slope.tolist() == [-1 + 0.5, 0.5, -1 + 0.5, 0]


def test_a_wrong_prompt_is_another_one_and_any_of_them() -> None:
    prompts = torch.arange(4).repeat(500)
    wrong = other_prompts(prompts, 4, drawn(2000))
    assert not bool((wrong == prompts).any())
    for prompt in range(4):
        others = wrong[prompts == prompt].bincount(minlength=4)
        assert others[prompt] == 0
        assert int(others.sum()) == 500
        assert sorted(others.tolist())[1] > 120, "all others alike"


# ---- what is refused


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"point": "path"}, "point"),
        ({"point": "stored"}, "point"),
        ({"start": "student", "student_steps": 9}, "student_steps"),
        ({"segments": 8, "reward": {"weight": 1.0}}, "reward.weight"),
        ({"segments": 8, "matching": {"weight": 1.0}}, "matching.weight"),
        ({"matching": {"weight": 1.0, "fit": "sample"}}, "matching.fit"),
        ({"denoising": 1.0, "extra_conditioning": ["s"]}, "denoising"),
        ({"adversarial": {"weight": 1.0}}, "adversarial.real"),
        ({"matching": {"weight": 1.0, "low": 0.9, "high": 0.5}}, "matching.high"),
        ({"distance": "latent_lpips", "weight": "eps"}, "weight"),
        ({"consistency": 0.0}, "consistency"),
        ({"matching": {"weight": 1.0, "omega": 3.0}, "guidance": {"convention": "none"}}, "matching.omega"),
    ],
)
def test_illegal_combinations_name_their_field(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(UserError) as error:
        method_of(**changes)
    assert error.value.field == field
