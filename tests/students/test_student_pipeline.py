"""A student's own settings, read back by the two lines that the docs give."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import fewstep
from fewstep.backbones.pipeline_folder import read_folder
from fewstep.common.errors import UserError
from fewstep.common.safetensors_header import read_safetensors_header
from fewstep.distillation import distill as distillation
from fewstep.distillation.config import resolve
from fewstep.inference.generator import load_image_generator
from fewstep.students.lora_checks import check_lora
from support import tiny_pipelines

PROMPTS = ["a red disc", "blue"]
SEEDS = [1, 2]
RECIPES: dict[str, list[str]] = {
    "tcd": ["sampling.steps=3", "sampling.gamma=0.6"],
    "lcm": ["sampling.steps=2"],
    "tcd-2": ["sampling.steps=4"],
    "mcm": ["sampling.steps=4"],
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: tiny_pipelines.FAMILIES[name](tmp_path_factory.mktemp(name) / "tiny") for name in ("sd", "flux")}


def trained(folder: Path, recipe: str, more: list[str], picture_folder: Path, out: Path) -> Path:
    words = [
        f"teacher={folder}", f"data.source={picture_folder}", "device=cpu", "student.rank=2", "loop.steps=2",
        "loop.batch=2", "loop.validate_every=null", "optim.lr=1e-2", "optim.ema=null", "optim.warmup=0", *more,
    ]  # fmt: skip
    return distillation.distill(resolve(recipe, None, words), out, quiet=True).parent


@pytest.mark.parametrize("recipe", RECIPES)
def test_two_lines_draw_what_we_draw(
    recipe: str, folders: dict[str, Path], picture_folder: Path, tmp_path: Path
) -> None:
    import diffusers

    student = trained(folders["sd"], recipe, RECIPES[recipe], picture_folder, tmp_path / "run")
    image_generator = load_image_generator(folders["sd"], student)
    wanted = image_generator.latents(image_generator.encode(PROMPTS), SEEDS, image_generator.sampling)
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folders["sd"], safety_checker=None, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(str(student))
    pipe.scheduler = fewstep.scheduler_for(student, pipe.scheduler.config)
    calls: list[float] = []
    pipe.unet.register_forward_pre_hook(lambda _, args: calls.append(float(args[1])))
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in SEEDS]
    drawn = pipe(PROMPTS, generator=generators, output_type="latent", **fewstep.call_settings(student)).images
    assert float((drawn - wanted).abs().max()) < 1e-4 * float(wanted.abs().max())
    assert len(calls) == image_generator.sampling.steps


def test_the_metadata_of_a_file(folders: dict[str, Path], picture_folder: Path, tmp_path: Path) -> None:
    """Method, steps and exact times, gamma, guidance and its convention, prediction, end point, base model."""
    student = trained(
        folders["flux"], "tcd", ["sampling.steps=4", "sampling.gamma=0.2"], picture_folder, tmp_path / "r"
    )
    (file,) = student.glob("*.safetensors")
    record: dict[str, Any] = json.loads(read_safetensors_header(file)[0]["fewstep"])
    assert record["method"] == "tcd"
    assert record["base_model"] == {"pipeline": "FluxPipeline", "family": "flux"}
    assert (record["prediction"], record["path"]) == ("flow", "flow")
    # Flux's shift goes by the picture's size: 16 tokens at the trained one
    shift = math.exp(0.5 + (1.15 - 0.5) * (16 - 256) / (4096 - 256))
    assert record["shift"] == pytest.approx(shift)
    shifted = [shift * u / (1 + (shift - 1) * u) * 1000 for u in (1.0, 0.76, 0.5, 0.26)]  # 4 of 50 points
    assert record["times"] == pytest.approx(shifted, abs=1e-4)
    assert record["guidance"] == {"omega": 0.0, "scale": 3.5, "told": True}
    assert (record["sampling"]["steps"], record["sampling"]["gamma"], record["sampling"]["end"]) == (4, 0.2, "index0")
    assert fewstep.call_settings(student) == {"num_inference_steps": 4, "guidance_scale": 3.5}
    scheduler = fewstep.scheduler_for(student, {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0})
    scheduler.set_timesteps(4, mu=1.15)  # as a pipeline passes it at another size: the student's times stay
    assert scheduler.timesteps.tolist() == pytest.approx(shifted, abs=1e-3)
    assert fewstep.scheduler_for(student, scheduler.config, gamma=0.0).config["gamma"] == 0.0


def test_a_whole_student_brings_its_settings_too(
    folders: dict[str, Path], picture_folder: Path, tmp_path: Path
) -> None:
    student = trained(
        folders["sd"], "tcd", ["student.kind=full", "sampling.steps=2"], picture_folder, tmp_path / "run"
    ) / "student"  # fmt: skip
    assert fewstep.call_settings(student) == {"num_inference_steps": 2, "guidance_scale": 1.0}


def test_a_scheduler_of_other_noise_is_refused(folders: dict[str, Path], picture_folder: Path, tmp_path: Path) -> None:
    """A file's prediction, path and times are held against what they would be in the pipeline."""
    student = trained(folders["sd"], "tcd", ["sampling.steps=4"], picture_folder, tmp_path / "run")
    config = json.loads((folders["sd"] / "scheduler" / "scheduler_config.json").read_text())
    flow = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
    for other, words in (
        ({**config, "prediction_type": "v_prediction"}, "has prediction = 'eps', the pipeline's scheduler 'v'"),
        (flow, "has prediction = 'eps', the pipeline's scheduler 'flow'"),
        ({**config, "num_train_timesteps": 500}, r"has times 999, .*, the pipeline's scheduler 499, "),
        (
            {**config, "beta_schedule": "linear"},
            r"has sigmas = 0\.997667 at time 999; .* = 'linear'.* make it 0\.99\d+",
        ),
    ):
        with pytest.raises(UserError, match=words):
            fewstep.scheduler_for(student, other)
    assert fewstep.scheduler_for(student, config, gamma=0.5).config["gamma"] == 0.5
    consistency = trained(folders["sd"], "lcm", [], picture_folder, tmp_path / "lcm")
    with pytest.raises(UserError, match=r"gamma = 0\.5 has no effect"):
        fewstep.scheduler_for(consistency, config, gamma=0.5)


@pytest.mark.parametrize("zero", [False, True])
def test_zero_terminal_snr_on_one_side_alone_is_refused(zero: bool, picture_folder: Path, tmp_path: Path) -> None:
    """Prediction and times are equal, only the noise differs, as at a call at 999."""
    folder = tiny_pipelines.sd(tmp_path / "tiny", "v_prediction", zero_snr=zero)
    student = trained(folder, "tcd", ["sampling.steps=1"], picture_folder, tmp_path / "run")
    file = next(student.glob("*.safetensors"))
    metadata, _ = read_safetensors_header(file)
    record = json.loads(metadata["fewstep"])
    assert record["sigmas"] == pytest.approx([1.0 if zero else 0.997667], abs=1e-5)
    place = folder / "scheduler" / "scheduler_config.json"
    config = json.loads(place.read_text())
    fewstep.scheduler_for(student, config)
    other = {**config, "rescale_betas_zero_snr": not zero}
    place.write_text(json.dumps(other))
    words = rf"sigmas = .* at time 999; .*rescale_betas_zero_snr = {not zero} make it"
    with pytest.raises(UserError, match=f"has {words}") as error:
        fewstep.scheduler_for(student, other)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=f"was trained at {words}"):
        check_lora(student, read_folder(folder))
    # earlier files lack it, and are accepted
    older = {**metadata, "fewstep": json.dumps({key: value for key, value in record.items() if key != "sigmas"})}
    save_file(load_file(file), file, older)
    fewstep.scheduler_for(student, other)
    check_lora(student, read_folder(folder))


def test_a_lora_on_its_base_under_another_scheduler_is_refused(
    folders: dict[str, Path], picture_folder: Path, tmp_path: Path
) -> None:
    """The weights are the same; the noise that they were trained on is not."""
    for name, changes, words in (
        ("sd", {"prediction_type": "v_prediction"}, "was trained at prediction = 'eps'; .* has 'v'"),
        ("sd", {"beta_schedule": "linear"}, r"was trained at sigmas = 0\.997667 at time 999; .* 'linear'.* make"),
        ("flux", {"use_dynamic_shifting": False}, r"was trained at shift = 1\.58\d*; .* has 3\.0"),
    ):
        own = tmp_path / "-".join([name, *changes])
        student = trained(folders[name], "tcd", ["sampling.steps=2"], picture_folder, own / "run")
        other = own / "other"
        shutil.copytree(folders[name], other)
        config = other / "scheduler" / "scheduler_config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), **changes}))
        check_lora(student, read_folder(folders[name]))
        with pytest.raises(UserError, match=words):
            check_lora(student, read_folder(other))


def test_what_brings_no_settings_is_refused(tmp_path: Path) -> None:
    save_file({"unet.x.lora_A.weight": torch.zeros(1, 1)}, tmp_path / "pytorch_lora_weights.safetensors")
    with pytest.raises(UserError, match="no settings"):
        fewstep.call_settings(tmp_path)
    with pytest.raises(UserError, match=r"does not exist|holds no"):
        fewstep.scheduler_for(tmp_path / "nothing", {})
