"""Noise paths: published values, exact inverses, and what a network's output means."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from fewstep.backbones.scheduler_config import NOISE_APART, path_of, sigmas_at
from fewstep.common.choices import Prediction
from fewstep.common.errors import UserError
from fewstep.diffusion.denoiser import Denoiser
from fewstep.diffusion.schedule import (
    PURE_NOISE,
    FlowMatching,
    Path,
    VarianceExploding,
    VariancePreserving,
    add_noise,
    expand,
    interpret,
    scaled_linear,
    target_of,
)

PATHS: dict[str, Path] = {"vp": scaled_linear(), "flow": FlowMatching(), "ve": VarianceExploding()}

# t, alpha, sigma, lambda as printed (Stable Diffusion's schedule)
TABLE = [
    (0, 0.99957, 0.02916, "3.53"),
    (19, 0.99108, 0.13325, "2.01"),
    (124, 0.92920, 0.36958, ".922"),
    (249, 0.82185, 0.56971, ".366"),
    (499, 0.52694, 0.84990, "-.478"),
    (749, 0.23796, 0.97128, "-1.406"),
    (874, 0.13577, 0.99074, "-1.988"),
    (999, 0.06826, 0.99767, "-2.682"),
]


def number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


@pytest.mark.parametrize(("t", "alpha", "sigma", "log_snr"), TABLE)
def test_stable_diffusion_table(t: int, alpha: float, sigma: float, log_snr: str) -> None:
    path = scaled_linear()
    assert float(path.alpha(number(t))) == pytest.approx(alpha, abs=1e-5)
    assert float(path.sigma(number(t))) == pytest.approx(sigma, abs=1e-5)
    digit = 10.0 ** -len(log_snr.partition(".")[2])  # -1.40652 is printed as -1.406
    assert float(path.log_snr(number(t))) == pytest.approx(float(log_snr), abs=0.55 * digit)


def test_table_is_diffusers_table() -> None:
    from diffusers import DDPMScheduler

    theirs = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012).alphas_cumprod
    every = torch.arange(1000, dtype=torch.float64)
    assert torch.allclose(scaled_linear().alpha(every).square(), theirs.double(), rtol=0, atol=1e-6)
    same = VariancePreserving.from_alphas_cumprod(theirs)
    assert torch.allclose(same.alpha(every).square(), theirs.double(), rtol=0, atol=1e-15)


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("kind", ["linear", "scaled_linear", "squaredcos_cap_v2", "laplace", "sigmoid", "trained"])
def test_noise_levels_without_torch_are_those_of_diffusers_table(kind: str, zero: bool) -> None:
    """As angles, which distinguish alpha from 0 as well as sigma; far below the tolerance for other noise."""
    config: dict[str, Any] = {"beta_schedule": kind, "rescale_betas_zero_snr": zero}
    if kind == "trained":
        config |= {"beta_schedule": "linear", "trained_betas": torch.linspace(1e-4, 0.03, 700).tolist()}
        config |= {"num_train_timesteps": 700}
    times = torch.linspace(-1, config.get("num_train_timesteps", 1000) - 1, 117, dtype=torch.float64)
    found = sigmas_at(config, times.tolist())
    assert found is not None
    ours, theirs = (torch.tensor(found, dtype=torch.float64), path_of(config).sigma(times))
    assert float((ours.asin() - theirs.asin()).abs().max()) < NOISE_APART / 10
    assert sigmas_at({"beta_schedule": "odd"}, [1.0]) is None


@pytest.mark.parametrize("name", PATHS)
def test_log_snr_is_log_of_alpha_over_sigma(name: str) -> None:
    path = PATHS[name]
    share = torch.linspace(0.001, 0.999, 500, dtype=torch.float64)
    t = path.clean + share * (path.noisiest - path.clean)
    assert torch.allclose(path.log_snr(t), (path.alpha(t) / path.sigma(t)).log(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", PATHS)
def test_time_of_inverts_log_snr(name: str) -> None:
    path = PATHS[name]
    g = torch.Generator().manual_seed(0)
    share = torch.rand(5000, generator=g, dtype=torch.float64).clamp(1e-6, 1 - 1e-6)
    t = path.clean + share * (path.noisiest - path.clean)
    if name == "vp":
        t = torch.cat([t, torch.arange(1000, dtype=torch.float64), number(-0.5)[None]])
    assert float((path.time_of(path.log_snr(t)) - t).abs().max()) < 1e-9
    log_snr = path.log_snr(t)
    assert float((path.log_snr(path.time_of(log_snr)) - log_snr).abs().max()) < 1e-9


@pytest.mark.parametrize("name", PATHS)
def test_ends(name: str) -> None:
    path = PATHS[name]
    clean = number(path.clean)
    assert float(path.alpha(clean)) == 1
    assert float(path.sigma(clean)) == 0
    assert float(path.log_snr(clean)) == float("inf")
    assert float(path.time_of(path.log_snr(clean))) == pytest.approx(path.clean, abs=1e-12)
    noisiest = number(path.noisiest)
    assert float(path.time_of(path.log_snr(noisiest))) == pytest.approx(path.noisiest, abs=1e-9)


def test_times_outside_an_indexed_path_are_its_ends() -> None:
    path = scaled_linear()
    outside, ends = torch.tensor([-7.0, 2000.0]), torch.tensor([-1.0, 999.0])
    assert torch.equal(path.alpha(outside), path.alpha(ends))
    assert torch.equal(path.time_of(torch.tensor([50.0, -50.0])), ends.double())


def test_zero_terminal_snr_is_pure_noise_and_finite() -> None:
    """log 0 would be interpolated to a nan: between the last two indices, and at the last one itself."""
    betas = torch.tensor([0.1, 0.2, 1.0], dtype=torch.float64)
    tables = VariancePreserving.from_betas(betas), VariancePreserving.from_alphas_cumprod((1 - betas).cumprod(0))
    for path in tables:
        assert float(path.alpha(number(2))) < PURE_NOISE
        assert float(path.sigma(number(2))) == 1
        assert 0 < float(path.alpha(number(1.5))) < float(path.alpha(number(1)))
        with pytest.raises(UserError, match="zero terminal SNR"):
            Denoiser(lambda x, *_: x, path, "eps")


def test_index_0_is_not_clean_in_any_precision() -> None:
    """Half precision rounds alpha_0^2 to 1, and with it sigma_0 = .029 to 0: nothing is computed there."""
    path = scaled_linear()
    alpha_bar = path.alpha(number(0)).square()
    assert float((1 - alpha_bar.bfloat16()).sqrt()) == 0, "the pitfall itself"
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int64):
        t = torch.tensor([0, 19], dtype=dtype)
        assert path.sigma(t).dtype == torch.float64
        assert path.sigma(t).tolist() == pytest.approx([0.0291548, 0.1332517], abs=1e-6)
        assert path.sigma(torch.tensor([-1], dtype=dtype)).item() == 0
        assert path.log_snr(t).dtype == path.alpha(t).dtype == torch.float64


@pytest.mark.parametrize("prediction", get_args(Prediction))
@pytest.mark.parametrize("name", PATHS)
def test_output_means_what_it_was_made_from(name: str, prediction: Prediction) -> None:
    path = PATHS[name]
    g = torch.Generator().manual_seed(1)
    x_0, eps = (torch.randn(64, 3, 2, 2, generator=g, dtype=torch.float64) for _ in range(2))
    low, high = (0.0, 999.0) if name == "vp" else (0.01, 0.99 * path.noisiest)
    t = torch.linspace(low, high, 64, dtype=torch.float64)
    alpha, sigma = expand(path.alpha(t), x_0), expand(path.sigma(t), x_0)
    x_t = add_noise(path, x_0, eps, t)
    output = target_of(prediction, x_0, eps, alpha, sigma)
    found = interpret(prediction, output, x_t, alpha, sigma)
    # dividing by alpha or sigma magnifies rounding by as much: hold the error to it
    assert float(((found.x0 - x_0) * alpha.clamp(max=1)).abs().max()) < 1e-12
    assert float(((found.eps - eps) * sigma.clamp(max=1)).abs().max()) < 1e-12
    assert float((alpha * found.x0 + sigma * found.eps - x_t).abs().max() / x_t.abs().max()) < 1e-12


@pytest.mark.parametrize("prediction", get_args(Prediction))
@pytest.mark.parametrize("name", PATHS)
def test_clean_data_stay_for_every_network_output(name: str, prediction: Prediction) -> None:
    path = PATHS[name]
    g = torch.Generator().manual_seed(2)
    x, output = (torch.randn(8, 5, generator=g, dtype=torch.float64) for _ in range(2))
    clean = torch.full((8,), path.clean, dtype=torch.float64)
    found = interpret(prediction, output, x, expand(path.alpha(clean), x), expand(path.sigma(clean), x))
    assert torch.allclose(found.x0, x, rtol=0, atol=1e-12)
    assert bool(found.eps.isfinite().all())


@pytest.mark.parametrize("prediction", ["x0", "v", "flow"])
def test_pure_noise_has_an_estimate_except_from_eps(prediction: Prediction) -> None:
    path = FlowMatching()
    g = torch.Generator().manual_seed(3)
    x_0, eps = (torch.randn(8, 5, generator=g, dtype=torch.float64) for _ in range(2))
    one = torch.ones(8, dtype=torch.float64)
    alpha, sigma = expand(path.alpha(one), eps), expand(path.sigma(one), eps)
    found = interpret(prediction, target_of(prediction, x_0, eps, alpha, sigma), eps, alpha, sigma)
    assert torch.allclose(found.x0, x_0, rtol=0, atol=1e-12)
    assert torch.allclose(found.eps, eps, rtol=0, atol=1e-12)


def test_add_noise_takes_a_time_for_each_sample() -> None:
    path = scaled_linear()
    x_0, eps = torch.ones(3, 2, 4, 4), torch.full((3, 2, 4, 4), 10.0)
    x_t = add_noise(path, x_0, eps, torch.tensor([0.0, 499.0, 999.0]))
    assert x_t.dtype == torch.float32
    assert x_t[:, 0, 0, 0].tolist() == pytest.approx([0.99957 + 0.2916, 0.52694 + 8.4990, 0.06826 + 9.9767], abs=1e-4)
    assert torch.equal(x_t, x_t[:, :1, :1, :1].expand_as(x_t))
