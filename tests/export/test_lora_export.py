"""Exported students: plain diffusers draws with them what we draw."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from fewstep.backbones.base import load_backbone
from fewstep.backbones.pipeline_folder import read_folder
from fewstep.common.errors import UserError
from fewstep.common.safetensors_header import Entry, read_safetensors_header
from fewstep.common.tensors import save_tensors
from fewstep.diffusion.config import Sampling
from fewstep.students.lora import merge_lora, save_lora, stored_matrices
from fewstep.students.lora_checks import check_lora
from fewstep.students.lora_header import LoraHeader, read_header
from fewstep.training.roles import AdapterRoles, add_adapter

RANK = 4
SAMPLING = Sampling(sampler="sss", steps=6, gamma=0.1)
Make = Callable[..., Path]


@pytest.fixture
def make(tiny_pipeline: Path, tmp_path: Path) -> Make:
    """Write a LoRA whose B is not zero, with every layer that the recipes adapt."""

    def run(alpha: float = RANK, dtype: torch.dtype = torch.float32, name: str = "student") -> Path:
        backbone = load_backbone(tiny_pipeline)
        add_adapter(backbone.network, "student", RANK, alpha, backbone.targets, seed=3)
        roles = AdapterRoles(backbone.network)
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for key, parameter in roles.parameters("student").items():
                if "lora_B" in key:
                    parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
        file = save_lora(
            tmp_path / name,
            {key: p.detach() for key, p in roles.parameters("student").items()},
            rank=RANK,
            alpha=alpha,
            targets=backbone.targets,
            base=read_folder(tiny_pipeline).fingerprint("unet"),
            sampling=SAMPLING,
            notes={"method": "tcd"},
            dtype=dtype,
        )
        with roles.use("student") as network:
            run.expected = outputs(network)  # type: ignore[attr-defined]
        return file

    return run


def outputs(network: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(9)
    x = torch.randn(2, 4, 8, 8, generator=generator)
    text = torch.randn(2, 8, 32, generator=generator)
    with torch.no_grad():
        out: Tensor = network(x, torch.tensor([19.0, 759.0]), text, return_dict=False)[0]
    return out


@pytest.mark.parametrize("alpha", [4.0, 1.0, 10.0])
def test_merging_equals_the_adapter_and_plain_diffusers(make: Make, tiny_pipeline: Path, alpha: float) -> None:
    """scale = alpha / rank in all three: our roles, our merge, diffusers' load_lora_weights."""
    from diffusers import StableDiffusionPipeline

    file = make(alpha)
    expected: Tensor = make.expected  # type: ignore[attr-defined]
    network = load_backbone(tiny_pipeline).network
    plain = outputs(network)
    assert float((plain - expected).abs().max()) > 1e-2  # the student is another network
    merge_lora(network, check_lora(file, read_folder(tiny_pipeline)))
    torch.testing.assert_close(outputs(network), expected, atol=1e-5, rtol=1e-5)

    pipeline: Any = StableDiffusionPipeline.from_pretrained(tiny_pipeline, safety_checker=None)
    pipeline.load_lora_weights(str(file.parent))
    torch.testing.assert_close(outputs(pipeline.unet), expected, atol=1e-5, rtol=1e-5)


def test_the_file_carries_its_settings_and_its_base(make: Make, tiny_pipeline: Path) -> None:
    file = make(dtype=torch.float16)
    assert file.name == "pytorch_lora_weights.safetensors"
    base = read_folder(tiny_pipeline).fingerprint("unet")
    with safe_open(file, framework="pt") as stream:
        metadata = stream.metadata()
    record = json.loads(metadata["fewstep"])
    assert record["base"] == base
    assert record["sampling"] == SAMPLING.model_dump(mode="json")
    assert (record["method"], record["rank"], record["alpha"]) == ("tcd", RANK, RANK)
    adapter = json.loads(metadata["lora_adapter_metadata"])
    assert (adapter["unet.r"], adapter["unet.lora_alpha"]) == (RANK, RANK)
    assert {tensor.dtype for tensor in load_file(file).values()} == {torch.float16}
    header = check_lora(file.parent, read_folder(tiny_pipeline))
    assert (header.base, header.sampling) == (base, SAMPLING)
    kinds = {len(a.shape) for a, _ in stored_matrices(header).values()}
    assert kinds == {2, 4}  # linear and convolution


def test_the_same_student_gives_the_same_bytes(make: Make) -> None:
    """Metadata too: the library under it orders them anew in every write."""
    files = {make(name=f"student-{i}").read_bytes() for i in range(4)}
    assert len(files) == 1


def test_a_picture_is_the_same_in_plain_diffusers(make: Make, tiny_pipeline: Path) -> None:
    """TCDScheduler, eta = gamma, one CPU generator: the latents of `fewstep sample`."""
    from diffusers import StableDiffusionPipeline, TCDScheduler

    from fewstep.inference.generator import load_image_generator

    file = make()
    image_generator = load_image_generator(tiny_pipeline, file)
    assert image_generator.sampling == SAMPLING
    ours = image_generator.latents(image_generator.backbone.encode(["a red disc"]), [11], image_generator.sampling)

    pipeline: Any = StableDiffusionPipeline.from_pretrained(tiny_pipeline, safety_checker=None)
    pipeline.scheduler = TCDScheduler.from_config(pipeline.scheduler.config)
    pipeline.load_lora_weights(str(file))
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        "a red disc",
        num_inference_steps=SAMPLING.steps,
        guidance_scale=0,
        eta=SAMPLING.gamma,
        generator=torch.Generator().manual_seed(11),
        output_type="latent",
    ).images
    assert float((ours - theirs).abs().max() / theirs.abs().max()) < 1e-4


@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_the_merge_by_hand(kind: str, tmp_path: Path) -> None:
    """W + alpha/rank B A; for a convolution B is 1x1 and A has the kernel."""
    layer: nn.Module = nn.Linear(3, 2, bias=False) if kind == "linear" else nn.Conv2d(3, 2, 3, bias=False)
    network = nn.ModuleDict({"layer": layer})
    shape = () if kind == "linear" else (3, 3)
    a, b = torch.randn(2, 3, *shape), torch.randn(2, 2, *[1] * len(shape))
    file = tmp_path / "a.safetensors"
    metadata = {"lora_adapter_metadata": json.dumps({"unet.r": 2, "unet.lora_alpha": 6})}
    save_tensors(file, {"unet.layer.lora_A.weight": a, "unet.layer.lora_B.weight": b}, metadata)
    before = layer.weight.detach().clone()  # type: ignore[union-attr, operator]
    merge_lora(network, read_header(file, {"layer.weight": tuple(before.shape)}))
    product = torch.einsum("or,ri...->oi...", b.flatten(1), a)
    torch.testing.assert_close(layer.weight.detach(), before + 3 * product)  # type: ignore[union-attr, operator, arg-type]


def lora_file(path: Path, a: tuple[int, ...] = (2, 3), b: tuple[int, ...] = (5, 2), **metadata: Any) -> Path:
    tensors = {"unet.x.lora_A.weight": torch.zeros(a), "unet.x.lora_B.weight": torch.zeros(b)}
    save_tensors(path, tensors, {key: json.dumps(value) for key, value in metadata.items()})
    return path


def header_of(path: Path) -> LoraHeader:
    """As if the base had one layer, x."""
    return read_header(path, {"x.weight": (5, 3)})


@pytest.mark.parametrize(
    ("adapter", "scale"),
    [
        ({}, 1.0),
        ({"unet.lora_alpha": 8}, 4.0),
        ({"unet.lora_alpha": 8, "unet.alpha_pattern": {"x": 1}}, 0.5),
        ({"unet.lora_alpha": 8, "unet.alpha_pattern": {"y": 1}}, 4.0),
        ({"unet.lora_alpha": 8, "unet.use_rslora": True}, 8 / 2**0.5),
    ],
)
def test_scales_of_foreign_adapters(adapter: dict[str, Any], scale: float, tmp_path: Path) -> None:
    header = header_of(lora_file(tmp_path / "a.safetensors", lora_adapter_metadata=adapter))
    assert header.layers["x"].scale == pytest.approx(scale)
    assert (header.base, header.sampling) == ("", None)


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"fewstep": []}, "fewstep is not a mapping"),
        ({"fewstep": {"sampling": {"steps": 0}}}, "steps = 0 must be at least 1"),
        ({"fewstep": {"sampling": {"stpes": 1}}}, "unknown key stpes; did you mean steps?"),
        ({"lora_adapter_metadata": {"unet.lora_alpha": "much"}}, "has broken metadata"),
        ({"lora_adapter_metadata": 3}, "has broken metadata"),
        ({"lora_adapter_metadata": {"unet.lora_alpha": float("inf")}}, "has broken metadata: alpha is inf"),
        ({"lora_adapter_metadata": {"unet.alpha_pattern": {"(": 1}}}, "has broken metadata"),
    ],
)
def test_broken_records_are_refused(metadata: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words):
        header_of(lora_file(tmp_path / "a.safetensors", **metadata))


def test_broken_shapes_are_refused(tmp_path: Path) -> None:
    for a, b in (((2, 3), (5, 3)), ((2, 3, 3, 3), (5, 2, 3, 3))):
        with pytest.raises(UserError, match="do not fit"):
            header_of(lora_file(tmp_path / "a.safetensors", a, b))
    file = tmp_path / "half.safetensors"
    save_tensors(file, {"unet.x.lora_A.weight": torch.zeros(2, 3)})
    with pytest.raises(UserError, match="it holds 1 A and 0 B matrices"):
        header_of(file)
    save_tensors(file, {"unet.x.lora_A.weight": torch.zeros(2, 3), "unet.x.beta": torch.zeros(())})
    with pytest.raises(UserError, match=r"it holds 'unet.x.beta'"):
        header_of(file)
    save_tensors(file, {})
    with pytest.raises(UserError, match="it holds 0 A and 0 B"):
        header_of(file)


def test_headers_describe_the_files(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    tensors = {"a": torch.zeros(2, 3), "b": torch.zeros((), dtype=torch.int64), "c": torch.zeros(0, 4)}
    save_tensors(file, tensors, {"z": "1", "é": "2", "a": "3"})
    metadata, entries = read_safetensors_header(file)
    assert metadata == {"a": "3", "z": "1", "é": "2"}
    assert list(metadata) == ["a", "z", "é"]
    start = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    assert entries == {
        "b": Entry("I64", (), start),  # the widest type comes first
        "a": Entry("F32", (2, 3), start + 8),
        "c": Entry("F32", (0, 4), start + 32),
    }
    assert set(load_file(file)) == {"a", "b", "c"}


def test_a_full_student_is_a_pipeline_with_its_settings(
    tiny_overrides: list[str], tiny_cache: Path, tmp_path: Path
) -> None:
    from diffusers import StableDiffusionPipeline

    from fewstep.distillation import distill as distillation
    from fewstep.distillation.config import resolve
    from fewstep.inference.generator import load_image_generator

    config = resolve("tcd", None, [*tiny_overrides, "student.kind=full", "loop.steps=2", "sampling.steps=3"])
    folder = distillation.distill(config, tmp_path, cache=tiny_cache, quiet=True)
    image_generator = load_image_generator(folder)
    assert image_generator.sampling == config.sampling
    trained = load_file(tmp_path / "checkpoints" / "step-00000002" / "student.safetensors")
    pipeline: Any = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    for name, parameter in pipeline.unet.named_parameters():
        torch.testing.assert_close(parameter.detach(), trained[name], atol=0, rtol=0)
    assert image_generator.draw(["a red disc"], [0]).shape == (1, 64, 64, 3)


def test_a_full_students_folder_is_not_its_teachers(tiny_pipeline: Path, tmp_path: Path) -> None:
    """Its licences and components come along; its card, pictures and pickles do not, nor what they leave empty."""
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel

    from fewstep.backbones.pipeline_writer import write_pipeline
    from fewstep.common.files import atomic_folder, read_json, write_json

    base = tmp_path / "base"
    shutil.copytree(tiny_pipeline, base)
    (base / "LICENSES").mkdir()
    for name in ("README.md", "samples.webp", "v1.ckpt", "LICENSES/A.txt", "vae/diffusion_pytorch_model.bin"):
        (base / name).write_text("x")
    (base / "safety_checker").mkdir()
    (base / "safety_checker" / "pytorch_model.bin").write_text("x")
    index = read_json(base / "model_index.json")
    checker = {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"], "requires_safety_checker": True}
    write_json(base / "model_index.json", index | checker)
    network = UNet2DConditionModel.from_pretrained(base / "unet")
    folder = tmp_path / "student"
    with atomic_folder(folder) as part:
        write_pipeline(part, read_folder(base), network, {"sampling": {"steps": 3}})
    assert sorted(path.name for path in folder.iterdir()) == [
        *("LICENSES", "fewstep.json", "model_index.json", "scheduler", "text_encoder", "tokenizer", "unet", "vae")
    ]
    assert not [path for path in folder.rglob("*") if path.suffix in (".bin", ".ckpt")]
    assert read_json(folder / "model_index.json") == index
    assert StableDiffusionPipeline.from_pretrained(folder).safety_checker is None
