"""The ComfyUI pack's nodes, with stand-ins for what they import of ComfyUI: its workflows fit their schemas."""

from __future__ import annotations

import asyncio
import importlib.util
import inspect
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

FOLDER = Path(__file__).parents[2] / "comfyui"
WORKFLOWS = sorted(path.stem for path in (FOLDER / "api_workflows").iterdir())
VALUES = {"COMBO": str, "FLOAT": (int, float), "INT": int}
"""Types of the inputs that are typed in at the node; others are wired."""


def schema_part(kind: str) -> SimpleNamespace:
    """A kind of the V3 schema, whose inputs and outputs keep what they are written with."""

    def entry(name: str = "", **options: Any) -> SimpleNamespace:
        return SimpleNamespace(kind=kind.upper(), name=name or options["display_name"], **options)

    return SimpleNamespace(Input=entry, Output=entry)


def stand_ins(loras: Path) -> dict[str, ModuleType]:
    """The modules of ComfyUI that the pack imports."""
    io = SimpleNamespace(ComfyNode=object, Schema=SimpleNamespace, NodeOutput=lambda *outputs: outputs)
    for kind in ("Model", "Combo", "Float", "Int", "Sampler", "Sigmas", "Conditioning"):
        setattr(io, kind, schema_part(kind))
    parts: dict[str, dict[str, Any]] = {
        "comfy": {},
        "comfy.samplers": {"KSAMPLER": lambda function: function},
        "comfy.sd": {"load_lora_for_models": lambda model, clip, *_: (model, clip)},
        "comfy.utils": {"load_torch_file": lambda *_, **__: {}},
        "comfy_api": {},
        "comfy_api.latest": {"ComfyExtension": object, "io": io},
        "folder_paths": {
            "get_filename_list": lambda _: [path.name for path in loras.iterdir()],
            "get_full_path_or_raise": lambda _, name: str(loras / name),
        },
    }
    modules = {name: ModuleType(name) for name in parts}
    for name, module in modules.items():
        vars(module).update(parts[name])
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(modules[parent], child, module)
    return modules


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """The nodes that the pack's entry gives ComfyUI, by id, with a student of a flow and one of betas in its folder."""
    loras = tmp_path_factory.mktemp("loras")
    record = {"sampling": {"steps": 4, "gamma": 0.3}, "guidance": {"scale": 3.5, "told": True}}
    for name, own in (("vp", {}), ("flow", {"path": "flow", "shift": 2.0, "prediction": "flow"})):
        save_file({"a": torch.zeros(1)}, loras / f"{name}.safetensors", {"fewstep": json.dumps(record | own)})
    spec = importlib.util.spec_from_file_location(
        "pack", FOLDER / "__init__.py", submodule_search_locations=[str(FOLDER)]
    )
    assert spec is not None
    assert spec.loader is not None
    pack: Any = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        for name, module in {**stand_ins(loras), "pack": pack}.items():
            patch.setitem(sys.modules, name, module)
        spec.loader.exec_module(pack)

        async def listed() -> list[Any]:
            found: list[Any] = await (await pack.comfy_entrypoint()).get_node_list()
            return found

        yield {node.define_schema().node_id: node for node in asyncio.run(listed())}


def test_both_nodes_are_registered(nodes: dict[str, Any]) -> None:
    assert set(nodes) == {"FewStepStudent", "FewStepNegative"}
    for node in nodes.values():
        inputs = [entry.name for entry in node.define_schema().inputs]
        assert list(inspect.signature(node.execute).parameters) == inputs


@pytest.mark.parametrize("name", WORKFLOWS)
def test_workflows_fit_the_schemas(nodes: dict[str, Any], name: str) -> None:
    """Names and types of sockets and widgets in the schema's order; values in their ranges."""
    graph = json.loads((FOLDER / "example_workflows" / f"{name}.json").read_text(encoding="utf-8"))
    own = [part for part in graph["nodes"] if part["type"].startswith("FewStep")]
    assert own
    for part in own:
        schema = nodes[part["type"]].define_schema()
        for side, entries in (("inputs", schema.inputs), ("outputs", schema.outputs)):
            assert [(each["name"], each["type"]) for each in part[side]] == [(each.name, each.kind) for each in entries]
        wired = [each["name"] for each in part["inputs"] if each["link"] is not None]
        typed = [entry for entry in schema.inputs if entry.name not in wired]
        assert [entry.name for entry in typed] == [each["name"] for each in part["inputs"] if "widget" in each]
        for entry, value in zip(typed, part["widgets_values"], strict=True):
            assert isinstance(value, VALUES[entry.kind])
            assert entry.kind == "COMBO" or entry.min <= value <= entry.max


class ModelSamplingDiscrete:
    sigmas = torch.linspace(0.03, 14.6, 1000)

    def sigma(self, t: torch.Tensor) -> torch.Tensor:
        return self.sigmas[int(t)]


class ModelSamplingFlux:
    """ComfyUI's, whose `shift` is mu, which follows the picture's size."""

    def __init__(self, shift: float) -> None:
        self.shift = shift


class CONST: ...


def model_of(held: Any) -> Any:
    """A loaded model with a `model_sampling`."""
    return SimpleNamespace(get_model_object=lambda _: held)


def flux_model(mu: float) -> Any:
    return model_of(type("ModelSampling", (ModelSamplingFlux, CONST), {})(mu))


@pytest.mark.parametrize("name", WORKFLOWS)
def test_a_workflows_inputs_give_what_the_sampler_takes(nodes: dict[str, Any], name: str) -> None:
    flow = json.loads((FOLDER / "api_workflows" / f"{name}.json").read_text(encoding="utf-8"))
    node = nodes["FewStepStudent"]
    inputs = next(part["inputs"] for part in flow.values() if part["class_type"] == "FewStepStudent")
    model, file = (flux_model(1.15), "flow") if name == "flux" else (model_of(ModelSamplingDiscrete()), "vp")
    inputs |= {"model": model, "lora_name": f"{file}.safetensors"}
    student, sampler, sigmas, cfg, guidance = node.execute(**inputs)
    assert student is model
    assert (cfg, guidance) == (1.0, 3.5)
    assert sigmas.shape == (5,)
    assert (sigmas.diff() < 0).all()
    x = torch.randn(1, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    drawn = sampler(lambda y, sigma, **_: torch.zeros_like(y), x, sigmas, {"seed": 3})
    assert drawn.shape == x.shape
    assert float(drawn.abs().max()) < 0.1 * float(x.abs().max()), "x0 is 0"


def test_fluxs_times_do_not_follow_the_pictures_size(nodes: dict[str, Any]) -> None:
    """Those of the student's training, at every shift that ModelSamplingFlux gives the model."""
    words = {"lora_name": "flow.safetensors", "strength": 1.0, "steps": 0, "gamma": -1.0}
    small, large = (nodes["FewStepStudent"].execute(flux_model(mu), **words)[2] for mu in (0.5, 1.15))
    torch.testing.assert_close(small, large)
    assert float(large[0]) == pytest.approx(1.0)
    t = float(large[1])
    assert t / (1 - t) == pytest.approx(2.0 * (38 / 50) / (1 - 38 / 50), rel=1e-5), "shift 2 of grid point 38"
    assert not math.isclose(t, 38 / 50)
