"""Samplers on the exact teacher, in float64: marginals are kept, and SSS is DDIM with the matching noise."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fewstep.common.choices import End, GammaRule, Prediction, SamplerName, SolverName, omega_of
from fewstep.common.config import validate
from fewstep.common.errors import UserError
from fewstep.diffusion.config import Sampling
from fewstep.diffusion.denoiser import Condition, Denoiser
from fewstep.diffusion.draw_latents import draw_latents
from fewstep.diffusion.grid import end_time, inference_times
from fewstep.diffusion.jump import Step, first_order, land, lcm_skip, second_order
from fewstep.diffusion.samplers import (
    JumpFn,
    consistency_jumps,
    diffuse,
    follow,
    linear_in_noise,
    linear_in_time,
    picture_noise,
    sample_sde_dpmpp_2m,
    sss_jumps,
)
from fewstep.diffusion.schedule import (
    Estimate,
    FlowMatching,
    Path,
    VarianceExploding,
    VariancePreserving,
    add_noise,
    expand,
    scaled_linear,
)
from support.exact import Mixture, gaussian, three_modes, times_of

VP = scaled_linear()
PATHS: dict[str, Path] = {"vp": VP, "flow": FlowMatching(), "ve": VarianceExploding(20.0)}
GAMMAS = (0.0, 0.3, 1.0)


def exact_jumper(teacher: Mixture, rk_steps: int = 64) -> JumpFn:
    """The exact jump."""
    return lambda x_t, t, s: teacher.flow(x_t, t, s, steps=rk_steps)


def jumper(teacher: Mixture, step: Step) -> JumpFn:
    """A jump function of the teacher's own."""
    return lambda x_t, t, s: step(teacher.denoise, teacher.path, x_t, t, s)


def grid_times(path: Path, steps: int) -> list[float]:
    return [float(t) for t in inference_times(path, steps)]


@pytest.mark.parametrize("law", ["time", "noise"])
@pytest.mark.parametrize("gamma", [*GAMMAS, 0.2, 0.77])
@pytest.mark.parametrize(("name", "end"), [("vp", "clean"), ("vp", "index0"), ("flow", "clean"), ("ve", "clean")])
def test_sss_with_exact_jump_keeps_a_gaussians_moments(name: str, gamma: float, end: End, law: GammaRule) -> None:
    """Every step is affine in x and z, so a batch of unit vectors gives the distribution of each x_t without sampling.

    Row 0 is x = 0, row 1 x = 1 (both without noise); row 2 + i has z = 1 at the i-th noise alone.
    """
    path = PATHS[name]
    teacher = gaussian(path, mean=(0.7,), std=0.6)
    times = grid_times(path, 4)
    seen: list[Tensor] = []
    exact = exact_jumper(teacher)

    def jump(x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
        seen.append(x_t)
        return exact(x_t, t, s)

    drawn = 0

    def noise() -> Tensor:
        nonlocal drawn
        drawn += 1
        return torch.eye(len(times) + 1, dtype=torch.float64)[1 + drawn][:, None]

    x = torch.zeros(len(times) + 1, 1, dtype=torch.float64)
    x[1] = 1
    seen.append(follow(sss_jumps(path, times, gamma, end, law, len(x)), jump, path, x, noise))
    assert drawn == (len(times) - 1 if gamma > 0 else 0)

    def moments(t: float) -> tuple[float, float]:
        alpha, sigma = (float(f(torch.tensor(t, dtype=torch.float64))) for f in (path.alpha, path.sigma))
        return alpha * 0.7, alpha**2 * 0.36 + sigma**2

    start_mean, start_var = moments(times[0])
    for t, rows in zip([*times, end_time(path, end)], seen, strict=True):
        offset, gain = float(rows[0]), float(rows[1] - rows[0])
        mean = offset + gain * start_mean
        var = gain**2 * start_var + float((rows[2:] - rows[0]).square().sum())
        assert (mean, var) == pytest.approx(moments(t), abs=1e-10)


def ks(a: Tensor, b: Tensor) -> float:
    """Two-sample Kolmogorov-Smirnov statistic, [N] and [M]."""
    both = torch.cat([a, b]).sort().values
    below = (torch.searchsorted(v.sort().values, both, right=True).double() / len(v) for v in (a, b))
    return float((next(below) - next(below)).abs().max())


DIRECTIONS = torch.stack([torch.tensor([math.cos(a), math.sin(a)]) for a in torch.arange(6) * math.pi / 6]).double()


def worst(a: Tensor, b: Tensor) -> float:
    """The largest KS statistic over six directions, 0 and 90 degrees (the axes) among them."""
    return max(ks(a @ d, b @ d) for d in DIRECTIONS)


def threshold(n: int, tests: int, level: float = 1e-3) -> float:
    """Two samples of n differ by more with probability `level`, over all tests together (Bonferroni)."""
    return math.sqrt(-0.5 * math.log(level / tests / 2)) * math.sqrt(2 / n)


N = 100_000


@pytest.fixture(scope="module")
def fresh() -> Tensor:
    """Exact draws of the end marginal."""
    return three_modes(VP).sample(N, 0.0, torch.Generator().manual_seed(7))


def run_mixture(gamma: float, tamper: Callable[[Tensor], Tensor] = lambda z: z) -> Tensor:
    teacher = three_modes(VP)
    g = torch.Generator().manual_seed(11)
    x = teacher.sample(N, 999.0, g)
    times = grid_times(VP, 4)
    jump = exact_jumper(teacher, rk_steps=6)
    jumps = sss_jumps(VP, times, gamma, "index0", rows=len(x))
    return follow(jumps, jump, VP, x, lambda: tamper(torch.randn(N, 2, generator=g, dtype=torch.float64)))


@pytest.mark.slow
@pytest.mark.parametrize("gamma", GAMMAS)
def test_sss_with_exact_jump_keeps_a_mixture(fresh: Tensor, gamma: float) -> None:
    """n = 100,000 from the exact p_T, 4 steps; seeded, so it passes or fails for good."""
    assert worst(run_mixture(gamma), fresh) < threshold(N, len(DIRECTIONS) * len(GAMMAS))


def test_the_two_sample_test_sees_a_tenth_less_noise(fresh: Tensor) -> None:
    assert worst(run_mixture(0.3, lambda z: 0.9 * z), fresh) > threshold(N, len(DIRECTIONS) * len(GAMMAS))


def sss_step(
    path: Path, estimate: Estimate, t_next: Tensor, gamma: float, z: Tensor, rule: GammaRule = "time"
) -> Tensor:
    """The first step of a plan, with the first-order jump."""
    end: End = "index0" if path is VP and rule == "time" else "clean"
    first, _ = sss_jumps(path, [path.noisiest, float(t_next[0])], gamma, end, rule, len(t_next))
    return first.renoise(path, land(estimate, path, first.s), lambda: z)


def random_estimate(path: Path, t: float, seed: int = 0) -> tuple[Estimate, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    x0, eps, z = (torch.randn(16, 3, generator=g, dtype=torch.float64) for _ in range(3))
    now = times_of(t, x0)
    return Estimate(x0, eps), expand(path.alpha(now), x0) * x0 + expand(path.sigma(now), x0) * eps, z


@pytest.mark.parametrize("gamma", [0.0, 0.2, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("t_next", [19.0, 259.0, 499.0, 759.0, 979.0])
def test_sss_with_first_order_jump_is_ddim_with_matching_noise(t_next: float, gamma: float) -> None:
    """SSS = alpha x0 + sqrt(sigma^2 - std^2) eps + std z with std = sqrt(1 - alpha_next^2/alpha_s^2)."""
    estimate, _, z = random_estimate(VP, 999.0)
    then = times_of(t_next, z)
    s = times_of(math.floor(round((1 - gamma) * t_next, 6)) if gamma else t_next, z)
    std = torch.sqrt(1 - (VP.alpha(then) / VP.alpha(s)).square())
    straight = torch.sqrt(VP.sigma(then).square() - std.square())
    wanted = expand(VP.alpha(then), z) * estimate.x0 + expand(straight, z) * estimate.eps + expand(std, z) * z
    assert float((sss_step(VP, estimate, then, gamma, z) - wanted).abs().max()) < 1e-12


# t, t_next, share of sigma^2 that is fresh noise at gamma .2 and .3, gamma that makes DDIM's eta 1
PUBLISHED = [
    (999, 759, 0.70, 0.82, 0.446),
    (759, 499, 0.48, 0.63, 0.566),
    (499, 259, 0.33, 0.46, 0.649),
    (999, 499, 0.48, 0.63, 0.932),
    (999, 959, 0.85, 0.93, 0.043),
    (499, 479, 0.47, 0.61, 0.040),
]


@pytest.mark.parametrize(("t", "t_next", "at_2", "at_3", "ancestral"), PUBLISHED)
def test_share_of_fresh_noise(t: float, t_next: float, at_2: float, at_3: float, ancestral: float) -> None:
    """gamma is linear in the time index, not in noise: the same gamma is much noise in a short step."""
    zero, one = torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
    then = times_of(t_next, one)
    sigma = float(VP.sigma(then))

    def std(gamma: float) -> float:
        return float(sss_step(VP, Estimate(zero, zero), then, gamma, one))

    assert (std(0.2) / sigma) ** 2 == pytest.approx(at_2, abs=0.0051)
    assert (std(0.3) / sigma) ** 2 == pytest.approx(at_3, abs=0.0051)
    now = times_of(t, one)
    ratio = float(VP.alpha(now) / VP.alpha(then))
    eta_1 = sigma / float(VP.sigma(now)) * math.sqrt(1 - ratio**2)
    # s is floored to an index: gamma is known to one index in t_next
    assert std(ancestral - 1 / t_next) <= eta_1 + 1e-3
    assert std(ancestral + 1 / t_next) >= eta_1 - 1e-3


@pytest.mark.parametrize("t_next", [259, 499, 739])
def test_sss_step_is_diffusers_ddim_step_with_eta(t_next: int) -> None:
    """One step of their DDIM with the eta that has the same standard deviation, same noise."""
    from diffusers import DDIMScheduler

    theirs = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False)
    theirs.num_inference_steps = 4  # a stride of 250
    t = t_next + 250
    theirs.alphas_cumprod = VP.alpha(torch.arange(1000.0)).square()
    estimate, x_t, z = random_estimate(VP, t)
    then = times_of(t_next, z)
    for gamma in (0.2, 0.3, 0.4):
        std = float(torch.sqrt(1 - (VP.alpha(then) / VP.alpha(linear_in_time(VP, then, gamma))).square())[0])
        eta = std / float(theirs._get_variance(t, t_next)) ** 0.5
        wanted = theirs.step(estimate.eps, t, x_t, eta=eta, variance_noise=z).prev_sample
        assert float((sss_step(VP, estimate, then, gamma, z) - wanted).abs().max()) < 1e-12


def test_gamma_0_is_the_deterministic_jump_and_gamma_1_the_consistency_step() -> None:
    for path in PATHS.values():
        t_next = 499.0 if path is VP else 0.4 * path.noisiest
        estimate, _, z = random_estimate(path, path.noisiest)
        then = times_of(t_next, z)
        plain = expand(path.alpha(then), z) * estimate.x0 + expand(path.sigma(then), z) * estimate.eps
        assert float((sss_step(path, estimate, then, 0.0, z) - plain).abs().max()) < 1e-12
    path = PATHS["flow"]
    estimate, _, z = random_estimate(path, 1.0)
    then = times_of(0.4, z)
    again = diffuse(path, estimate.x0, times_of(0.0, z), then, z)
    assert float((sss_step(path, estimate, then, 1.0, z) - again).abs().max()) < 1e-12


def test_a_landing_floors_to_an_index_and_survives_rounding() -> None:
    whole = torch.arange(1000, dtype=torch.float64)
    for percent in range(100):
        wanted = torch.div((100 - percent) * torch.arange(1000), 100, rounding_mode="floor")
        assert torch.equal(linear_in_time(VP, whole, percent / 100), wanted.double()), percent
    assert bool((linear_in_time(VP, whole, 1.0) == VP.clean).all()), "the end point is clean data"
    assert linear_in_time(VP, torch.tensor(90.0, dtype=torch.float64), 0.3) == 63, (
        ".7 * 90 is 62.99... in floating point"
    )
    assert linear_in_time(VP, torch.tensor(123.4, dtype=torch.float64), 0.0) == 123.4
    assert float(linear_in_time(PATHS["flow"], torch.tensor(0.5, dtype=torch.float64), 0.3)) == pytest.approx(0.35)


@pytest.mark.parametrize("name", PATHS)
def test_diffuse_joins_marginals(name: str) -> None:
    """From s to t in one go or through u: same mean factor, same variance; and sigma_t is reached from s = clean."""
    path = PATHS[name]
    s, u, t = (times_of(path.clean + share * (path.noisiest - path.clean), torch.empty(1)) for share in (0.1, 0.4, 0.9))
    zero, one = torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)

    def mean_and_var(a: Tensor, b: Tensor) -> tuple[float, float]:
        return float(diffuse(path, one, a, b, zero)), float(diffuse(path, zero, a, b, one)) ** 2

    m1, v1 = mean_and_var(s, u)
    m2, v2 = mean_and_var(u, t)
    m, v = mean_and_var(s, t)
    assert (m, v) == pytest.approx((m1 * m2, m2**2 * v1 + v2), rel=1e-12)
    assert m**2 * float(path.sigma(s)) ** 2 + v == pytest.approx(float(path.sigma(t)) ** 2, rel=1e-12)
    clean = times_of(path.clean, one)
    m, v = mean_and_var(clean, t)
    assert (m, v) == pytest.approx((float(path.alpha(t)), float(path.sigma(t)) ** 2), rel=1e-12)


def test_diffuse_to_the_same_time_adds_nothing() -> None:
    """Rounding must not turn the zero into the root of a negative number."""
    every = torch.arange(1000, dtype=torch.float64)
    x, z = torch.ones(1000, 1, dtype=torch.float64), torch.ones(1000, 1, dtype=torch.float64)
    assert float((diffuse(VP, x, every, every, z) - x).abs().max()) < 1e-7


def test_diffuse_on_the_flow_path_is_not_the_variance_preserving_formula() -> None:
    path = PATHS["flow"]
    one, zero = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    std = float(diffuse(path, zero, times_of(0.2, one), times_of(0.6, one), one))
    assert std == pytest.approx(math.sqrt(0.36 - 0.25 * 0.04), rel=1e-12)


def test_one_step_draws_no_noise() -> None:
    teacher = three_modes(VP)
    x = teacher.sample(4, 999.0, torch.Generator().manual_seed(0))

    def noise() -> Tensor:
        raise AssertionError("noise after the last step")

    estimate = teacher.denoise(x, times_of(999.0, x))
    out = follow(sss_jumps(VP, [999.0], 0.5, "clean", rows=len(x)), jumper(teacher, first_order), VP, x, noise)
    assert torch.equal(out, estimate.x0)
    out = follow(consistency_jumps(VP, [999.0], "clean", len(x)), jumper(teacher, lcm_skip), VP, x, noise)
    assert float((out - estimate.x0).abs().max()) < 1e-6


def test_a_pictures_noise_does_not_depend_on_its_batch() -> None:
    start, noise = picture_noise([5, 6, 7], (2, 3))
    steps = [noise(), noise()]
    exclusive, alone_noise = picture_noise([6], (2, 3))
    assert torch.equal(exclusive[0], start[1])
    assert torch.equal(alone_noise()[0], steps[0][1])
    assert torch.equal(alone_noise()[0], steps[1][1])
    assert len({float(x) for x in torch.cat([start, *steps]).flatten()}) == 3 * 3 * 6


def denoiser(prediction: Prediction = "eps", path: Path = VP) -> Denoiser:
    """A network that returns tanh(x) plus its condition."""
    return Denoiser(lambda x, t, condition, role: torch.tanh(x) + condition["text"], path, prediction)


def test_eps_with_zero_terminal_snr_is_refused() -> None:
    log_alpha_bar = VP.log_alpha_bar.clone()
    log_alpha_bar[-1] = math.log(1e-24)
    for path in (VariancePreserving(log_alpha_bar), FlowMatching()):
        with pytest.raises(UserError, match="zero terminal SNR"):
            denoiser("eps", path)
        denoiser("v", path)


@pytest.mark.parametrize("solver", ["ddim", "euler", "dpmpp_2s"])
def test_steps_count_network_calls(solver: SolverName) -> None:
    calls = 0

    def call(x: Tensor, t: Tensor, condition: Condition, role: str) -> Tensor:
        nonlocal calls
        calls += 1
        return torch.tanh(x)

    sampling = Sampling(sampler=solver, steps=6)
    draw_latents(Denoiser(call, VP, "eps"), {}, {}, sampling, [0, 1], (3,), "teacher")
    assert calls == 6
    if solver == "dpmpp_2s":
        with pytest.raises(UserError, match="multiple of 2") as error:
            validate(Sampling, {"sampler": solver, "steps": 5})
        assert error.value.field == "steps"


@pytest.mark.parametrize("sampler", ["sss", "lcm", "ddim"])
def test_a_latent_does_not_depend_on_its_batch(sampler: SamplerName) -> None:
    sampling = Sampling(sampler=sampler, steps=4, omega=1.5)
    condition, null = {"text": torch.tensor([[0.1], [0.2], [0.3]])}, {"text": torch.zeros(1, 1)}
    together = draw_latents(denoiser(), condition, null, sampling, [4, 5, 6], (7,), "teacher")
    exclusive = draw_latents(denoiser(), {"text": condition["text"][1:2]}, null, sampling, [5], (7,), "teacher")
    assert torch.equal(exclusive[0], together[1])
    assert together.dtype == torch.float32


def test_guidance_is_in_the_papers_convention_and_one_call() -> None:
    """output = (1 + omega) output(c) - omega output(null), omega for each sample; conversion in fp32."""
    batches = []

    def call(x: Tensor, t: Tensor, condition: Condition, role: str) -> Tensor:
        batches.append(len(x))
        assert role == "teacher"
        return condition["text"].bfloat16().expand_as(x)

    x, t = torch.randn(2, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([499.0, 999.0])
    condition, null = {"text": torch.tensor([[2.0], [4.0]])}, {"text": torch.tensor([[1.0], [1.0]])}
    omega = torch.tensor([0.5, 7.0])
    found = Denoiser(call, VP, "eps").guided(x, t, condition, null, omega, "teacher")
    assert batches == [4]
    assert found.x0.dtype == found.eps.dtype == torch.float32
    assert found.eps[:, 0].tolist() == [1.5 * 2 - 0.5, 8 * 4 - 7]
    assert torch.allclose(add_noise(VP, found.x0, found.eps, t), x, rtol=0, atol=1e-5)
    assert (omega_of(7.5, "imagen"), omega_of(7.5, "lcm")) == (6.5, 7.5)


# ---- CTM's gamma, second order, ordinary solvers


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("gamma", [0.0, 0.3, 0.8, 1.0])
def test_ctms_gamma_is_the_share_of_fresh_noise(name: str, gamma: float) -> None:
    """The noise that is put back has standard deviation gamma sigma_next, whatever the time or the path."""
    path = PATHS[name]
    zero, one = torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
    for share in (0.1, 0.5, 0.9):
        then = times_of(path.clean + share * (path.noisiest - path.clean), one)
        fresh = float(sss_step(path, Estimate(zero, zero), then, gamma, one, "noise"))
        assert fresh == pytest.approx(gamma * float(path.sigma(then)), abs=1e-9)


def test_ctms_target_on_its_own_path() -> None:
    """Denoise to sqrt(1 - gamma^2) sigma_next (arXiv 2310.02279, algorithm 3)."""
    path, then = VarianceExploding(), torch.tensor([0.5, 10.0], dtype=torch.float64)
    assert linear_in_noise(path, then, 0.6).tolist() == pytest.approx([0.4, 8.0], rel=1e-12)


def even_in_lambda(steps: int) -> list[float]:
    start, stop = VP.log_snr(torch.tensor(999.0)), VP.log_snr(torch.tensor(0.0))
    return [float(VP.time_of(start + (stop - start) * i / steps)) for i in range(steps)]


def end_error(steps: int, sampler: Callable[[Mixture, Tensor, list[float]], Tensor]) -> float:
    """How far a deterministic sampler ends from the exact flow, on a grid even in lambda."""
    teacher = three_modes(VP)
    times = even_in_lambda(steps)
    x = teacher.sample(200, 999.0, torch.Generator().manual_seed(3))
    wanted = teacher.flow(x, times_of(999.0, x), times_of(0.0, x), steps=200)
    return float((sampler(teacher, x, times) - wanted).square().mean().sqrt())


def test_sss_of_second_order_converges_faster() -> None:
    """gamma = 0: a second-order jump at 16 and 32 steps, against the first-order one. Global orders 2 and 1."""

    def by(step: Step) -> float:
        def sampler(teacher: Mixture, x: Tensor, times: list[float]) -> Tensor:
            jumps = sss_jumps(VP, times, 0.0, "index0", rows=len(x))
            return follow(jumps, jumper(teacher, step), VP, x, lambda: x)

        return math.log2(end_error(32, sampler) / end_error(64, sampler))

    assert by(second_order) > 1.6
    assert 0.7 < by(first_order) < 1.4


@pytest.mark.parametrize("gamma", [0.1, 0.3])
@pytest.mark.parametrize("law", ["time", "noise"])
def test_sss_of_second_order_keeps_a_gaussian(gamma: float, law: GammaRule) -> None:
    """The paper's second order: DPM-Solver++(2S) to s, then noise. With 50 steps mean and spread are the data's."""
    teacher = gaussian(VP, mean=(0.7,), std=0.6)
    g = torch.Generator().manual_seed(5)
    x = teacher.sample(20_000, 999.0, g)
    noise = lambda: torch.randn(x.shape, generator=g, dtype=torch.float64)  # noqa: E731
    jumps = sss_jumps(VP, grid_times(VP, 50), gamma, "index0", law, len(x))
    out = follow(jumps, jumper(teacher, second_order), VP, x, noise)
    assert float(out.mean()) == pytest.approx(0.7, abs=0.02)
    assert float(out.std()) == pytest.approx(0.6, abs=0.02)


def test_sde_dpmpp_2m_equals_diffusers() -> None:
    """Their multistep scheduler on its own times, same noise: every step of 12."""
    from diffusers import DPMSolverMultistepScheduler

    theirs = DPMSolverMultistepScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, algorithm_type="sde-dpmsolver++",
        solver_order=2, lower_order_final=False, euler_at_final=False, final_sigmas_type="zero",
        timestep_spacing="trailing",
    )  # fmt: skip
    theirs.set_timesteps(12)
    teacher = three_modes(VP)
    g = torch.Generator().manual_seed(2)
    x = teacher.sample(16, 999.0, g)
    noises = [torch.randn(x.shape, generator=g, dtype=torch.float64) for _ in theirs.timesteps]
    y, feed = x, iter(noises)
    for t, z in zip(theirs.timesteps, noises, strict=True):
        eps = teacher.denoise(y, times_of(float(t), y)).eps
        y = theirs.step(eps, t, y, variance_noise=z).prev_sample
    times = [float(t) for t in theirs.timesteps]
    ours = sample_sde_dpmpp_2m(teacher.denoise, VP, x, times, "clean", lambda: next(feed))
    assert float((ours - y).abs().max()) < 1e-4 * float(x.abs().max())
    assert len(list(feed)) == 1, "no noise onto clean data"


def test_sde_dpmpp_2m_keeps_a_gaussian() -> None:
    teacher = gaussian(VP, mean=(0.7,), std=0.6)
    g = torch.Generator().manual_seed(6)
    x = teacher.sample(20_000, 999.0, g)
    noise = lambda: torch.randn(x.shape, generator=g, dtype=torch.float64)  # noqa: E731
    out = sample_sde_dpmpp_2m(teacher.denoise, VP, x, even_in_lambda(50), "index0", noise)
    assert float(out.mean()) == pytest.approx(0.7, abs=0.02)
    assert float(out.std()) == pytest.approx(0.6, abs=0.02)
