"""Networks with the landing as an input: a no-op at first, one set a role, and gradients through the hook."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fewstep.diffusion.denoiser import BASE, extended
from fewstep.diffusion.schedule import scaled_linear
from fewstep.diffusion.time_conditioning import ExtraEmbedding, ExtraEmbeddingHook, sinusoid
from fewstep.training.config import StudentConfig
from fewstep.training.student import Student, make_student
from fewstep_worlds.plane.mixture import ring
from fewstep_worlds.plane.network import PlaneHost, PlaneNetwork

PATH = scaled_linear()
B = 12


def number(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_sinusoid() -> None:
    wave = sinusoid(number([0.0, 3.0]), 4)
    assert wave[0].tolist() == [1, 1, 0, 0]
    slow = 3 * 10_000**-0.5
    assert wave[1].tolist() == pytest.approx([math.cos(3), math.cos(slow), math.sin(3), math.sin(slow)], abs=1e-6)


def test_the_embedding_starts_at_zero_and_depends_on_its_inputs() -> None:
    embedding = ExtraEmbedding(["s", "w"], 8, seed=1)
    extra = {"s": number([19.0, 999.0]), "w": number([2.0, 14.0])}
    assert torch.equal(embedding(extra), torch.zeros(2, 8))
    with pytest.raises(KeyError, match=r"takes \['s', 'w'\], not \['s'\]"):
        embedding({"s": extra["s"]})
    with torch.no_grad():
        for part in embedding.parts.values():
            part[-1].weight.normal_()  # type: ignore[index]
    plain = embedding(extra)
    for name in extra:
        other = embedding({**extra, name: extra[name] + 1})
        assert not torch.allclose(other, plain), name


def plane_student() -> tuple[PlaneHost, Student]:
    plane = PlaneHost(PlaneNetwork(ring(PATH), "eps", width=32))
    return plane, make_student(plane, StudentConfig(kind="full"), ("student", "target"), 3, ["s"])


def test_each_role_has_its_own_and_the_teacher_has_none() -> None:
    _, student = plane_student()
    assert set(student.extra_conditioning) == {"student", "target"}
    x, t = torch.randn(B, 2, generator=torch.Generator().manual_seed(0)), torch.full((B,), 499.0, dtype=torch.float64)
    here, there = (extended({}, s=torch.full((B,), s, dtype=torch.float64)) for s in (19.0, 399.0))
    call = student.call
    base = call(x, t, {}, BASE)
    for role in ("student", "target"):
        assert torch.equal(call(x, t, here, role), base), "a no-op at first"
    mine = student.parameters("student")
    assert any(name.startswith("extra_conditioning.parts.s.") for name in mine)
    assert mine.keys() == student.parameters("target").keys()
    with torch.no_grad():
        mine["extra_conditioning.parts.s.2.weight"].normal_(generator=torch.Generator().manual_seed(1))
        mine["leave.weight"].normal_(generator=torch.Generator().manual_seed(2))
    assert not torch.allclose(call(x, t, here, "student"), call(x, t, there, "student"))
    assert torch.equal(call(x, t, here, "target"), base)
    assert torch.equal(call(x, t, {}, BASE), base)


def test_gradients_reach_the_embedding_with_other_roles_between() -> None:
    _, student = plane_student()
    call, mine = student.call, student.parameters("student")
    with torch.no_grad():
        mine["leave.weight"].normal_(generator=torch.Generator().manual_seed(2))
    x, t = torch.randn(B, 2, generator=torch.Generator().manual_seed(0)), torch.full((B,), 499.0, dtype=torch.float64)
    extra = extended({}, s=torch.linspace(0, 400, B, dtype=torch.float64))
    out = call(x, t, extra, "student")
    with torch.no_grad():
        call(x, t, extra, "target")
        call(x, t, {}, BASE)
    out.square().sum().backward()
    grad = mine["extra_conditioning.parts.s.2.weight"].grad
    assert grad is not None
    assert float(grad.abs().sum()) > 0
    assert all(p.grad is None for p in student.parameters("target").values())


def test_the_hook_adds_inside_its_block_alone_and_can_be_removed() -> None:
    layer = torch.nn.Linear(3, 3)
    x = torch.ones(1, 3)
    plain = layer(x)
    ear = ExtraEmbeddingHook(layer)
    with ear.adding(torch.ones(1, 3)):
        torch.testing.assert_close(layer(x), plain + 1)
        with ear.adding(None):
            torch.testing.assert_close(layer(x), plain)
        torch.testing.assert_close(layer(x), plain + 1)
    torch.testing.assert_close(layer(x), plain)
    ear.close()
    with ear.adding(torch.ones(1, 3)):
        torch.testing.assert_close(layer(x), plain)


def test_a_student_with_s_as_input_is_trained_saved_and_sampled(
    tiny_overrides: list[str], tiny_cache: Path, tiny_pipeline: Path, tmp_path: Path
) -> None:
    """LoRA and full: the file beside it is read back, and the pictures are those of the student in memory."""
    import numpy as np

    from fewstep.common.errors import UserError
    from fewstep.distillation import distill as distillation
    from fewstep.distillation.config import resolve
    from fewstep.inference.generator import ImageGenerator, load_image_generator
    from fewstep.students.lora_file import CONDITIONING

    for kind in ("lora", "full"):
        words = [*tiny_overrides, f"student.kind={kind}", "optim.lr=0.02", "loop.steps=4"]
        config = resolve("tcd-s", None, words)
        out = distillation.distill(config, tmp_path / kind, cache=tiny_cache, quiet=True)
        folder = out if out.is_dir() else out.parent
        run = distillation.prepare(config, tiny_cache, torch.device("cpu"))
        from safetensors.torch import load_file, save_file

        trained = load_file(tmp_path / kind / "checkpoints" / "step-00000004" / "student.safetensors")
        extra = load_file(folder / CONDITIONING)
        assert float(extra["extra_conditioning.parts.s.2.weight"].abs().max()) > 0
        # files of earlier versions name these weights "told.": the student below is read from one
        old = {name.replace("extra_conditioning.", "told."): value for name, value in extra.items()}
        save_file(old, folder / CONDITIONING)
        with torch.no_grad():
            for name, parameter in run.student.parameters("student").items():
                parameter.copy_(trained[name])
        mine = ImageGenerator(run.backbone, run.denoiser, config.sampling, "student").draw(["a red disc"] * 2, [1, 2])
        image_generator = (
            load_image_generator(out, None) if kind == "full" else load_image_generator(tiny_pipeline, out)
        )
        theirs = image_generator.draw(["a red disc"] * 2, [1, 2])
        assert np.abs(mine.astype(int) - theirs.astype(int)).max() <= 2, "fp16 weights of the LoRA"
        (folder / CONDITIONING).unlink()
        with pytest.raises(UserError, match=r"conditioning\.safetensors"):
            load_image_generator(out, None) if kind == "full" else load_image_generator(tiny_pipeline, out)


EXTRA_W = ["method.extra_conditioning=[w]", "sampling.extra_conditioning=[w]", "sampling.w=5.0"]


ATTACHED = {
    "s": ("tcd-s", []),
    "ctm": ("ctm", []),
    "w": ("tcd", EXTRA_W),
    "lcm": ("lcm", EXTRA_W),
    "full": ("tcd-s", ["student.kind=full"]),
    "second": ("tcd-s", ["method.jump=second_order", "sampling.jump=second_order"]),
    "clean": ("tcd-s", ["method.end=clean", "sampling.end=clean"]),
}


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "words"), ATTACHED.values(), ids=ATTACHED)
def test_attached_to_a_diffusers_pipeline_it_draws_what_we_draw(
    recipe: str, words: list[str], tiny_overrides: list[str], tiny_cache: Path, tiny_pipeline: Path, tmp_path: Path
) -> None:
    """The pipeline passes eta = 0 and neither s nor w: gamma and the network's extra inputs come with the student."""
    import numpy as np
    from diffusers import StableDiffusionPipeline

    import fewstep
    from fewstep.common.errors import UserError
    from fewstep.distillation import distill as distillation
    from fewstep.distillation.config import resolve
    from fewstep.inference.generator import load_image_generator
    from fewstep.students.conditioning_file import read_extra_embeddings

    def student(recipe: str, words: list[str]) -> Path:
        config = resolve(recipe, None, [*tiny_overrides, "optim.lr=0.05", "loop.steps=3", *words])
        out = distillation.distill(config, tmp_path / recipe, cache=tiny_cache, quiet=True)
        return out if out.is_dir() else out.parent

    folder = student(recipe, words)
    whole = (folder / "model_index.json").is_file()
    pipe = StableDiffusionPipeline.from_pretrained(folder if whole else tiny_pipeline, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    if not whole:
        own = pipe.scheduler
        pipe.scheduler = type(own).from_config({**own.config, "beta_schedule": "linear"})
        with pytest.raises(UserError, match="sigmas") as refused:
            fewstep.attach(pipe, folder)
        assert refused.value.field == "student"
        pipe.scheduler = own
    fewstep.attach(pipe, folder)

    def theirs() -> np.ndarray:
        drawn = pipe(
            "a red disc",
            num_inference_steps=image_generator.sampling.steps // image_generator.sampling.calls_a_step,
            guidance_scale=0,
            generator=torch.Generator("cpu").manual_seed(7),
            output_type="np",
        )
        return drawn.images[0] * 255

    image_generator = load_image_generator(folder) if whole else load_image_generator(tiny_pipeline, folder)
    ours = image_generator.draw(["a red disc"], [7])[0].astype(float)
    np.testing.assert_allclose(theirs(), ours, atol=1.01)
    extra = image_generator.sampling.extra_conditioning
    embedding = read_extra_embeddings(folder, extra, pipe.unet.time_embedding.linear_2.out_features)
    assert embedding is not None
    assert float(embedding({extra[0]: number([499.0])}).abs().max()) > 0
    if recipe != "lcm":
        other = image_generator.sampling.model_copy(update={"gamma": 0.7})
        assert np.abs(image_generator.draw(["a red disc"], [7], other)[0].astype(float) - ours).max() > 1, (
            "gamma matters"
        )
    if "w" in extra:
        other = image_generator.sampling.model_copy(update={"w": 12.0})
        assert np.abs(image_generator.draw(["a red disc"], [7], other)[0].astype(float) - ours).max() > 1, "w matters"
    with pytest.raises(UserError, match="pipe has a student attached already"):
        fewstep.attach(pipe, folder)
    if whole:  # saved with our scheduler on, it loads again, and draws once the student is attached again
        before = theirs()
        pipe.save_pretrained(tmp_path / "saved")
        pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "saved", local_files_only=True)
        pipe.set_progress_bar_config(disable=True)
        with pytest.raises(UserError, match="attach"):
            theirs()
        fewstep.attach(pipe, folder)
        np.testing.assert_array_equal(theirs(), before)


def test_what_cannot_be_attached_is_refused(
    tiny_overrides: list[str], tiny_cache: Path, tiny_pipeline: Path, tmp_path: Path
) -> None:
    from types import SimpleNamespace

    from diffusers import UNet2DConditionModel

    import fewstep
    from fewstep.common.errors import UserError
    from fewstep.distillation import distill as distillation
    from fewstep.distillation.config import resolve

    unet = UNet2DConditionModel.from_pretrained(tiny_pipeline / "unet", local_files_only=True)
    pipe = SimpleNamespace(unet=unet, load_lora_weights=pytest.fail)
    plain = distillation.distill(
        resolve("tcd", None, [*tiny_overrides, "loop.steps=1"]), tmp_path / "plain", cache=tiny_cache, quiet=True
    )
    with pytest.raises(UserError, match="no extra conditioning") as refused:
        fewstep.attach(pipe, plain.parent)
    assert refused.value.field == "student"
    with pytest.raises(UserError, match="pipe is a SimpleNamespace, whose network is no UNet"):
        fewstep.attach(SimpleNamespace(transformer=unet, load_lora_weights=pytest.fail), tmp_path / "plain" / "student")
    other = UNet2DConditionModel.from_config(dict(unet.config) | {"cross_attention_dim": 8})
    good = distillation.distill(
        resolve("tcd-s", None, [*tiny_overrides, "loop.steps=1"]), tmp_path / "good", cache=tiny_cache, quiet=True
    )
    with pytest.raises(UserError, match="is for another base"):
        fewstep.attach(SimpleNamespace(unet=other, load_lora_weights=pytest.fail), good.parent)
