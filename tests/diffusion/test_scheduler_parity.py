"""Golden parity: our samplers against diffusers' schedulers, a fresh one for every count, wherever theirs are right.

The network is the bundled teacher's. "Equal" means to 1e-5 of the largest |latent|. Where theirs are not right, and
why:

- DDIM steps from t to t - 1000 // n. With trailing times that is the next time only where n divides 1000 (1, 2, 4,
  5, 8, 10, 20 of 1 .. 20); elsewhere x lands at one time and the network is evaluated at another. Euler keeps to its
  list at every count, and Euler in sigma is DDIM on one grid, so the other counts of DDIM are held to that one.
- Euler's pipeline start is z * init_noise_sigma; with trailing times that is sigma_max z, a vector .99767 long on
  the variance-preserving scale. Every sampler of ours starts from z, so theirs is given the same point.
- TCD ends at index 0 (sigma = .029), LCM on clean data.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.common.choices import Prediction
from fewstep.diffusion.config import Sampling
from fewstep.diffusion.denoiser import Condition, Denoiser
from fewstep.diffusion.draw_latents import draw_latents
from fewstep.diffusion.samplers import picture_noise
from fewstep.diffusion.schedule import VariancePreserving
from fewstep_worlds.common.location import root
from support.lockstep import Network, run_together

TEACHER = root() / "teacher"
STABLE_DIFFUSION: dict[str, Any] = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
KINDS: dict[str, Prediction] = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
COUNTS = (1, 2, 3, 4, 6, 7, 8, 11, 16, 20)
RIGHT_FOR_DDIM = [1, 2, 4, 8, 20]
CLOSE = 5e-5  # the network enlarges what rounding changes, by 3e-5 in 14 steps on one processor


@dataclass(frozen=True)
class Case:
    """One run of ours and the same run of theirs: scheduler, its settings, what its `step` is given."""

    ours: Sampling
    scheduler: str
    settings: dict[str, Any] = field(default_factory=dict)
    step: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        ours = self.ours
        gamma = f"-gamma{ours.gamma}" if ours.sampler == "sss" else ""
        return f"{ours.sampler}{gamma}-{ours.end}-omega{ours.omega:g}-{ours.steps}-{self.scheduler}"


def tcd(steps: int, gamma: float) -> Case:
    sampling = Sampling(sampler="sss", steps=steps, gamma=gamma, end="index0")
    return Case(sampling, "TCDScheduler", step={"eta": gamma, "generator": None})


def lcm(steps: int) -> Case:
    return Case(Sampling(sampler="lcm", steps=steps), "LCMScheduler", step={"generator": None})


def euler(steps: int, **ours: Any) -> Case:
    sampling = Sampling(**{"sampler": "euler", "steps": steps, "spacing": "trailing", "end": "clean", **ours})
    last = {"clean": "zero", "index0": "sigma_min"}[sampling.end]
    settings = {"timestep_spacing": "trailing", "final_sigmas_type": last}
    return Case(sampling, "EulerDiscreteScheduler", settings)


def ddim(steps: int, **ours: Any) -> Case:
    if steps not in RIGHT_FOR_DDIM:
        return euler(steps, sampler="ddim", **ours)
    sampling = Sampling(**{"sampler": "ddim", "steps": steps, "spacing": "trailing", "end": "clean", **ours})
    settings = {"timestep_spacing": "trailing", "set_alpha_to_one": sampling.end == "clean", "clip_sample": False}
    return Case(sampling, "DDIMScheduler", settings)


CASES = [
    *(tcd(steps, 0.3) for steps in COUNTS),
    *(tcd(steps, gamma) for steps in (1, 4, 11) for gamma in (0.0, 1.0)),
    *(lcm(steps) for steps in COUNTS),
    *(euler(steps) for steps in COUNTS),
    *(ddim(steps) for steps in COUNTS),
    *(make(steps, end="index0") for make in (euler, ddim) for steps in (1, 4)),
    *(ddim(steps, omega=2.0) for steps in (1, 4)),  # Imagen's scale 3, their guidance_scale
]


@dataclass(frozen=True)
class Subject:
    """A network under test and its conditions, text [N, ...] and null [1, ...]; one picture for each seed."""

    network: Network
    text: Tensor
    null: Tensor
    shape: tuple[int, ...]
    betas: dict[str, Any]
    kind: str
    seeds: tuple[int, ...]

    @property
    def path(self) -> VariancePreserving:
        from diffusers import DDPMScheduler

        return VariancePreserving.from_alphas_cumprod(DDPMScheduler(**self.betas).alphas_cumprod)

    def ours(self, case: Case) -> Callable[[Network], Tensor]:
        def run(network: Network) -> Tensor:
            def call(x: Tensor, t: Tensor, condition: Condition, role: str) -> Tensor:
                return network(x, t, condition["text"])

            denoiser = Denoiser(call, self.path, KINDS[self.kind])
            condition, null = {"text": self.text}, {"text": self.null}
            return draw_latents(denoiser, condition, null, case.ours, self.seeds, self.shape, "teacher")

        return run

    def theirs(self, case: Case) -> Callable[[Network], Tensor]:
        """The loop of a diffusers pipeline, with a list of CPU generators."""

        def run(network: Network) -> Tensor:
            import diffusers
            from diffusers.utils.torch_utils import randn_tensor

            scheduler = getattr(diffusers, case.scheduler)(**self.betas, prediction_type=self.kind, **case.settings)
            scheduler.set_timesteps(case.ours.steps)
            generators = [torch.Generator("cpu").manual_seed(seed) for seed in self.seeds]
            step = {key: generators if key == "generator" else value for key, value in case.step.items()}
            x = randn_tensor((len(self.seeds), *self.shape), generator=generators)
            exploding = case.scheduler == "EulerDiscreteScheduler"  # it works on x / alpha
            if exploding:
                x = x * (scheduler.sigmas[0] ** 2 + 1) ** 0.5
            null, omega = self.null.expand_as(self.text), case.ours.omega
            for t in scheduler.timesteps:
                scaled, now = scheduler.scale_model_input(x, t), t.expand(len(x)).double()
                out = network(scaled, now, self.text)
                if omega:
                    without = network(scaled, now, null)
                    out = without + (1 + omega) * (out - without)
                x = scheduler.step(out, t, x, **step).prev_sample
            last: Tensor = x / (scheduler.sigmas[-1] ** 2 + 1) ** 0.5 if exploding else x
            return last

        return run


def bundled() -> Subject:
    from fewstep.backbones.base import load_backbone

    backbone = load_backbone(TEACHER)
    text, null = backbone.encode(["a doggy, fluent style"])["text"], backbone.null(1)["text"]
    backbone.release_encoders()
    config = json.loads((TEACHER / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
    kind = {ours: theirs for theirs, ours in KINDS.items()}[backbone.prediction]

    torch.manual_seed(0)
    random = type(backbone.network).from_config(backbone.network.config).eval()  # a trained one enlarges rounding more

    def call(x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        return x + 0.1 * backbone.call(random, x, t, {"text": text})  # noise and some structure: latents stay near 1

    betas = {key: config[key] for key in STABLE_DIFFUSION}
    return Subject(call, text, null, backbone.latent_shape, betas, kind, (3,))


def difference(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference, in units of the largest |latent|."""
    assert ours.dtype == torch.float32
    assert bool(theirs.isfinite().all())
    return float((ours - theirs).abs().max() / theirs.abs().max())


@pytest.fixture(scope="module")
def latents() -> dict[str, tuple[Tensor, Tensor]]:
    """Every case's latents, ours and theirs."""
    subject = bundled()
    runs = [make(case) for make in (subject.ours, subject.theirs) for case in CASES]
    drawn = run_together(runs, subject.network)
    half = len(CASES)
    return {case.name: pair for case, pair in zip(CASES, zip(drawn[:half], drawn[half:]), strict=True)}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_equal_to_diffusers(latents: dict[str, tuple[Tensor, Tensor]], case: Case) -> None:
    assert difference(*latents[case.name]) < CLOSE


def test_cases_cover_what_is_claimed(latents: dict[str, tuple[Tensor, Tensor]]) -> None:
    """Every count of the four samplers, results of several steps unlike each other, the two ends far apart."""
    assert len(latents) == len(CASES) == 4 * len(COUNTS) + 6 + 4 + 2
    plain = [case for case in CASES if case.ours.omega == 0]
    assert len({float(latents[case.name][0].double().sum()) for case in plain}) > 0.9 * len(plain)
    several = [case for case in plain if case.ours.steps > 1]
    assert len({float(latents[case.name][0].double().sum()) for case in several}) == len(several)
    clean, index_0 = (latents[ddim(4, end=end).name][0] for end in ("clean", "index0"))
    assert difference(index_0, clean) > 1e-3


def test_ddim_of_diffusers_leaves_its_list_where_the_count_does_not_divide_1000() -> None:
    from diffusers import DDIMScheduler

    right = []
    for steps in COUNTS:
        scheduler = DDIMScheduler(**STABLE_DIFFUSION, timestep_spacing="trailing")
        scheduler.set_timesteps(steps)
        times = scheduler.timesteps.tolist()
        lands = [t - 1000 // steps for t in times]
        if lands == [*times[1:], -1]:
            right.append(steps)
    assert right == RIGHT_FOR_DDIM


def test_euler_of_diffusers_starts_from_a_shorter_vector() -> None:
    from diffusers import EulerDiscreteScheduler

    scheduler = EulerDiscreteScheduler(**STABLE_DIFFUSION, timestep_spacing="trailing")
    scheduler.set_timesteps(4)
    length = float(scheduler.init_noise_sigma / (scheduler.sigmas[0] ** 2 + 1) ** 0.5)
    assert length == pytest.approx(0.99767, abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", [tcd(4, 0.3), lcm(4), ddim(4)], ids=lambda case: case.name)
def test_every_prediction_type(kind: str, case: Case) -> None:
    def call(x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        return torch.tanh(x + text) * (0.5 + t.float().view(-1, 1) / 1000)

    text = torch.tensor([[0.2], [-0.4]])
    subject = Subject(call, text, text[:1], (6,), STABLE_DIFFUSION, kind, (3, 4))
    assert difference(subject.ours(case)(call), subject.theirs(case)(call)) < CLOSE


def test_noise_is_drawn_in_the_order_of_a_pipeline() -> None:
    """Latents first, step noise after, one CPU generator per picture: bit for bit."""
    from diffusers.utils.torch_utils import randn_tensor

    seeds = [3, 2**40 + 1]
    start, noise = picture_noise(seeds, (4, 8, 8))
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    for ours in (start, noise(), noise()):
        assert torch.equal(ours, randn_tensor((2, 4, 8, 8), generator=generators))
