"""Jumps and solver steps on the exact teacher, in float64: orders, boundary conditions, identities."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.backbones.scheduler_config import path_of
from fewstep.common.choices import SolverName
from fewstep.diffusion.grid import between
from fewstep.diffusion.jump import cm_skip, first_order, land, lcm_scalings, lcm_skip, second_order
from fewstep.diffusion.samplers import sample_ode
from fewstep.diffusion.schedule import Estimate, FlowMatching, Path, VarianceExploding, expand, interpret, scaled_linear
from fewstep.diffusion.solver import SOLVERS, ddim, dpmpp_2s, euler, integrate
from support.exact import Mixture, gaussian, three_modes, times_of, two_modes_line

VP = scaled_linear()
PATHS: dict[str, Path] = {"vp": VP, "flow": FlowMatching(), "ve": VarianceExploding(20.0)}
STEPS = [0.1, 0.05, 0.025, 0.0125]


def batch(path: Path, t: float, count: int = 32, seed: int = 0) -> tuple[Mixture, Tensor, Tensor]:
    teacher = three_modes(path)
    x = teacher.sample(count, t, torch.Generator().manual_seed(seed))
    return teacher, x, times_of(t, x)


def time_at(path: Path, log_snr: float) -> float:
    return float(path.time_of(torch.tensor(log_snr, dtype=torch.float64)))


def slope(widths: list[float], errors: list[float]) -> float:
    """Least squares of log error on log width."""
    a, b = (torch.tensor(values, dtype=torch.float64).log() for values in (widths, errors))
    a, b = a - a.mean(), b - b.mean()
    return float((a * b).sum() / a.square().sum())


def rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


def local_order(step: Callable[[Mixture, Tensor, Tensor, Tensor], Tensor], path: Path, log_snr: float) -> float:
    """Order in h of one step's error from lambda = log_snr to log_snr + h."""
    t = time_at(path, log_snr)
    teacher, x, now = batch(path, t)
    errors = []
    for h in STEPS:
        s = times_of(time_at(path, log_snr + h), x)
        errors.append(rms(step(teacher, x, now, s) - teacher.flow(x, now, s, steps=20)))
    return slope(STEPS, errors)


def global_order(solver: SolverName, path: Path, start: float, stop: float, counts: list[int]) -> float:
    """Order in 1/N of the end error of N equal steps in lambda, through `sample_ode` and its last step."""
    teacher, x, now = batch(path, time_at(path, start))
    end = times_of(time_at(path, stop), x)
    truth = teacher.flow(x, now, end, steps=192)
    errors = []
    for n in counts:
        times = [time_at(path, start + (stop - start) * i / n) for i in range(n)]
        errors.append(rms(sample_ode(teacher.denoise, path, x, times, "index0", solver) - truth))
    return -slope([float(n) for n in counts], errors)


def cdf(mixture: Mixture, x: Tensor, t: Tensor) -> Tensor:
    """P(X_t <= x) of a one-dimensional mixture, x [B, 1] -> [B]; the PF-ODE keeps it constant."""
    alpha, sigma = mixture.path.alpha(t)[:, None], mixture.path.sigma(t)[:, None]
    std = (alpha.square() * mixture.stds.square() + sigma.square()).sqrt()
    return (mixture.weights * torch.special.ndtr((x - alpha * mixture.means[:, 0]) / std)).sum(1)


def test_exact_flow_agrees_with_the_closed_forms() -> None:
    """The ruler itself: numeric flow against the formula of one Gaussian, and quantiles on the line."""
    for path in PATHS.values():
        one = gaussian(path)
        twice = Mixture(path, one.weights.repeat(2) / 2, one.means.repeat(2, 1), one.stds.repeat(2))
        x = one.sample(50, path.noisiest, torch.Generator().manual_seed(0))
        t, s = times_of(path.noisiest, x), times_of(path.clean, x)
        assert float((one.flow(x, t, s) - twice.flow(x, t, s, steps=512)).abs().max()) < 1e-9
        line = two_modes_line(path)
        x = line.sample(500, path.noisiest, torch.Generator().manual_seed(1))
        t, s = times_of(path.noisiest, x), times_of(path.clean, x)
        assert float((cdf(line, line.flow(x, t, s, steps=256), s) - cdf(line, x, t)).abs().max()) < 1e-8


def test_exact_teacher_is_the_score() -> None:
    """eps = -sigma grad log p, by automatic differentiation of an independently written density."""
    teacher, x, t = batch(VP, 499.0)
    alpha, sigma = (float(f(t[:1])) for f in (VP.alpha, VP.sigma))
    x = x.requires_grad_()
    parts = []
    for weight, mean, std in zip(teacher.weights, teacher.means, teacher.stds, strict=True):
        cov = torch.eye(2, dtype=torch.float64) * (alpha**2 * std**2 + sigma**2)
        parts.append(weight.log() + torch.distributions.MultivariateNormal(alpha * mean, cov).log_prob(x))
    (score,) = torch.autograd.grad(torch.logsumexp(torch.stack(parts), 0).sum(), x)
    found = teacher.denoise(x.detach(), t)
    assert torch.allclose(found.eps, -sigma * score, rtol=0, atol=1e-12)
    assert torch.allclose(alpha * found.x0 + sigma * found.eps, x.detach(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("log_snr", [-1.5, -0.4, 0.5])
@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("solver", ["ddim", "euler"])
def test_first_order_steps_have_local_order_2(solver: SolverName, name: str, log_snr: float) -> None:
    path = PATHS[name]
    order = local_order(lambda m, x, t, s: SOLVERS[solver](m.denoise, path, x, t, s), path, log_snr)
    assert order == pytest.approx(2, abs=0.1)


@pytest.mark.parametrize("log_snr", [-1.5, -0.4, 0.5])
@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("solver", ["heun", "dpm_2", "dpmpp_2s"])
def test_second_order_steps_have_local_order_3(solver: SolverName, name: str, log_snr: float) -> None:
    """TCF(2) in its eps and x0 forms are dpm_2 and dpmpp_2s."""
    path = PATHS[name]
    order = local_order(lambda m, x, t, s: SOLVERS[solver](m.denoise, path, x, t, s), path, log_snr)
    assert order == pytest.approx(3, abs=0.1)


@pytest.mark.parametrize("form", ["x0", "eps"])
@pytest.mark.parametrize("r", [0.3, 0.7, 1.0])
def test_tcf2_has_local_order_3_for_any_r(r: float, form: Any) -> None:
    order = local_order(lambda m, x, t, s: second_order(m.denoise, VP, x, t, s, r, form), VP, -0.4)
    assert order == pytest.approx(3, abs=0.1)


@pytest.mark.parametrize(("solver", "order", "slack"), [("ddim", 1, 0.1), ("euler", 1, 0.1), ("dpmpp_2s", 2, 0.15)])
def test_global_orders(solver: SolverName, order: float, slack: float) -> None:
    stop = float(VP.log_snr(torch.tensor(0.0)))
    assert global_order(solver, VP, -2.68, stop, [48, 96, 192, 384]) == pytest.approx(order, abs=slack)


@pytest.mark.parametrize("name", PATHS)
def test_euler_in_sigma_is_ddim_on_one_grid(name: str) -> None:
    path = PATHS[name]
    teacher, x, _ = batch(path, path.noisiest)
    share = torch.tensor([1.0, 0.7, 0.4, 0.15, 0.02], dtype=torch.float64)
    times = (path.clean + share * (path.noisiest - path.clean)).tolist()
    by_ddim = sample_ode(teacher.denoise, path, x, times, "clean", "ddim")
    by_euler = sample_ode(teacher.denoise, path, x, times, "clean", "euler")
    assert float((by_ddim - by_euler).abs().max()) < 1e-12
    for t, s in pairwise(times):
        now, then = times_of(t, x), times_of(s, x)
        a, b = (step(teacher.denoise, path, x, now, then) for step in (ddim, euler))
        assert float((a - b).abs().max() / a.abs().max()) < 1e-12


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("solver", SOLVERS)
def test_step_to_the_same_time_is_the_identity(solver: SolverName, name: str) -> None:
    """f(x_s, s -> s) = x_s for every s, with per-sample times."""
    path = PATHS[name]
    teacher, x, _ = batch(path, path.noisiest, count=40)
    share = torch.linspace(0.001, 0.999, len(x), dtype=torch.float64)
    s = path.clean + share * (path.noisiest - path.clean)
    same = SOLVERS[solver](teacher.denoise, path, x, s, s)
    assert float((same - x).abs().max() / x.abs().max()) < 1e-12


@pytest.mark.parametrize("name", PATHS)
def test_first_order_jump_to_the_same_time_is_the_identity_for_any_network(name: str) -> None:
    path = PATHS[name]
    g = torch.Generator().manual_seed(5)
    share = torch.linspace(0, 1, 30, dtype=torch.float64)
    s = path.clean + share * (path.noisiest - path.clean)
    x0, eps = (torch.randn(30, 4, generator=g, dtype=torch.float64) for _ in range(2))
    x = expand(path.alpha(s), x0) * x0 + expand(path.sigma(s), x0) * eps
    same = first_order(lambda *_: Estimate(x0, eps), path, x, s, s)
    assert float((same - x).abs().max()) < 1e-12


def test_three_forms_of_tcf1_agree() -> None:
    """(alpha_s/alpha_t) x - sigma_s (e^h - 1) eps, the same in x0, and alpha_s x0 + sigma_s eps."""
    for path in PATHS.values():
        teacher, x, _ = batch(path, path.noisiest)
        g = torch.Generator().manual_seed(3)
        share = torch.rand(2, len(x), generator=g, dtype=torch.float64) * 0.98 + 0.01
        t, s = path.clean + share.sort(0, descending=True).values * (path.noisiest - path.clean)
        estimate = teacher.denoise(x, t)
        alpha_t, alpha_s, sigma_t, sigma_s, h = (
            expand(c, x)
            for c in (
                path.alpha(t),
                path.alpha(s),
                path.sigma(t),
                path.sigma(s),
                path.log_snr(s) - path.log_snr(t),
            )
        )
        assert float(h.min()) > 0
        by_eps = (alpha_s / alpha_t) * x - sigma_s * torch.expm1(h) * estimate.eps
        by_x0 = (sigma_s / sigma_t) * x - alpha_s * torch.expm1(-h) * estimate.x0
        jumped = land(estimate, path, s)
        scale = float(jumped.abs().max())
        assert float((by_eps - jumped).abs().max()) < 1e-12 * scale
        assert float((by_x0 - jumped).abs().max()) < 1e-12 * scale


def test_tcf1_on_the_flow_path_is_the_euler_step_in_t() -> None:
    path = FlowMatching()
    teacher, x, _ = batch(path, 1.0)
    t = torch.linspace(0.05, 1.0, len(x), dtype=torch.float64)
    s = t * torch.linspace(0.0, 0.99, len(x), dtype=torch.float64)
    estimate = teacher.denoise(x, t)
    u = estimate.eps - estimate.x0
    x = expand(path.alpha(t), x) * estimate.x0 + expand(path.sigma(t), x) * estimate.eps
    wanted = x - expand(t - s, x) * u
    jumped = first_order(lambda *_: estimate, path, x, t, s)
    assert float((jumped - wanted).abs().max()) < 1e-12


@pytest.mark.parametrize("solver", SOLVERS)
def test_steps_from_pure_noise_and_onto_clean_data_are_ddim(solver: SolverName) -> None:
    """lambda is infinite there: no NaN, and the first-order step for those samples alone."""
    path = FlowMatching()
    teacher, x, _ = batch(path, 1.0, count=3)
    t = torch.tensor([1.0, 0.5, 0.5], dtype=torch.float64)
    s = torch.tensor([0.5, 0.0, 0.25], dtype=torch.float64)
    found = SOLVERS[solver](teacher.denoise, path, x, t, s)
    simple = ddim(teacher.denoise, path, x, t, s)
    assert torch.allclose(found[:2], simple[:2], rtol=0, atol=1e-12)
    if solver in ("heun", "dpm_2", "dpmpp_2s"):
        assert float((found[2] - simple[2]).abs().max()) > 1e-3


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_step_from_a_schedule_with_zero_terminal_snr_is_ddim(solver: SolverName) -> None:
    """As read from a pipeline's scheduler, in fp32: alpha is as good as 0 there, and nothing is divided by it."""
    config = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    path = path_of({**config, "rescale_betas_zero_snr": True})
    generator = torch.Generator().manual_seed(0)
    x, v = (torch.randn(3, 4, generator=generator) for _ in range(2))

    def denoise(x_t: Tensor, t: Tensor) -> Estimate:
        return interpret("v", v, x_t, expand(path.alpha(t), x_t), expand(path.sigma(t), x_t))

    t, s = (torch.full((3,), time, dtype=torch.float64) for time in (999.0, 759.0))
    found = SOLVERS[solver](denoise, path, x, t, s)
    wanted = -v * float(path.alpha(s[0])) + x * float(path.sigma(s[0]))
    assert torch.allclose(found, wanted, rtol=0, atol=1e-6)
    # beyond it the output of a network of constant v is amplified up to 1/alpha_759 = 4.4
    assert float(sample_ode(denoise, path, x, [999.0, 759.0], "index0", solver).abs().max()) < 20


@pytest.mark.parametrize(
    ("solver", "end", "start", "calls"),
    [
        ("ddim", "clean", 999.0, 3),
        ("euler", "index0", 999.0, 3),
        ("dpmpp_2s", "index0", 999.0, 6),
        ("dpmpp_2s", "clean", 999.0, 5),
    ],
)
def test_network_calls_of_a_run(solver: SolverName, end: str, start: float, calls: int) -> None:
    teacher, x, _ = batch(VP, start, count=2)
    times: list[float] = []

    def denoise(x_t: Tensor, t: Tensor) -> Estimate:
        assert t.dtype == torch.float64
        assert t.shape == (2,)
        times.append(float(t[0]))
        return teacher.denoise(x_t, t)

    sample_ode(denoise, VP, x, [start, 666.0, 333.0], end, solver)  # type: ignore[arg-type]
    assert len(times) == calls
    assert times == sorted(times, reverse=True)


def test_dpmpp_2s_evaluates_at_the_middle_in_log_snr() -> None:
    teacher, x, _ = batch(VP, 999.0, count=2)
    times: list[Tensor] = []

    def denoise(x_t: Tensor, t: Tensor) -> Estimate:
        times.append(VP.log_snr(t))
        return teacher.denoise(x_t, t)

    t, s = times_of(999.0, x), times_of(499.0, x)
    dpmpp_2s(denoise, VP, x, t, s)
    assert torch.allclose(times[1], (VP.log_snr(t) + VP.log_snr(s)) / 2, rtol=0, atol=1e-9)


def test_skip_scalings_are_lcms() -> None:
    c_skip, c_out = lcm_scalings(torch.tensor([0.0, 1.0, 19.0, -1.0]))
    assert c_skip.dtype == c_out.dtype == torch.float64
    assert c_skip.tolist() == pytest.approx([1.0, 0.25 / 100.25, 0.25 / (190**2 + 0.25), 1.0], abs=1e-15)
    assert c_out.tolist() == pytest.approx(
        [0.0, 10 / math.sqrt(100.25), 190 / math.sqrt(190**2 + 0.25), 0.0], abs=1e-15
    )
    assert c_skip[1].item() == pytest.approx(0.0025, abs=5e-5)
    assert c_out[1].item() == pytest.approx(0.9988, abs=5e-5)


def test_skip_scalings_are_diffusers() -> None:
    from diffusers import LCMScheduler

    theirs = LCMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    for t in (0, 1, 19, 259, 999):
        c_skip, c_out = lcm_scalings(torch.tensor(float(t)))
        wanted = theirs.get_scalings_for_boundary_condition_discrete(t)
        assert (float(c_skip), float(c_out)) == pytest.approx([float(c) for c in wanted], rel=1e-6)


def test_skip_connection_is_the_identity_at_0_and_x0_far_from_it() -> None:
    teacher, x, _ = batch(VP, 0.0)
    for t, is_x in ((0.0, True), (999.0, False)):
        estimate = teacher.denoise(x, times_of(t, x))
        wanted = x if is_x else estimate.x0
        found = lcm_skip(teacher.denoise, VP, x, times_of(t, x), times_of(0.0, x))
        assert float((found - wanted).abs().max()) < (1e-12 if is_x else 1e-6)


def edm_form(x: Tensor, t: Tensor, x0: Tensor, eps: float, d: float = 0.5) -> Tensor:
    """Consistency models' f as their paper writes it: c_skip x + c_out F, F solved from EDM's denoiser x0."""
    t = t[:, None]
    skip_edm, out_edm = d**2 / (t**2 + d**2), d * t / (t**2 + d**2).sqrt()
    network = (x0 - skip_edm * x) / out_edm
    return d**2 / ((t - eps) ** 2 + d**2) * x + d * (t - eps) / (t**2 + d**2).sqrt() * network


def test_cm_skip_is_the_papers_on_its_own_path() -> None:
    path = VarianceExploding()
    teacher, x, _ = batch(path, 80.0)
    t = torch.logspace(math.log10(0.002), math.log10(80), len(x), dtype=torch.float64)
    found = cm_skip(teacher.denoise, path, x, t, times_of(0.002, x))
    wanted = edm_form(x, t, teacher.denoise(x, t).x0, 0.002)
    assert float(((found - wanted).abs() / wanted.abs().clamp(min=1)).max()) < 1e-12


@pytest.mark.parametrize("name", PATHS)
def test_cm_skip_is_the_identity_at_the_end_point_and_finite_everywhere(name: str) -> None:
    path = PATHS[name]
    end = 0.0 if name == "vp" else path.clean
    teacher, x, _ = batch(path, path.noisiest, count=8)
    ends = times_of(end, x)
    assert float((cm_skip(teacher.denoise, path, x, ends, ends) - x).abs().max()) < 1e-12
    far = cm_skip(teacher.denoise, path, x, times_of(path.noisiest, x), ends)
    assert bool(far.isfinite().all())
    assert float((far - teacher.denoise(x, times_of(path.noisiest, x)).x0).abs().max()) < 0.1


def test_ctms_jump_is_tcf1_on_the_exploding_path() -> None:
    """G(x, t, s) = (s/t) x + (1 - s/t) g, with g the x0 of the network: TCF(S+) where s is its input."""
    path = VarianceExploding()
    teacher, x, _ = batch(path, 80.0)
    t = torch.linspace(0.1, 80, len(x), dtype=torch.float64)
    s = t * torch.linspace(0, 1, len(x), dtype=torch.float64)
    g = teacher.denoise(x, t).x0
    share = (s / t)[:, None]
    jumped = first_order(teacher.denoise, path, x, t, s)
    assert float(((jumped - share * x - (1 - share) * g).abs() / x.abs().clamp(min=1)).max()) < 1e-12


@pytest.mark.parametrize("solver", SOLVERS)
def test_sub_steps_come_nearer_to_the_flow(solver: SolverName) -> None:
    """Four steps between the same two times: a quarter of the error and less, and the same two ends."""
    teacher, x, t = batch(VP, 799.0)
    s = times_of(399.0, x)
    truth = teacher.flow(x, t, s, steps=200)
    errors = []
    for count in (1, 4):
        way = between(VP, t, s, count)
        assert way.shape == (count + 1, len(x))
        assert torch.equal(way[0], t)
        assert torch.equal(way[-1], s)
        errors.append(rms(integrate(SOLVERS[solver], teacher.denoise, VP, x, way) - truth))
    assert errors[1] < 0.3 * errors[0]
