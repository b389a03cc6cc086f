"""The ComfyUI node's sampler, in ComfyUI's own scale, beside ours: the same calls, noise and latents.

The pack is run in ComfyUI itself by `tools/comfyui_check.py`; docs/guide/comfyui.md has the results.
"""

from __future__ import annotations

import importlib.util
import json
import math
import re
import sys
import tomllib
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.backbones.flux import Flux
from fewstep.diffusion.config import Sampling
from fewstep.diffusion.denoiser import Denoiser
from fewstep.diffusion.draw_latents import draw_latents
from fewstep.diffusion.grid import TLCM_TIMES, inference_times
from fewstep.diffusion.schedule import FlowMatching, scaled_linear
from fewstep.diffusion.schedule import Path as NoisePath
from fewstep_worlds.plane.mixture import ring

FOLDER = Path(__file__).parents[2] / "comfyui"


@pytest.fixture(scope="module")
def node() -> ModuleType:
    """The pack's sampling, alone, by its path: it imports nothing of fewstep."""
    spec = importlib.util.spec_from_file_location("comfyui_sampling", FOLDER / "sampling.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["comfyui_sampling"] = module
    spec.loader.exec_module(module)
    return module


class ModelSamplingDiscrete:
    """ComfyUI's table of sigmas, in the scale x = x0 + sigma z."""

    def __init__(self, path: NoisePath) -> None:
        t = torch.arange(1000, dtype=torch.float64)
        self.sigmas = (path.sigma(t) / path.alpha(t)).float()

    def sigma(self, t: Tensor) -> Tensor:
        return self.sigmas[int(t)]


class ModelSamplingDiscreteFlow:
    shift = 3.0


class ModelSamplingFlux:
    """ComfyUI's Flux, whose `shift` is mu."""

    shift = 1.15


PATHS: dict[str, tuple[NoisePath, Any]] = {
    "vp": (scaled_linear(), ModelSamplingDiscrete(scaled_linear())),
    "flow": (FlowMatching(3.0), ModelSamplingDiscreteFlow()),
    "flux": (FlowMatching(math.exp(1.15)), ModelSamplingFlux()),
}
SAMPLINGS = [
    Sampling(steps=4, gamma=0.3),
    Sampling(steps=4, gamma=0.0, end="clean"),
    Sampling(steps=3, gamma=0.7, gamma_law="noise"),
    Sampling(steps=2, gamma=1.0),
    Sampling(steps=5, gamma=1.0, grid=8, spacing="tlcm", end="clean"),
    Sampling(steps=6, gamma=0.4, spacing="trailing"),
    Sampling(steps=4, sampler="lcm"),
    Sampling(steps=3, sampler="lcm", jump="first_order"),
]


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
@pytest.mark.parametrize("name", PATHS)
def test_latents_are_ours(node: ModuleType, name: str, sampling: Sampling) -> None:
    path, held = PATHS[name]
    mixture = ring(path)
    calls: list[float] = []

    def call(x: Tensor, t: Tensor, condition: Any, role: str) -> Tensor:
        calls.append(float(t[0]))
        return mixture.denoise(x.double(), t).x0

    seed, flow = 11, name != "vp"
    ours = draw_latents(Denoiser(call, path, "x0"), {}, {}, sampling, [seed], (2,), "student")
    scale = node.scale_of(held)
    plan = node.settings_of({"sampling": sampling.model_dump(mode="json"), "path": "flow" if flow else "vp"})
    own = torch.tensor(plan.times, dtype=torch.float64) / (1000 if flow else 1)
    count = sampling.steps // sampling.calls_a_step
    wanted = inference_times(path, count, grid=sampling.grid, spacing=sampling.spacing)
    torch.testing.assert_close(own, wanted)

    def denoise(x: Tensor, sigma: float) -> Tensor:
        size = 1.0 if flow else (1 + sigma**2) ** -0.5
        t = path.time_of(torch.tensor([((1 - sigma) / sigma if flow else 1 / sigma)], dtype=torch.float64).log())
        return mixture.denoise(size * x, t if flow else t.round()).x0

    start = torch.randn((1, 2), generator=torch.Generator().manual_seed(seed)).double()
    sigma = scale.sigma_of(plan.times[0])
    x = start if flow else start * (1 + sigma**2) ** 0.5  # ComfyUI's noise_scaling
    seen: list[int] = []
    drawn = node.sample(
        denoise, x, plan, scale, node.noise_after_the_first(x.float(), seed), lambda i, a, b: seen.append(i)
    )
    end = scale.lowest(plan.end)
    handed = scale.handed_back(drawn, end)
    shown = handed / (1 - end) if flow else handed  # ComfyUI's inverse_noise_scaling
    assert float((shown - ours).abs().max()) < 2e-4
    assert seen == list(range(len(calls)))


def test_what_it_does_not_have_is_refused(node: ModuleType, tmp_path: Path) -> None:
    for own, words in (
        ({"sampler": "ddim"}, "needs sampler ddim"),
        ({"jump": "second_order"}, "jump second_order"),
        ({"extra_conditioning": ["s"]}, "extra conditioning"),
    ):
        with pytest.raises(ValueError, match=words):
            node.settings_of({"sampling": own})
    with pytest.raises(ValueError, match="embeds w"):
        node.settings_of({"sampling": {}, "guidance": {"embedded": True}})
    with pytest.raises(ValueError, match="steps = 9 must be from 1 to 8"):
        node.settings_of({"sampling": {"spacing": "tlcm"}}, steps=9)
    with pytest.raises(ValueError, match="steps = 60 must be from 1 to 50"):
        node.settings_of({"sampling": {}}, steps=60)
    with pytest.raises(ValueError, match="SimpleNamespace has neither discrete times nor a flow"):
        node.scale_of(SimpleNamespace())
    assert node.settings_of({"sampling": {"gamma": 0.2}}).gamma == 0.2
    assert node.settings_of({"sampling": {"gamma": 0.2}}, gamma=0.5).gamma == 0.5


def test_a_model_of_another_kind_is_refused(node: ModuleType) -> None:
    """ComfyUI takes every Stable Diffusion 1.x for one that predicts noise."""

    class EPS: ...

    class V_PREDICTION(EPS): ...  # noqa: N801

    class CONST: ...

    made = {
        "eps": type("A", (ModelSamplingDiscrete, EPS), {}),
        "v": type("B", (ModelSamplingDiscrete, V_PREDICTION), {}),
    }
    made["flow"] = type("C", (ModelSamplingFlux, CONST), {})
    for wanted in made:
        for kind, built in made.items():
            held = built.__new__(built)
            if kind == wanted:
                node.check_model({"prediction": wanted}, held)
                continue
            with pytest.raises(ValueError, match=f"predicts {wanted}, ComfyUI's model {kind}"):
                node.check_model({"prediction": wanted}, held)


def test_the_node_repeats_our_times(node: ModuleType) -> None:
    """It imports nothing of fewstep, and so repeats them."""
    assert node.TLCM_TIMES == TLCM_TIMES


def test_a_flow_has_the_shift_of_its_training(node: ModuleType) -> None:
    """At every size: the shift of ComfyUI's model, which follows the picture's, moves no call."""
    of_model, of_student = node.scale_of(ModelSamplingFlux()), node.scale_of(ModelSamplingFlux(), 2.0)
    assert of_model.sigma_of(500.0) == pytest.approx(math.exp(1.15) / (1 + math.exp(1.15)))
    assert of_student.sigma_of(500.0) == pytest.approx(2 / 3)


def test_noise_of_flux_is_packed(node: ModuleType) -> None:
    """Each step's, not the first."""
    x = torch.zeros(1, 3, 4, 6)
    noise = node.noise_after_the_first(x, 5, packed=True)
    generator = torch.Generator().manual_seed(5)
    torch.randn(x.shape, generator=generator)
    for _ in range(2):
        drawn = torch.randn(x.shape, generator=generator)
        assert torch.equal(noise(), Flux.arranged(Flux.__new__(Flux), drawn))


def test_guidance_as_an_input_is_no_cfg(node: ModuleType) -> None:
    assert node.guidance_of({"guidance": {"scale": 3.5, "told": True}}) == (1.0, 3.5)
    assert node.guidance_of({"guidance": {"scale": 7.5, "told": False}}) == (7.5, 1.0)
    assert node.guidance_of({}) == (1.0, 1.0)


WORKFLOWS = sorted(path.stem for path in (FOLDER / "api_workflows").iterdir())


def read(folder: str, name: str) -> Any:
    return json.loads((FOLDER / folder / f"{name}.json").read_text(encoding="utf-8"))


def as_api(graph: dict[str, Any]) -> dict[str, Any]:
    """A workflow of the canvas in the form that ComfyUI's server takes."""
    sources = {number: [str(source), slot] for number, source, slot, *_ in graph["links"]}
    api = {}
    for part in (node for node in graph["nodes"] if node["type"] != "MarkdownNote"):
        values, inputs = list(part["widgets_values"]), {}
        for entry in part["inputs"]:
            own = values.pop(0) if "widget" in entry else None
            if values[:1] == ["fixed"]:  # "control after generate", of a seed
                values.pop(0)
            inputs[entry["name"]] = sources[entry["link"]] if entry["link"] is not None else own
        assert not values
        api[str(part["id"])] = {"class_type": part["type"], "inputs": inputs}
    return api


@pytest.mark.parametrize("name", WORKFLOWS)
def test_both_forms_of_a_workflow_are_equal(name: str) -> None:
    graph = read("example_workflows", name)
    assert as_api(graph) == read("api_workflows", name)
    slots = {node["id"]: node for node in graph["nodes"]}
    for number, source, slot, target, entry, kind in graph["links"]:
        out, into = slots[source]["outputs"][slot], slots[target]["inputs"][entry]
        assert number in out["links"]
        assert into["link"] == number
        assert out["type"] == into["type"] == kind


@pytest.mark.parametrize("name", WORKFLOWS)
def test_workflows_take_all_that_the_node_returns(name: str) -> None:
    graph, flow = read("example_workflows", name), read("api_workflows", name)
    by_kind = {part["class_type"]: part["inputs"] for part in flow.values()}
    own = next(part for part in graph["nodes"] if part["type"] == "FewStepStudent")
    outputs = {entry["name"]: [str(own["id"]), slot] for slot, entry in enumerate(own["outputs"])}
    taken = ("model", "sampler", "sigmas", "cfg")
    assert {each: by_kind["SamplerCustom"][each] for each in taken} == {each: outputs[each] for each in taken}
    if name == "flux":
        assert by_kind["FluxGuidance"]["guidance"] == outputs["guidance"]


def test_the_pack_has_what_the_registry_requires() -> None:
    facts = tomllib.loads((FOLDER / "pyproject.toml").read_text(encoding="utf-8"))
    package = tomllib.loads((FOLDER.parent / "pyproject.toml").read_text(encoding="utf-8"))
    assert re.fullmatch(r"[a-z](?:[a-z0-9]|[-_.](?=[a-z0-9])){1,98}", facts["project"]["name"])
    assert facts["project"]["version"] == package["project"]["version"]
    assert "Repository" in facts["project"]["urls"]
    assert "PublisherId" in facts["tool"]["comfy"]
