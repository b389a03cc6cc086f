"""What fewstep writes is read elsewhere: pipelines with its scheduler, exports of incomplete folders, LoRA scales."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import fewstep
from fewstep.backbones.base import load_backbone
from fewstep.backbones.pipeline_folder import read_folder
from fewstep.diffusion.config import Sampling
from fewstep.distillation.save_student import starting_weights
from fewstep.export.formats import FORMS
from fewstep.inference.schedulers.few_step import ConsistencyScheduler, SSSScheduler
from fewstep.students.lora import folded, merge_lora, save_lora, unfolded
from fewstep.students.lora_checks import check_lora
from fewstep.students.lora_header import base_shapes
from fewstep.training.config import StudentConfig
from support import tiny_pipelines

PIPELINES = {
    "sd": "StableDiffusionPipeline", "sdxl": "StableDiffusionXLPipeline", "sd3": "StableDiffusion3Pipeline",
    "flux": "FluxPipeline", "pixart": "PixArtSigmaPipeline", "sana": "SanaPipeline",
}  # fmt: skip


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes), encoding="utf-8")


def weights_of(folder: Path, rank: int, dtype: torch.dtype = torch.float32, size: float = 0.1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(11)
    weights = {}
    for key, shape in base_shapes(read_folder(folder)).items():
        if key.endswith(("attn1.to_q.weight", "attn.to_q.weight")):
            name = key.removesuffix(".weight")
            weights[f"{name}.lora_A.weight"] = (torch.randn(rank, shape[1], generator=generator) * size).to(dtype)
            weights[f"{name}.lora_B.weight"] = (torch.randn(shape[0], rank, generator=generator) * size).to(dtype)
    return weights


@pytest.mark.matrix
@pytest.mark.parametrize("kind", list(PIPELINES))
@pytest.mark.parametrize("scheduler", [SSSScheduler, ConsistencyScheduler])
def test_a_pipeline_saved_with_our_scheduler_loads_in_diffusers(kind: str, scheduler: Any, tmp_path: Path) -> None:
    own = {"gamma": 0.7} if scheduler is SSSScheduler else {"jump": "first_order"}
    pipe = getattr(diffusers, PIPELINES[kind]).from_pretrained(tiny_pipelines.FAMILIES[kind](tmp_path / "tiny"))
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config, spacing="trailing", **own)
    pipe.save_pretrained(tmp_path / "saved")
    again = getattr(diffusers, PIPELINES[kind]).from_pretrained(tmp_path / "saved")
    assert type(again.scheduler) is scheduler
    configs = [{k: v for k, v in dict(x.scheduler.config).items() if not k.startswith("_")} for x in (pipe, again)]
    assert configs[0] == configs[1]
    read_folder(tmp_path / "saved")  # and as a teacher


NAMED = {
    "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
    "feature_extractor": ["transformers", "CLIPImageProcessor"],
    "image_encoder": ["transformers", "CLIPVisionModelWithProjection"],
}
OLD = {"feature_extractor_type": "CLIPFeatureExtractor", "size": 224, "crop_size": 224}


def missing(folder: Path) -> None:
    edit(folder / "model_index.json", **NAMED, requires_safety_checker=True)


def old_name(folder: Path) -> None:
    (folder / "feature_extractor").mkdir()
    (folder / "feature_extractor" / "preprocessor_config.json").write_text(json.dumps(OLD), encoding="utf-8")
    edit(folder / "model_index.json", feature_extractor=["transformers", "CLIPFeatureExtractor"])


def configs_alone(folder: Path) -> None:
    """What a fetch of JSON files leaves."""
    missing(folder)
    for name in NAMED:
        (folder / name).mkdir()
        file = "preprocessor_config.json" if name == "feature_extractor" else "config.json"
        (folder / name / file).write_text(json.dumps(OLD), encoding="utf-8")


def foreign_code(folder: Path) -> None:
    (folder / "safety_checker").mkdir()
    (folder / "safety_checker" / "config.json").write_text("{}", encoding="utf-8")
    (folder / "safety_checker" / "mine.py").write_text("raise SystemExit", encoding="utf-8")
    edit(folder / "model_index.json", safety_checker=["mine", "MyChecker"], feature_extractor=["transformers", "Nope"])


@pytest.mark.slow
@pytest.mark.parametrize("change", [missing, old_name, configs_alone, foreign_code], ids=lambda f: f.__name__)
def test_every_form_of_a_folder_whose_index_names_more_than_it_holds(change: Any, tmp_path: Path) -> None:
    folder = tiny_pipelines.sd(tmp_path / "pipe" / "tiny")
    change(folder)
    student = save_lora(
        tmp_path / "student", weights_of(folder, 4), rank=4, alpha=4, targets=["to_q"], base="", sampling=Sampling(),
        notes={},
    )  # fmt: skip
    for form in FORMS:
        fewstep.export_as(student, teacher=folder, form=form, out=tmp_path / form, device="cpu")
    fewstep.export_as(student, teacher=folder, form="merged", out=tmp_path / "unchecked", device="cpu", check=False)
    expected = load_backbone(tmp_path / "merged").network.state_dict()
    for place in ("merged", "unchecked"):
        pipe: Any = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / place)
        held = change in (old_name, configs_alone)
        assert (type(pipe.feature_extractor).__name__.startswith("CLIPImageProcessor")) == held
        assert pipe.safety_checker is None
        for name, value in pipe.unet.state_dict().items():
            assert torch.equal(value, expected[name])


@pytest.mark.parametrize("alpha", [1, 8, 48, 64, 100])
@pytest.mark.parametrize("kind", ["sd", "sd3"])
def test_a_reader_that_ignores_metadata_applies_the_whole_scale(alpha: float, kind: str, tmp_path: Path) -> None:
    """B A alone, as ComfyUI and older diffusers read this form, is what the student was trained with."""
    folder = tiny_pipelines.FAMILIES[kind](tmp_path / "tiny")
    trained = weights_of(folder, 64, torch.float16, size=1e-3)  # B times 1/8 would underflow in fp16
    component = read_folder(folder).network
    file = save_lora(
        tmp_path / "student", trained, rank=64, alpha=alpha, targets=["to_q"], base="", sampling=Sampling(), notes={},
        component=component,
    )  # fmt: skip
    found = load_file(file)
    save_file(found, tmp_path / "bare.safetensors")  # the same without any metadata
    names = [key.removesuffix(".lora_A.weight") for key in trained if key.endswith(".lora_A.weight")]
    assert names
    for name in names:
        a, b = trained[f"{name}.lora_A.weight"].double(), trained[f"{name}.lora_B.weight"].double()
        product = (
            found[f"{component}.{name}.lora_B.weight"].double() @ found[f"{component}.{name}.lora_A.weight"].double()
        )
        torch.testing.assert_close(product, alpha / 64 * b @ a, rtol=2e-7, atol=0.0)
    merged = []
    for place in (file, tmp_path / "bare.safetensors"):
        network = load_backbone(folder).network
        merge_lora(network, check_lora(place, read_folder(folder)))
        merged.append(network.state_dict())
    for name, value in merged[0].items():
        assert torch.equal(value, merged[1][name])
    config = StudentConfig(rank=64, alpha=alpha, start=str(file))
    for name, value in starting_weights(config, check_lora(file, read_folder(folder))).items():
        assert torch.equal(value, trained[name].float()), name


def test_the_bytes_of_a_student_at_scale_one_are_its_own(tmp_path: Path) -> None:
    """Nothing is multiplied, and the record is unchanged."""
    folder = tiny_pipelines.sd(tmp_path / "tiny")
    trained = weights_of(folder, 4, torch.float16)
    file = save_lora(
        tmp_path / "student", trained, rank=4, alpha=4, targets=["to_q"], base="x", sampling=Sampling(), notes={}
    )
    for name, value in load_file(file).items():
        assert torch.equal(value, trained[name.removeprefix("unet.")])
    assert "trained_alpha" not in check_lora_notes(file)


def check_lora_notes(file: Path) -> dict[str, Any]:
    from fewstep.students.lora_file import read_lora_record

    return read_lora_record(file)


@pytest.mark.parametrize("scale", [0.125, 0.75, 1.0, 1 / 3, 3.0])
def test_folding_is_undone_to_the_last_bit(scale: float) -> None:
    b = (torch.randn(1000, generator=torch.Generator().manual_seed(0)) * torch.logspace(-7, 2, 1000)).half()
    put = folded(b, scale)
    torch.testing.assert_close(put.double(), b.double() * scale, rtol=2**-23, atol=0.0)
    assert torch.equal(unfolded(put.float(), scale), b.float())


@pytest.mark.matrix
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("kind", ["sd", "sd3"])
def test_a_lora_of_any_floating_type_is_exported_with_its_scale(dtype: torch.dtype, kind: str, tmp_path: Path) -> None:
    """B may become fp32 beside an A of 16 bits: diffusers loads both into a network of 16 bits."""
    folder = tiny_pipelines.FAMILIES[kind](tmp_path / "tiny")
    component = read_folder(folder).network
    weights = {f"{component}.{name}": value.to(dtype) for name, value in weights_of(folder, 4).items()}
    metadata = json.dumps({f"{component}.r": 4, f"{component}.lora_alpha": 3})
    save_file(weights, tmp_path / "lora.safetensors", {"lora_adapter_metadata": metadata})
    out = fewstep.export_as(
        tmp_path / "lora.safetensors", teacher=folder, form="diffusers", out=tmp_path / "out", device="cpu"
    )[0]
    found = load_file(out)
    for name, value in weights.items():
        scale = 0.75 if ".lora_B." in name else 1.0
        torch.testing.assert_close(found[name].double(), value.double() * scale, rtol=1e-7, atol=0.0)
    if dtype == torch.bfloat16:
        pipe = getattr(diffusers, PIPELINES[kind]).from_pretrained(folder, torch_dtype=dtype)
        pipe.load_lora_weights(str(out))
        drawn = pipe("a", num_inference_steps=1, output_type="latent", height=64, width=64).images
        assert bool(drawn.isfinite().all())


@pytest.mark.slow
def test_an_fp16_folder_is_read_and_its_copies_have_plain_names(tmp_path: Path) -> None:
    """Hubs hold `diffusion_pytorch_model.fp16.safetensors`, some of them alone; sharded ones have an index."""
    folder = tiny_pipelines.sd(tmp_path / "pipe" / "tiny")
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float16)
    pipe.save_pretrained(tmp_path / "half", variant="fp16")
    shutil.rmtree(tmp_path / "half" / "unet")
    pipe.unet.save_pretrained(tmp_path / "half" / "unet", variant="fp16", max_shard_size="100KB")
    assert len(list((tmp_path / "half" / "unet").glob("*fp16-*.safetensors"))) > 1
    own, found = load_backbone(folder), load_backbone(tmp_path / "half")
    for name, value in own.network.state_dict().items():
        assert torch.equal(found.network.state_dict()[name], value.half().float()), name
    assert torch.allclose(own.encode(["a red cat"])["text"], found.encode(["a red cat"])["text"], atol=1e-2)
    student = save_lora(
        tmp_path / "student", weights_of(folder, 4), rank=4, alpha=4, targets=["to_q"], base="", sampling=Sampling(),
        notes={},
    )  # fmt: skip
    for form in FORMS:
        fewstep.export_as(student, teacher=tmp_path / "half", form=form, out=tmp_path / form, device="cpu")
    again: Any = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "merged")
    assert again.text_encoder is not None
    assert not list((tmp_path / "merged").rglob("*.fp16.*"))


def run_folder(place: Path, base: Path, **notes: Any) -> Path:
    """What a finished distillation leaves, as far as its student is concerned."""
    (place / "checkpoints").mkdir(parents=True)
    (place / "config.yaml").write_text(f"recipe: tcd\nteacher: {base}\n", encoding="utf-8")
    save_lora(
        place / "student", weights_of(base, 4), rank=4, alpha=4, targets=["to_q"],
        base=read_folder(base).fingerprint("unet"), sampling=Sampling(), notes=notes,
    )  # fmt: skip
    return place


def test_a_run_folder_names_its_student(tmp_path: Path) -> None:
    folder = tiny_pipelines.sd(tmp_path / "pipe" / "mine")
    run = run_folder(tmp_path / "run", folder)
    own, found = (check_lora(place, read_folder(folder)) for place in (run / "student", run))
    assert own == replace(found, path=own.path)
    assert fewstep.call_settings(run) == fewstep.call_settings(run / "student")
    fewstep.sample("a cat", teacher=folder, lora=run, out=tmp_path / "a.png", device="cpu")
    fewstep.sample("a cat", teacher=folder, lora=run / "student", out=tmp_path / "b.png", device="cpu")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    fewstep.export_as(run, teacher=folder, form="kohya", out=tmp_path / "kohya", device="cpu")
    shutil.rmtree(run / "student")
    with pytest.raises(fewstep.UserError, match="without a finished student"):
        check_lora(run, read_folder(folder))


@pytest.mark.parametrize("noted", [True, False])
@pytest.mark.parametrize("other", ["sd", "sdxl"])
def test_a_student_of_another_teacher_names_its_own(other: str, noted: bool, tmp_path: Path) -> None:
    """From its record, wherever the file lies; of an older one from the run folder around it."""
    folder = tiny_pipelines.sd(tmp_path / "pipe" / "mine")
    run = run_folder(tmp_path / "run", folder, **({"teacher": "someone/model"} if noted else {}))
    wrong = tiny_pipelines.FAMILIES[other](tmp_path / "other" / "tiny")
    file = next((wrong / "unet").glob("*.safetensors"))
    save_file({name: value + 1e-3 for name, value in load_file(file).items()}, file, {"format": "pt"})
    with pytest.raises(fewstep.UserError) as caught:
        check_lora(run, read_folder(wrong))
    assert ("someone/model" if noted else str(folder)) in str(caught.value)


@pytest.mark.parametrize(
    ("place", "name"),
    [
        ("/data/stable-diffusion-v1-5", "stable-diffusion-v1-5"),
        ("/c/hub/models--a--b-c/snapshots/0123", "a/b-c"),
        ("{cache}/teachers/dream-shaper-0123456789abcdef", "dream-shaper.safetensors"),
    ],
)
def test_what_a_teacher_is_called_in_a_student(
    place: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A path of one machine is not written into the files for others."""
    from fewstep.backbones.teachers import teacher_name

    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path))
    assert teacher_name(Path(place.format(cache=tmp_path))) == name
