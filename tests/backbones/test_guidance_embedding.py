"""UNets that embed their guidance (LCM's full weights): drawn from, trained, exported, and refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fewstep as api
from fewstep.backbones.base import open_backbone
from fewstep.backbones.families import GUIDANCE_KEY
from fewstep.backbones.pipeline_folder import read_folder
from fewstep.backbones.unet import guidance_sinusoid
from fewstep.commands.export import export_as
from fewstep.commands.synthesize import synthesize
from fewstep.common.errors import UserError
from fewstep.common.tensors import digest, load_tensors, save_tensors
from fewstep.diffusion.config import Sampling
from fewstep.diffusion.denoiser import BASE
from fewstep.distillation import distill as distillation
from fewstep.distillation.config import resolve
from fewstep.inference.generator import load_image_generator
from fewstep.students.lora_file import CONDITIONING
from fewstep.students.resolve import teacher_sampling
from fewstep.training.config import StudentConfig
from fewstep.training.student import make_student
from support.interrupt import stopped_in_call
from support.tiny_pipelines import lcm, sd, sdxl

LCM, SD, XL = "LatentConsistencyModelPipeline", "StableDiffusionPipeline", "StableDiffusionXLPipeline"
PROMPT = "a red disc"
SMALL = ["loop.steps=4", "loop.save_every=1", "optim.lr=0.01"]


@pytest.fixture(scope="session")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Pipelines whose UNet embeds its guidance: two consistency models, and a diffusion model that is guided so."""
    root = tmp_path_factory.mktemp("embedded")
    return {
        "lcm": lcm(root / "one" / "lcm"),
        "xl": lcm(root / "two" / "xl", kind=XL),
        "ddim": lcm(root / "three" / "ddim", "DDIMScheduler", SD),
    }


def drawn_by_diffusers(folder: Path, steps: int, scale: float, seed: int = 5, **more: Any) -> np.ndarray:
    """The picture [H, W, 3] in 0 .. 255 of the folder's own pipeline, in plain diffusers."""
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    noise = torch.Generator("cpu").manual_seed(seed)
    options = {"num_inference_steps": steps, "guidance_scale": scale, "generator": noise, "output_type": "np", **more}
    found: np.ndarray = pipe(PROMPT, **options).images[0] * 255
    return found


def test_the_sinusoid_is_that_of_diffusers() -> None:
    from diffusers import LatentConsistencyModelPipeline as Pipeline

    w = torch.tensor([0.0, 0.5, 7.5, 14.0])
    for width in (32, 33, 256):
        wanted = Pipeline.get_guidance_scale_embedding(None, w, embedding_dim=width)
        assert torch.equal(guidance_sinusoid(w.double(), width), wanted)


@pytest.mark.parametrize("kind", ["lcm", "xl"])
@pytest.mark.parametrize(("steps", "scale"), [(1, 1.0), (2, 8.5), (4, 3.0)])
def test_a_consistency_model_draws_as_its_own_pipeline(
    kind: str, steps: int, scale: float, embedded: dict[str, Path]
) -> None:
    """Guidance as omega or as w, less by 1 than diffusers' guidance_scale."""
    image_generator = load_image_generator(embedded[kind])
    assert image_generator.sampling == Sampling(sampler="lcm", steps=4, omega=7.5), "its pipeline's own defaults"
    wanted = drawn_by_diffusers(embedded[kind], steps, scale)
    for how in ({"omega": scale - 1}, {"omega": 0.0, "extra_conditioning": ("w",), "w": scale - 1}):
        changed = image_generator.sampling.model_copy(update={"steps": steps, **how})
        np.testing.assert_allclose(image_generator.draw([PROMPT], [5], changed)[0].astype(float), wanted, atol=0.6)
    other = image_generator.sampling.model_copy(update={"steps": steps, "omega": scale + 3})
    assert np.abs(image_generator.draw([PROMPT], [5], other)[0] - wanted).max() > 2, "guidance matters"


def test_a_diffusion_model_that_embeds_its_guidance_draws_as_its_own_pipeline(embedded: dict[str, Path]) -> None:
    """No second call without the prompt; diffusers' DDIM with trailing times and an end on clean data."""
    config = json.loads((embedded["ddim"] / "scheduler" / "scheduler_config.json").read_text())
    assert config["set_alpha_to_one"], "the last step lands on clean data"
    place = embedded["ddim"].parent / "trailing"
    shutil.copytree(embedded["ddim"], place, dirs_exist_ok=True)
    (place / "scheduler" / "scheduler_config.json").write_text(json.dumps(config | {"timestep_spacing": "trailing"}))
    image_generator = load_image_generator(place)
    changed = image_generator.sampling.model_copy(update={"steps": 4, "omega": 3.0})
    assert image_generator.sampling.sampler == "ddim"
    np.testing.assert_allclose(
        image_generator.draw([PROMPT], [5], changed)[0].astype(float), drawn_by_diffusers(place, 4, 4.0), atol=0.6
    )


def test_the_command_draws_from_a_consistency_model(embedded: dict[str, Path], tmp_path: Path) -> None:
    from PIL import Image

    settings = {"steps": 2, "omega": 6.0}
    out = api.sample(
        PROMPT, out=tmp_path / "a.png", teacher=embedded["lcm"], lora="none", seed=5, settings=settings, scale=1
    )
    np.testing.assert_allclose(
        np.asarray(Image.open(out), float), drawn_by_diffusers(embedded["lcm"], 2, 7.0), atol=0.6
    )


@pytest.mark.parametrize("make", [sd, sdxl])
def test_a_full_student_starts_as_the_teacher_at_every_omega(make: Callable[[Path], Path], tmp_path: Path) -> None:
    backbone = open_backbone(read_folder(make(tmp_path / "teacher")))
    student = make_student(backbone, StudentConfig(kind="full"), ("student", "target"), 0, ["w"])
    assert not student.extra_conditioning, "nothing lies beside the network"
    generator = torch.Generator().manual_seed(0)
    x, t = torch.randn(3, 4, 8, 8, generator=generator), torch.full((3,), 499.0, dtype=torch.float64)
    condition = {name: value.expand(3, *value.shape[1:]) for name, value in backbone.encode([PROMPT]).items()}
    w = torch.tensor([0.0, 5.0, 14.0], dtype=torch.float64)
    base = student.call(x, t, condition, BASE)
    for role in ("student", "target"):
        assert torch.equal(student.call(x, t, {**condition, "w": w}, role), base)
    with pytest.raises(UserError, match="time_cond_proj_dim"):
        student.call(x, t, {**condition, "w": w}, BASE)
    mine = student.parameters("student")
    assert mine[GUIDANCE_KEY].shape == (16, 256)
    student.call(x, t, {**condition, "w": w}, "student").square().sum().backward()  # type: ignore[no-untyped-call]
    assert mine[GUIDANCE_KEY].grad is not None
    assert float(mine[GUIDANCE_KEY].grad.abs().max()) > 0
    assert all(parameter.grad is None for parameter in student.parameters("target").values())


@pytest.fixture(scope="session")
def trained(
    tiny_overrides: list[str], tiny_cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Path, Path]]:
    """The recipe `lcm-full` on a tiny teacher of a kind: (teacher, the exported folder)."""
    made: dict[str, tuple[Path, Path]] = {}

    def train(kind: str) -> tuple[Path, Path]:
        if kind not in made:
            root = tmp_path_factory.mktemp(kind)
            teacher = {"sd": sd, "xl": sdxl}[kind](root / "teacher")
            config = resolve("lcm-full", None, [*tiny_overrides, *SMALL], teacher)
            made[kind] = teacher, distillation.distill(config, root / "run", cache=tiny_cache, quiet=True)
        return made[kind]

    return train


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sd", "xl"])
def test_a_full_student_runs_unchanged_in_diffusers(kind: str, trained: Callable[[str], tuple[Path, Path]]) -> None:
    """By the folder's own pipeline class and scheduler, with guidance_scale = 1 + w; and read back here."""
    from diffusers import DiffusionPipeline, LatentConsistencyModelPipeline

    import fewstep

    _, folder = trained(kind)
    assert not list(folder.glob("*.safetensors")), "nothing lies beside the pipeline"
    own = load_tensors(next((folder / "unet").glob("*.safetensors")))
    assert float(own[GUIDANCE_KEY].abs().max()) > 0, "it learnt from omega"
    image_generator = load_image_generator(folder)
    ours = image_generator.draw([PROMPT], [5])[0].astype(float)
    np.testing.assert_allclose(ours, drawn_by_diffusers(folder, 4, 8.5), atol=0.6)
    other = image_generator.draw([PROMPT], [5], image_generator.sampling.model_copy(update={"w": 3.0}))[0].astype(float)
    np.testing.assert_allclose(other, drawn_by_diffusers(folder, 4, 4.0), atol=0.6)
    assert np.abs(other - ours).max() > 1, "guidance matters"
    assert fewstep.call_settings(folder) == {"num_inference_steps": 4, "guidance_scale": 8.5}
    pipe = DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    assert isinstance(pipe, LatentConsistencyModelPipeline) == (kind == "sd")
    if kind == "sd":  # the plain pipeline takes it too, by our scheduler
        from diffusers import StableDiffusionPipeline

        pipe = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = fewstep.scheduler_for(folder, pipe.scheduler.config)
    noise = torch.Generator("cpu").manual_seed(5)
    theirs = pipe(PROMPT, generator=noise, output_type="np", **fewstep.call_settings(folder)).images[0] * 255
    np.testing.assert_allclose(ours, theirs, atol=0.6)
    with pytest.raises(UserError, match="no extra conditioning"):
        fewstep.attach(pipe, folder)


@pytest.mark.parametrize("kind", ["sd", pytest.param("xl", marks=pytest.mark.slow)])
def test_a_full_student_is_exported_and_read_back(
    kind: str, trained: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    _, folder = trained(kind)
    out, checked = export_as(folder, "merged", out=tmp_path / "out")
    assert checked is not None
    assert checked.reader == "diffusers"
    wanted = load_image_generator(folder).draw([PROMPT], [5])[0].astype(float)
    np.testing.assert_allclose(load_image_generator(out).draw([PROMPT], [5])[0].astype(float), wanted, atol=0.6)
    np.testing.assert_allclose(drawn_by_diffusers(out, 4, 8.5), wanted, atol=0.6)


@pytest.mark.slow
def test_a_run_resumes_to_the_same_bytes(
    tiny_overrides: list[str], tiny_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = resolve("lcm-full", None, [*tiny_overrides, *SMALL])

    def run(name: str) -> Path:
        return distillation.distill(config, tmp_path / name, cache=tiny_cache, quiet=True)

    whole = run("whole")
    stopped_in_call(monkeypatch, 4, lambda: run("cut"))
    files = sorted(file.relative_to(whole) for file in whole.rglob("*") if file.is_file())
    again = run("cut")
    assert files == sorted(file.relative_to(again) for file in again.rglob("*") if file.is_file())
    for name in files:
        if name.suffix == ".safetensors":
            assert digest(load_tensors(again / name)) == digest(load_tensors(whole / name)), name
    np.testing.assert_allclose(
        load_image_generator(whole).draw([PROMPT], [5])[0].astype(float), drawn_by_diffusers(whole, 4, 8.5), atol=0.6
    )


def test_omega_is_drawn_for_each_sample_and_goes_in_alone(embedded: dict[str, Path]) -> None:
    """A batch of different omegas equals its samples by themselves."""
    backbone = open_backbone(read_folder(embedded["lcm"]))
    x = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([19.0, 499.0, 999.0], dtype=torch.float64)
    condition = {"text": backbone.encode([PROMPT])["text"].expand(3, -1, -1), "w": torch.tensor([2.0, 7.0, 14.0])}
    together = backbone.call(backbone.network, x, t, condition)
    for i in range(3):
        exclusive = {name: value[i : i + 1] for name, value in condition.items()}
        torch.testing.assert_close(
            backbone.call(backbone.network, x[i : i + 1], t[i : i + 1], exclusive), together[i : i + 1]
        )


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_diffusion_model_that_embeds_its_guidance_teaches(
    kind: str, embedded: dict[str, Path], tiny_overrides: list[str], tiny_cache: Path, tmp_path: Path
) -> None:
    """Its students take w by the same layer; the exported ones draw the same here and in diffusers."""
    words = [*tiny_overrides, *SMALL, f"student.kind={kind}"]
    config = resolve("lcm-full", None, words, embedded["ddim"])
    out = distillation.distill(config, tmp_path / "run", cache=tiny_cache, quiet=True)
    if kind == "lora":
        assert not (out.parent / "conditioning.safetensors").exists()
        image_generator = load_image_generator(embedded["ddim"], out)
        whole, _ = export_as(out, "merged", out=tmp_path / "merged", teacher=embedded["ddim"])
    else:
        image_generator, whole = load_image_generator(out), out
    np.testing.assert_allclose(
        image_generator.draw([PROMPT], [5])[0].astype(float), drawn_by_diffusers(whole, 4, 8.5), atol=0.6
    )


def test_training_goes_on_from_released_weights(
    embedded: dict[str, Path], tiny_overrides: list[str], tiny_cache: Path, tmp_path: Path
) -> None:
    """A consistency model's folder is a full student's start, beside the diffusion model as the teacher."""
    wide = tmp_path / "wide"
    shutil.copytree(embedded["lcm"], wide)
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(embedded["lcm"] / "unet")
    other = UNet2DConditionModel.from_config({**unet.config, "time_cond_proj_dim": 256})
    other.load_state_dict({k: v for k, v in unet.state_dict().items() if k != GUIDANCE_KEY}, strict=False)
    other.save_pretrained(wide / "unet")
    teacher = embedded["lcm"].parent / "lcm-plain"
    words = [*tiny_overrides, *SMALL, "optim.lr=1e-9"]
    config = resolve("lcm-full", None, [*words, f"student.start={wide}"], teacher)
    out = api.distill("lcm-full", out=tmp_path / "run", teacher=teacher, overrides=[*words, f"student.start={wide}"])
    assert config.student.start == str(wide)
    own = load_tensors(next((out / "unet").glob("*.safetensors")))
    for name, value in other.state_dict().items():
        torch.testing.assert_close(own[name], value, atol=1e-6, rtol=0)
    for start, extra, named in ((wide, "[]", "student.start"), (embedded["lcm"], "[w]", "student.start")):
        changes = [
            f"student.start={start}",
            f"method.extra_conditioning={extra}",
            f"sampling.extra_conditioning={extra}",
        ]
        changes += ["sampling.w=null"] if extra == "[]" else []
        with pytest.raises(UserError, match=named):
            api.distill("lcm-full", out=tmp_path / "no", teacher=teacher, overrides=[*words, *changes])


def test_what_cannot_be_is_refused(embedded: dict[str, Path], tiny_overrides: list[str], tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red disc\n", encoding="utf-8")
    for kind in ("lcm", "xl"):
        with pytest.raises(UserError, match="teacher"):
            api.distill("tcd", out=tmp_path / "no", teacher=embedded[kind], overrides=tiny_overrides)
        with pytest.raises(UserError, match="teacher"):
            synthesize(prompts, out=tmp_path / "no", teacher=embedded[kind])
    both = {"omega": 3.0, "extra_conditioning": ["w"], "w": 3.0}
    with pytest.raises(UserError, match="omega"):
        api.sample(PROMPT, out=tmp_path / "a.png", teacher=embedded["lcm"], lora="none", settings=both)
    with pytest.raises(UserError, match=r"sampling\.omega"):
        api.distill("lcm-full", out=tmp_path / "no", overrides=[*tiny_overrides, "sampling.omega=3"])
    for width in (None, 2, "wide"):
        bare = tmp_path / f"bare-{width}"
        shutil.copytree(embedded["lcm"], bare)
        file = bare / "unet" / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"time_cond_proj_dim": width}))
        with pytest.raises(UserError, match="time_cond_proj_dim"):
            read_folder(bare)
    assert teacher_sampling(read_folder(embedded["ddim"])).sampler == "ddim"
    beside = tmp_path / "beside"  # a student of `tcd-s`: weights beside the network that this run has no place for
    shutil.copytree(embedded["lcm"].parent / "lcm-plain", beside)
    save_tensors(beside / CONDITIONING, {"told.parts.s.0.weight": torch.zeros(2, 2)}, {"format": "pt"})
    words = [*tiny_overrides, "student.kind=full", f"student.start={beside}"]
    with pytest.raises(UserError, match=r"student\.start"):
        api.distill("tcd", out=tmp_path / "no", teacher=beside, overrides=words)
