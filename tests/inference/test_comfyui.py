"""The ComfyUI node's sampler, in ComfyUI's own scale, beside ours: the same calls, noise and latents.

The node was run in ComfyUI itself, too; docs/guide/comfyui.md describes how, with the results.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

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
    """The file as ComfyUI loads it: alone, by its path."""
    spec = importlib.util.spec_from_file_location("fewstep_student", FOLDER / "fewstep_student.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["fewstep_student"] = module
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


PATHS: dict[str, tuple[NoisePath, Any]] = {
    "vp": (scaled_linear(), ModelSamplingDiscrete(scaled_linear())),
    "flow": (FlowMatching(3.0), ModelSamplingDiscreteFlow()),
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

    seed, flow = 11, name == "flow"
    ours = draw_latents(Denoiser(call, path, "x0"), {}, {}, sampling, [seed], (2,), "student")
    scale = node.scale_of(held)
    plan = node.settings_of({"sampling": sampling.model_dump(mode="json"), "path": name})
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
    made["flow"] = type("C", (ModelSamplingDiscreteFlow, CONST), {})
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


def test_the_workflow_names_the_node(node: ModuleType) -> None:
    flow = json.loads((FOLDER / "tcd_workflow_api.json").read_text(encoding="utf-8"))
    by_kind = {part["class_type"]: (number, part["inputs"]) for number, part in flow.items()}
    student, _ = by_kind["FewStepStudent"]
    assert "FewStepStudent" in node.NODE_CLASS_MAPPINGS
    names = node.FewStepStudent.RETURN_NAMES
    custom = by_kind["SamplerCustom"][1]
    wired = {name: custom[name] for name in names}
    assert wired == {name: [student, place] for place, name in enumerate(names)}
