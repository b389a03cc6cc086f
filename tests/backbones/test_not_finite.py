"""Numbers that are not finite are neither drawn nor written: one line names the seed and the file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import fewstep
from fewstep.backbones.base import load_backbone
from fewstep.backbones.pipeline_folder import read_folder
from fewstep.backbones.pipeline_writer import write_pipeline
from fewstep.backbones.weight_files import weight_files
from fewstep.common.errors import UserError
from fewstep.common.files import atomic_folder, atomic_write
from fewstep.common.mapped_tensors import write_rows
from fewstep.common.tensors import finite, save_tensors
from fewstep.diffusion.config import Sampling
from fewstep.students.lora import save_lora
from fewstep.students.lora_header import base_shapes
from fewstep.training import checkpoint
from support import tiny_pipelines

BAD = {"nan": float("nan"), "inf": float("inf"), "-inf": float("-inf")}
TYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
SETTINGS = {"steps": 2, "sampler": "ddim", "spacing": "trailing", "end": "clean", "omega": 0.0}


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("bad", list(BAD.values()), ids=list(BAD))
def test_what_is_finite(dtype: torch.dtype, bad: float) -> None:
    values = torch.linspace(-4, 4, 1000).to(dtype)
    assert finite(values)
    if dtype == torch.float8_e4m3fn and bad == bad:
        return  # that type has no infinity
    spoiled = values.clone()
    spoiled[613] = torch.tensor(bad).to(dtype)
    assert not finite(spoiled)
    assert finite(torch.arange(3))
    assert finite(torch.zeros(0, dtype=dtype))


def spoil(file: Path, key: str, bad: float) -> None:
    weights = load_file(file)
    weights[key].view(-1)[0] = bad
    save_file(weights, file, {"format": "pt"})


@pytest.mark.slow
@pytest.mark.parametrize("bad", ["nan", "inf"])
@pytest.mark.parametrize(
    ("component", "end"),
    [("unet", "conv_out.bias"), ("vae", "decoder.conv_out.bias"), ("text_encoder", "final_layer_norm.bias")],
)
def test_a_picture_that_is_not_finite_is_not_drawn(component: str, end: str, bad: str, tmp_path: Path) -> None:
    folder = tiny_pipelines.sd(tmp_path / "pipe" / "tiny")
    (file,) = weight_files(folder / component)
    spoil(file, next(key for key in load_file(file) if key.endswith(end)), BAD[bad])
    out = tmp_path / "drawn.png"
    with pytest.raises(UserError) as caught:
        fewstep.sample("a cat", teacher=folder, lora=None, out=out, seed=5, device="cpu", settings=SETTINGS)
    assert str(file) in str(caught.value)
    assert "seed = 5" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not out.exists()
    for form in ("merged", "single-file"):
        with pytest.raises(UserError):
            fewstep.export_as(folder, form=form, out=tmp_path / form, device="cpu", check=False)
        assert not (tmp_path / form).exists()


@pytest.mark.parametrize(
    ("component", "end"), [("unet", "conv_out.bias"), ("vae", "encoder.conv_in.bias"), ("text_encoder", "norm.bias")]
)
def test_a_distillation_names_the_weights_that_are_not_finite(
    component: str, end: str, tmp_path: Path, picture_folder: Path
) -> None:
    """Where it meets them: an encoding, a latent, a loss. Weights that are sound blame the settings."""
    folder = tiny_pipelines.sd(tmp_path / "pipe" / "tiny")
    settings = [
        f"data.source={picture_folder}",
        "device=cpu",
        "loop.steps=2",
        "loop.batch=2",
        "loop.validate_every=null",
    ]
    with pytest.raises(UserError, match=r"optim\.lr"):
        fewstep.distill("tcd", out=tmp_path / "first", teacher=folder, overrides=[*settings, "optim.lr=1e30"])
    (file,) = weight_files(folder / component)
    spoil(file, next(key for key in load_file(file) if key.endswith(end)), float("nan"))
    with pytest.raises(UserError) as caught:
        fewstep.distill("tcd", out=tmp_path / "run", teacher=folder, overrides=settings)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_seed_that_is_named_is_the_one_that_failed(tmp_path: Path) -> None:
    """Of several pictures drawn at once."""
    from fewstep.inference.generator import load_image_generator

    image_generator = load_image_generator(tiny_pipelines.sd(tmp_path / "pipe" / "tiny"))
    latents = torch.zeros(3, 4, 8, 8)
    latents[1, 0, 0, 0] = float("nan")
    with pytest.raises(UserError, match="seed = 8:"):
        image_generator.to_pictures(latents, [7, 8, 9])
    assert image_generator.to_pictures(latents[[0, 2]], [7, 9]).dtype == np.uint8


@pytest.mark.slow
@pytest.mark.parametrize("matrix", ["A", "B"])
@pytest.mark.parametrize("bad", list(BAD))
def test_a_lora_that_is_not_finite_is_not_used(bad: str, matrix: str, tmp_path: Path) -> None:
    folder = tiny_pipelines.sd(tmp_path / "pipe" / "tiny")
    key, shape = next((k, s) for k, s in base_shapes(read_folder(folder)).items() if k.endswith("attn1.to_q.weight"))
    name = f"unet.{key.removesuffix('.weight')}.lora_"
    file = tmp_path / "lora.safetensors"
    save_file({f"{name}A.weight": torch.zeros(4, shape[1]), f"{name}B.weight": torch.zeros(shape[0], 4)}, file)
    spoil(file, f"{name}{matrix}.weight", BAD[bad])
    with pytest.raises(UserError, match=r"lora\.safetensors"):
        fewstep.sample("a", teacher=folder, lora=file, out=tmp_path / "o.png", device="cpu", settings=SETTINGS)
    for form in ("diffusers", "peft", "kohya", "merged"):
        with pytest.raises(UserError, match=r"lora\.safetensors"):
            fewstep.export_as(file, teacher=folder, form=form, out=tmp_path / form, device="cpu", check=False)


@pytest.mark.parametrize("form", ["merged", "single-file"])
def test_a_type_that_cannot_hold_a_weight_is_refused(form: str, tmp_path: Path) -> None:
    """fp16 ends at 65,504; the network itself is sound."""
    folder = tiny_pipelines.sd(tmp_path / "pipe" / "tiny")
    spoil(weight_files(folder / "unet")[0], "time_embedding.linear_1.bias", -1e6)
    with pytest.raises(UserError, match="float16"):
        fewstep.export_as(folder, form=form, precision="fp16", out=tmp_path / form, device="cpu", check=False)
    fewstep.export_as(folder, form=form, precision="bf16", out=tmp_path / form, device="cpu", check=False)


def test_nothing_that_is_not_finite_is_written(tmp_path: Path) -> None:
    """Students, whole and LoRA, checkpoints, caches: each names its file, and what stood there before is left."""
    bad = {"a.lora_A.weight": torch.ones(2, 2), "a.lora_B.weight": torch.tensor([[1.0, 1e9]])}
    student = {"rank": 2, "alpha": 2, "targets": ["a"], "base": "", "sampling": Sampling(), "notes": {}}
    with pytest.raises(UserError, match=r"student.*a\.lora_B\.weight \(float16\)"):
        save_lora(tmp_path / "student", bad, **student)
    spoiled = {"x": torch.tensor([1.0, float("nan")])}
    with atomic_write(tmp_path / "cache.safetensors") as part:
        save_tensors(part, {"x": torch.ones(2)})
    with (
        pytest.raises(UserError, match=r"/cache\.safetensors was not written"),
        atomic_write(tmp_path / "cache.safetensors") as part,
    ):
        save_tensors(part, spoiled)
    assert torch.equal(load_file(tmp_path / "cache.safetensors")["x"], torch.ones(2))
    with pytest.raises(UserError, match=r"/rows\.safetensors was not written"):
        write_rows(tmp_path / "rows.safetensors", 2, [{"x": torch.ones(1, 2)}, {"x": spoiled["x"][None]}])
    with pytest.raises(UserError, match=r"step-00000003/student\.safetensors was not written"):
        checkpoint.save(tmp_path / "checkpoints", 3, {"student": spoiled}, {}, keep=2)
    assert not list((tmp_path / "checkpoints").glob("step-*"))
    folder = tiny_pipelines.sd(tmp_path / "pipe" / "tiny")
    network = load_backbone(folder).network
    with torch.no_grad():
        network.conv_in.bias[0] = float("inf")  # type: ignore[union-attr,index]
    with pytest.raises(UserError, match="/full/unet was not written"), atomic_folder(tmp_path / "full") as part:
        write_pipeline(part, read_folder(folder), network, {})
    assert not (tmp_path / "full").exists()
    with atomic_folder(tmp_path / "fine") as place:
        save_tensors(place / "x.safetensors", {"x": torch.ones(2)})
