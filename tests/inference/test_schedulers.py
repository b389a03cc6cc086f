"""Our samplers as diffusers' schedulers: the same pictures in a pipeline's loop."""

from __future__ import annotations

import inspect
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.backbones.scheduler_config import path_of, with_static_shift
from fewstep.common.choices import End, GammaRule, Jump
from fewstep.common.errors import UserError
from fewstep.diffusion.config import Sampling
from fewstep.diffusion.grid import inference_times, times_within, training_grid
from fewstep.diffusion.jump import student_step
from fewstep.diffusion.samplers import consistency_jumps, follow, sss_jumps
from fewstep.diffusion.schedule import FlowMatching, add_noise, scaled_linear
from fewstep.inference.generator import load_image_generator
from fewstep.inference.schedulers.base import FewStepScheduler
from fewstep.inference.schedulers.checks import SchedulerError
from fewstep.inference.schedulers.few_step import ConsistencyScheduler, SSSScheduler
from support import tiny_pipelines
from support.exact import three_modes

PROMPTS = ["a red disc", "a blue ring"]
SEEDS = [5, 6]

SAMPLED: dict[str, tuple[dict[str, Any], type[FewStepScheduler], dict[str, Any]]] = {
    "TCD": ({"gamma": 0.3}, SSSScheduler, {"gamma": 0.3}),
    "by noise": ({"gamma": 0.6, "gamma_law": "noise"}, SSSScheduler, {"gamma": 0.6, "gamma_law": "noise"}),
    "onto clean data": ({"gamma": 0.0, "end": "clean"}, SSSScheduler, {"gamma": 0.0, "end": "clean"}),
    "second order": (
        {"gamma": 0.3, "jump": "second_order", "steps": 6},
        SSSScheduler,
        {"gamma": 0.3, "jump": "second_order"},
    ),
    "second order in noise": (
        {"gamma": 0.0, "jump": "second_order", "steps": 6, "form": "eps", "r": 0.3, "end": "clean"},
        SSSScheduler,
        {"gamma": 0.0, "jump": "second_order", "form": "eps", "r": 0.3, "end": "clean"},
    ),
    "TLCM": (
        {"gamma": 1.0, "grid": 8, "spacing": "tlcm", "end": "clean"},
        SSSScheduler,
        {"gamma": 1.0, "grid": 8, "spacing": "tlcm", "end": "clean"},
    ),
    "LCM": ({"sampler": "lcm"}, ConsistencyScheduler, {}),
    "consistency by TCF(1)": (
        {"sampler": "lcm", "jump": "first_order", "end": "index0"},
        ConsistencyScheduler,
        {"jump": "first_order", "end": "index0"},
    ),
}


def type_of(kind: str) -> Any:
    import diffusers

    return getattr(diffusers, kind)


def pipeline(folder: Path, kind: str = "StableDiffusionPipeline") -> Any:
    more = {"safety_checker": None} if kind.startswith("StableDiffusion") and "XL" not in kind else {}
    pipe = type_of(kind).from_pretrained(folder, local_files_only=True, **more)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generators() -> list[torch.Generator]:
    return [torch.Generator("cpu").manual_seed(seed) for seed in SEEDS]


@pytest.mark.parametrize("name", SAMPLED)
def test_a_pipeline_draws_what_we_draw(name: str, tiny_pipeline: Path) -> None:
    """A pipeline passes eta = 0 to every scheduler that listens: ours keep their own gamma."""
    own, kind, settings = SAMPLED[name]
    sampling = Sampling.model_validate({"steps": 3, **own})
    image_generator = load_image_generator(tiny_pipeline)
    wanted = image_generator.latents(image_generator.encode(PROMPTS), SEEDS, sampling)
    pipe = pipeline(tiny_pipeline)
    pipe.scheduler = kind.from_config(pipe.scheduler.config, **settings)
    calls = []
    pipe.unet.register_forward_pre_hook(lambda *_: calls.append(1))
    drawn = pipe(
        PROMPTS, num_inference_steps=3, guidance_scale=0.0, generator=generators(), output_type="latent", eta=0.0
    ).images
    assert len(calls) == sampling.steps
    assert float((drawn - wanted).abs().max()) < 1e-4 * float(wanted.abs().max())
    again = pipe(PROMPTS, num_inference_steps=3, guidance_scale=0.0, generator=generators(), output_type="latent")
    assert torch.equal(again.images, drawn), "nothing of a drawing reaches the next one"


def driven(scheduler: FewStepScheduler, x: Tensor, steps: int, seed: int) -> tuple[Tensor, list[float]]:
    """A pipeline's loop with the exact network of a mixture in the plane, on a flow."""
    path = FlowMatching(3.0)
    scheduler.set_timesteps(steps)
    generator = torch.Generator().manual_seed(seed)
    calls = []
    for t in scheduler.timesteps:
        calls.append(float(t))
        sigma = torch.full((len(x),), float(t) / 1000, dtype=torch.float64)
        own = sigma / (3.0 - 2.0 * sigma)
        estimate = three_modes(path).denoise(x.double(), own)
        x = scheduler.step(estimate.eps - estimate.x0, t, x.double(), generator).prev_sample
    return x, calls


@pytest.mark.parametrize(
    ("jump", "gamma", "end", "law"),
    [
        ("first_order", 0.3, "index0", "time"),
        ("second_order", 0.5, "clean", "noise"),
        ("second_order", 0.0, "index0", "time"),
    ],
)
def test_a_flow_is_followed(jump: Jump, gamma: float, end: End, law: GammaRule) -> None:
    path = FlowMatching(3.0)
    x = torch.randn(64, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    scheduler = SSSScheduler(path="flow", shift=3.0, jump=jump, gamma=gamma, gamma_law=law, end=end)
    drawn, calls = driven(scheduler, x, 4, 7)
    generator = torch.Generator().manual_seed(7)
    step, denoise = student_step(jump), three_modes(path).denoise
    times = [float(t) for t in inference_times(path, 4)]
    wanted = follow(
        sss_jumps(path, times, gamma, end, law, len(x)), lambda x_t, t, s: step(denoise, path, x_t, t, s), path, x,
        lambda: torch.randn(x.shape, generator=generator, dtype=torch.float64),
    )  # fmt: skip
    torch.testing.assert_close(drawn, wanted, rtol=1e-5, atol=1e-5)  # the network takes its time in fp32
    assert len(calls) == 4 * scheduler.order
    sigmas = [1000 * float(path.sigma(torch.tensor(t))) for t in times]
    assert calls[:: scheduler.order] == pytest.approx(sigmas)


def test_consistency_on_a_flow() -> None:
    path = FlowMatching(3.0)
    x = torch.randn(64, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    scheduler = ConsistencyScheduler(path="flow", shift=3.0, jump="first_order")
    drawn, _ = driven(scheduler, x, 4, 7)
    generator = torch.Generator().manual_seed(7)
    step, denoise = student_step("first_order"), three_modes(path).denoise
    wanted = follow(
        consistency_jumps(path, [float(t) for t in inference_times(path, 4)], "clean", len(x)),
        lambda x_t, t, s: step(denoise, path, x_t, t, s), path, x,
        lambda: torch.randn(x.shape, generator=generator, dtype=torch.float64),
    )  # fmt: skip
    torch.testing.assert_close(drawn, wanted, rtol=1e-5, atol=1e-5)


def test_a_drawing_that_was_broken_off_leaves_nothing() -> None:
    """After the first half of a second-order jump, new times start afresh."""
    scheduler = SSSScheduler(jump="second_order", gamma=0.0)
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))

    def draw() -> Tensor:
        scheduler.set_timesteps(2)
        now = x
        for t in scheduler.timesteps:
            now = scheduler.step(0.3 * now, t, now).prev_sample
        return now

    whole = draw()
    scheduler.set_timesteps(2)
    scheduler.step(x, scheduler.timesteps[0], x)
    assert torch.equal(draw(), whole)


def test_gamma_is_the_schedulers_own() -> None:
    assert list(inspect.signature(SSSScheduler.step).parameters) == [
        "self", "model_output", "timestep", "sample", "generator", "return_dict",
    ]  # fmt: skip
    assert SSSScheduler(gamma=0.7).config["gamma"] == 0.7


def test_from_config_of_any_scheduler() -> None:
    """The noise is taken over even where it was the other's default, and a flow is known as one."""
    import diffusers

    ddim = SSSScheduler.from_config(diffusers.DDIMScheduler().config, gamma=0.2)
    assert (ddim.config["beta_schedule"], ddim.config["beta_start"], ddim.config["gamma"]) == ("linear", 0.0001, 0.2)
    assert torch.equal(ddim.alphas_cumprod, diffusers.DDIMScheduler().alphas_cumprod)
    v = diffusers.DDIMScheduler(
        prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"
    )
    made = ConsistencyScheduler.from_config(v.config)
    assert (made.config["prediction_type"], made.config["rescale_betas_zero_snr"]) == ("v_prediction", True)
    sd3 = SSSScheduler.from_config(diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0).config)
    assert (sd3.config["path"], sd3.noise_path) == ("flow", FlowMatching(3.0))
    sana = diffusers.DPMSolverMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=2.0
    )
    assert SSSScheduler.from_config(sana.config).noise_path == FlowMatching(2.0)
    back = diffusers.TCDScheduler.from_config(ddim.config)
    assert (back.config.beta_schedule, back.config.beta_start) == ("linear", 0.0001)


def test_a_shift_by_the_size_of_the_picture() -> None:
    """Flux's pipeline hands over the plain list of sigmas and mu: the number of steps and exp(mu) are taken."""
    import diffusers

    flux = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    scheduler = SSSScheduler.from_config(flux.config, gamma=0.0)
    scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25], mu=1.0)
    wanted = 1000 * FlowMatching(math.e).sigma(inference_times(FlowMatching(math.e), 4))
    assert scheduler.timesteps.tolist() == pytest.approx(wanted.tolist())
    scheduler.set_timesteps(4, sigmas=torch.tensor([1.0, 0.75, 0.5, 0.25]), mu=1.0)
    assert scheduler.timesteps.tolist() == pytest.approx(wanted.tolist())
    foreign = [1.0, 0.9, 0.1]
    for options, words in (
        ({"sigmas": foreign}, "sigmas"),
        ({"num_inference_steps": 4, "sigmas": foreign}, "sigmas"),
        ({"timesteps": [999.0, 500.0, 100.0], "sigmas": foreign}, "cannot be set"),
        ({"sigmas": []}, r"sigmas = \[\] cannot be set"),
        ({"num_inference_steps": 4, "sigmas": [1.0, 0.5]}, "num_inference_steps"),
        ({"timesteps": [999.0, 500.0], "sigmas": [1.0, 0.5]}, "give either num_inference_steps or timesteps"),
    ):
        with pytest.raises(SchedulerError, match=words):
            scheduler.set_timesteps(**options, mu=1.0)


@pytest.mark.parametrize("strength", [0.25, 0.5, 0.75, 0.9, 1.0])
@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_image_to_image_of_flows_makes_all_calls(family: str, strength: float, flows: dict[str, Path]) -> None:
    """Their pipelines round the other way: floor(4 / strength) steps leave 4 calls."""
    import diffusers

    kind = {"sd3": "StableDiffusion3Img2ImgPipeline", "flux": "FluxImg2ImgPipeline"}[family]
    pipe = getattr(diffusers, kind).from_pretrained(flows[family], local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = SSSScheduler.from_config(pipe.scheduler.config, gamma=0.0)
    calls: list[float] = []
    pipe.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append(float(kwargs["timestep"][0])), with_kwargs=True
    )
    picture = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    sized = {"height": 64, "width": 64}
    drawn = pipe(
        PROMPTS, image=picture, strength=strength, num_inference_steps=math.floor(4 / strength), guidance_scale=1.0,
        generator=generators(), output_type="latent", **sized,
    ).images  # fmt: skip
    assert torch.isfinite(drawn).all()
    assert len(calls) == 4


@pytest.fixture(scope="module")
def flows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: tiny_pipelines.FAMILIES[name](tmp_path_factory.mktemp(name) / "tiny") for name in ("sd3", "flux")}


@pytest.mark.parametrize("strength", [0.25, 0.5, 0.75, 1.0])
def test_image_to_image_makes_all_calls(strength: float, tiny_pipeline: Path) -> None:
    """Plain diffusers drops steps: ceil(4 / strength) of them leave 4 calls, at times that students are trained on."""
    pipe = pipeline(tiny_pipeline, "StableDiffusionImg2ImgPipeline")
    pipe.scheduler = SSSScheduler.from_config(pipe.scheduler.config, gamma=0.0)
    calls = []
    pipe.unet.register_forward_pre_hook(lambda _, args: calls.append(float(args[1])))
    picture = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    steps = math.ceil(4 / strength)
    drawn = pipe(
        PROMPTS, image=picture, strength=strength, num_inference_steps=steps, guidance_scale=0.0,
        generator=generators(), output_type="latent",
    ).images  # fmt: skip
    assert torch.isfinite(drawn).all()
    assert len(calls) == 4
    assert set(calls) <= set(training_grid(scaled_linear(), 50).tolist())
    assert calls[0] < 1000 * strength + 20  # within a step of the grid
    own = SSSScheduler.from_config(pipe.scheduler.config)
    own.set_timesteps(4, strength=strength)
    assert len(own.timesteps) == 4
    assert set(own.timesteps.tolist()) <= set(training_grid(scaled_linear(), 50).tolist())


@pytest.mark.parametrize("scheduler", [SSSScheduler, ConsistencyScheduler])
@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
def test_a_drawing_split_over_two_pipelines(scheduler: type[FewStepScheduler], share: float, tmp_path: Path) -> None:
    """First-order jumps end where the second pipeline begins; a second-order jump that would be cut is refused."""
    first = pipeline(tiny_pipelines.sdxl(tmp_path / "sdxl"), "StableDiffusionXLPipeline")
    second = type_of("StableDiffusionXLImg2ImgPipeline")(**first.components)
    second.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 4, "guidance_scale": 0, "output_type": "latent"}

    def split(jump: str) -> tuple[Tensor, Tensor]:
        more = {"gamma": 0.0} if scheduler is SSSScheduler else {}
        for pipe in (first, second):
            pipe.scheduler = scheduler.from_config(first.scheduler.config, jump=jump, **more)
        whole = first(PROMPTS, generator=generators(), **options).images
        noise = generators()  # handed on: of consistency sampling each jump draws more of it
        half = first(PROMPTS, generator=noise, denoising_end=share, **options).images
        both = second(PROMPTS, image=half, generator=noise, denoising_start=share, **options).images
        return whole, both

    torch.testing.assert_close(*split("first_order"))
    with pytest.raises(SchedulerError, match="begin_index"):
        split("second_order")


def test_a_second_order_jump_is_begun_at_its_first_call() -> None:
    scheduler = SSSScheduler(jump="second_order")
    scheduler.set_timesteps(4)
    x = torch.zeros(1, 4, 8, 8)
    for place in range(8):
        scheduler.set_timesteps(4)
        if place % 2:
            with pytest.raises(SchedulerError, match="begin_index"):
                scheduler.set_begin_index(place)
            with pytest.raises(SchedulerError, match="begin_index"):  # a loop that only hands over its times
                scheduler.step(x, scheduler.timesteps[place], x)
        else:
            scheduler.set_begin_index(place)
            scheduler.step(x, scheduler.timesteps[place], x)


def test_times_that_are_given_obey_the_strength() -> None:
    own = ConsistencyScheduler()
    own.set_timesteps(timesteps=[999, 739, 499, 259], strength=0.75)
    assert own.timesteps.tolist() == [739, 499, 259]
    with pytest.raises(ValueError, match=r"strength = 0\.2 is below all timesteps; use 0\.5 or more$"):
        own.set_timesteps(timesteps=[999, 499], strength=0.2)
    own.set_timesteps(timesteps=[999, 499], strength=0.5)
    assert own.timesteps.tolist() == [499]


@pytest.mark.parametrize("kind", ["exponential", "linear"])
def test_a_shift_by_size_is_the_pipelines(kind: str) -> None:
    """`with_static_shift` and `mu` equal diffusers' formula; no picture's shift reaches the next one."""
    from diffusers import FlowMatchEulerDiscreteScheduler
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    theirs = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True, time_shift_type=kind)
    for tokens in (16, 256, 1024, 4096):
        mu = calculate_shift(tokens)
        theirs.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25], mu=mu)
        path = path_of(with_static_shift(theirs.config, tokens))
        u = torch.tensor([1.0, 0.75, 0.5, 0.25], dtype=torch.float64)
        torch.testing.assert_close(path.sigma(u), theirs.sigmas[:4].double(), rtol=1e-5, atol=0)
        own = SSSScheduler.from_config(theirs.config, grid=4)
        own.set_timesteps(4, mu=mu)
        torch.testing.assert_close(own.timesteps, theirs.timesteps, rtol=1e-5, atol=0)
    kept = own.timesteps
    for options in ({"num_inference_steps": 4}, {"timesteps": [999.0, 500.0]}, {"sigmas": [1.0, 0.5]}):
        with pytest.raises(
            SchedulerError, match=r"mu = None, but use_dynamic_shifting = True .* fewstep\.scheduler_for"
        ):
            own.set_timesteps(**options)
    assert own.timesteps is kept, "a refusal changes nothing"
    settles = SSSScheduler.from_config(with_static_shift(theirs.config, 1024))
    settles.set_timesteps(4, mu=3.0)
    assert settles.noise_path == path_of(with_static_shift(theirs.config, 1024))
    plain = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
    assert with_static_shift(plain, 4096) == plain


@pytest.mark.parametrize("solver", ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler"])
def test_a_shift_survives_a_solver_in_between(solver: str) -> None:
    import diffusers

    flow = SSSScheduler(path="flow", prediction_type="flow_prediction", shift=3.0)
    between = getattr(diffusers, solver).from_config(flow.config)
    assert SSSScheduler.from_config(between.config).config["shift"] == 3.0
    theirs = getattr(diffusers, solver)(flow_shift=5.0, use_flow_sigmas=True, prediction_type="flow_prediction")
    assert SSSScheduler.from_config(theirs.config).config["shift"] == 5.0
    chosen = SSSScheduler.from_config(theirs.config, shift=2.0)
    assert SSSScheduler.from_config(chosen.config).config["shift"] == 2.0, "what it took over is not calls again"
    assert path_of(between.config) == FlowMatching(3.0)


def test_the_training_grid_as_lcm_pipelines_pass_it() -> None:
    import diffusers

    own = ConsistencyScheduler.from_config(diffusers.LCMScheduler(original_inference_steps=100).config)
    own.set_timesteps(4, original_inference_steps=100)
    assert own.timesteps.tolist() == [999, 749, 499, 249]
    with pytest.raises(ValueError, match=r"original_inference_steps = 50 .*; use 100"):
        own.set_timesteps(4, original_inference_steps=50)
    kept = ConsistencyScheduler.from_config(diffusers.TCDScheduler().config, grid=20)
    assert kept.config["grid"] == 20


def test_times_within_a_strength() -> None:
    vp, flow = scaled_linear(), FlowMatching(3.0)
    assert times_within(vp, 4, 0.5).tolist() == [499, 379, 259, 139]
    assert times_within(vp, 4, 0.25).tolist() == [239, 179, 119, 59]
    assert times_within(vp, 4, 1.0).tolist() == inference_times(vp, 4).tolist()
    assert times_within(flow, 2, 0.5, grid=8).tolist() == [0.5, 0.25]
    assert times_within(vp, 3, 0.5, spacing="tlcm").tolist() == [499, 374, 249]
    assert times_within(vp, 3, 1.0, spacing="tlcm").tolist() == [999, 499, 124]
    assert times_within(vp, 4, 0.5, spacing="trailing").tolist() == [499, 374, 249, 124]
    with pytest.raises(UserError, match=r"within 1 to 4, .* strength of at least 0\.625"):
        times_within(vp, 5, 0.5, spacing="tlcm")
    with pytest.raises(UserError, match=r"within 1 to 2, .* strength of at least 0\.5"):
        times_within(vp, 4, 0.25, grid=8)
    with pytest.raises(UserError, match=r"strength = 1\.5 must be"):
        times_within(vp, 4, 1.5)


def test_noise_is_added_at_the_networks_times() -> None:
    x, eps = torch.randn(2, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    scheduler = SSSScheduler()
    wanted = add_noise(scaled_linear(), x, eps, torch.tensor([10.0, 499.0]))
    torch.testing.assert_close(scheduler.add_noise(x, eps, torch.tensor([10, 499])), wanted, rtol=1e-4, atol=1e-5)
    flow = SSSScheduler(path="flow", shift=3.0)
    torch.testing.assert_close(flow.scale_noise(x, torch.tensor([250.0]), eps), 0.75 * x + 0.25 * eps)


@pytest.mark.parametrize(
    ("call", "field"),
    [
        (lambda: SSSScheduler(gamma=1.2), "gamma"),
        (lambda: SSSScheduler(gamma="0.3"), "gamma"),
        (lambda: SSSScheduler(gamma=None), "gamma"),
        (lambda: SSSScheduler(gamma=float("nan")), "gamma"),
        (lambda: SSSScheduler(jump="second_order", r=0), "r"),
        (lambda: SSSScheduler(rescale_betas_zero_snr=True), None),
        (lambda: SSSScheduler().set_timesteps(4.5), "num_inference_steps"),
        (lambda: SSSScheduler().set_timesteps("4"), "num_inference_steps"),
        (lambda: SSSScheduler().set_timesteps(True), "num_inference_steps"),
        (lambda: SSSScheduler().set_timesteps(math.nan), "num_inference_steps"),
        (lambda: SSSScheduler().set_timesteps(math.inf), "num_inference_steps"),
        (lambda: SSSScheduler().set_timesteps(4, strength="1"), "strength"),
        (lambda: SSSScheduler().set_timesteps(4, strength=math.nan), "strength"),
        (lambda: SSSScheduler().set_timesteps(4, strength=0.0), "strength"),
        (lambda: SSSScheduler(spacing="even"), "spacing"),
        (lambda: SSSScheduler(jump="skip"), "jump"),
        (lambda: SSSScheduler(path="ve"), "path"),
        (lambda: SSSScheduler().set_timesteps(51), None),
        (lambda: SSSScheduler(spacing="tlcm", grid=8).set_timesteps(9), None),
        (lambda: SSSScheduler().set_timesteps(4, timesteps=[999]), "timesteps"),
        (lambda: SSSScheduler().set_timesteps(timesteps=[1000]), "timesteps"),
        (lambda: SSSScheduler().step(torch.zeros(1), 999, torch.zeros(1)), "num_inference_steps"),
    ],
)
def test_wrong_arguments_are_refused(call: Any, field: str | None) -> None:
    """As a UserError that is a ValueError too; checks of other packages (field None) name theirs."""
    with pytest.raises(SchedulerError) as error:
        call()
    assert field is None or error.value.field == field


def test_numbers_of_numpy_are_numbers(tmp_path: Path) -> None:
    """In a config they are plain ones, which JSON can hold."""
    import numpy as np

    scheduler = SSSScheduler(gamma=np.float32(0.25), r=np.float64(0.5), jump="second_order")
    scheduler.save_pretrained(tmp_path)
    assert SSSScheduler.from_pretrained(tmp_path).config["gamma"] == 0.25
    assert ConsistencyScheduler(r=np.float32(0.5)).config["r"] == 0.5
    for count in (4, 4.0, np.int64(4), np.float32(4), torch.tensor(4)):
        scheduler.set_timesteps(count)
        assert scheduler.num_inference_steps == 4


def test_a_time_that_was_not_set() -> None:
    scheduler = SSSScheduler()
    scheduler.set_timesteps(4)
    with pytest.raises(SchedulerError, match="timestep = 700 is none of the times 999, 759"):
        scheduler.step(torch.zeros(1, 4, 8, 8), 700, torch.zeros(1, 4, 8, 8))
    for t in scheduler.timesteps:
        scheduler.step(torch.zeros(1, 4, 8, 8), t, torch.zeros(1, 4, 8, 8))
    with pytest.raises(SchedulerError, match="all 4 network calls of this drawing are done"):
        scheduler.step(torch.zeros(1, 4, 8, 8), 999, torch.zeros(1, 4, 8, 8))
