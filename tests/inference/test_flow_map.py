"""A flow student that takes s, in a diffusers pipeline with diffusers' own flow map scheduler."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fewstep
from fewstep.common.errors import UserError
from fewstep.distillation.config import resolve
from fewstep.distillation.distill import distill
from fewstep.inference.generator import load_image_generator
from support import tiny_pipelines

WORDS = ["device=cpu", "student.rank=2", "loop.batch=2", "loop.steps=2", "loop.validate_every=null", "optim.lr=0.05"]


@pytest.mark.parametrize("family", [pytest.param("sd3", marks=pytest.mark.slow), "sana"])
def test_it_draws_what_we_draw(family: str, tmp_path: Path, picture_folder: Path, tiny_cache: Path) -> None:
    """By the scheduler that `attach` sets, and by FlowMapEulerDiscreteScheduler, whose next sigma the network gets."""
    import diffusers

    teacher = tiny_pipelines.FAMILIES[family](tmp_path / "teacher")
    words = [*WORDS, f"teacher={teacher}", f"data.source={picture_folder}"]
    student = distill(resolve("meanflow", None, words), tmp_path / "run", cache=tiny_cache, quiet=True).parent
    generator = load_image_generator(teacher, student)
    pipe: Any = diffusers.DiffusionPipeline.from_pretrained(teacher)
    pipe.set_progress_bar_config(disable=True)
    fewstep.attach(pipe, student)

    def drawn(scheduler: Any, steps: int) -> tuple[np.ndarray, np.ndarray]:
        pipe.scheduler = scheduler
        theirs = pipe(
            "a red disc",
            num_inference_steps=steps,
            guidance_scale=1.0,
            generator=torch.Generator().manual_seed(7),
            output_type="latent",
            height=generator.backbone.picture_size,
            width=generator.backbone.picture_size,
            **({"use_resolution_binning": False} if family == "sana" else {}),
        ).images
        sampling = generator.sampling.model_copy(update={"steps": steps})
        ours = generator.latents(generator.encode(["a red disc"]), [7], sampling)
        return theirs.float().numpy(), ours.numpy()

    for scheduler in (pipe.scheduler, fewstep.flow_map_scheduler_for(student)):
        for steps in (2, 4):
            theirs, ours = drawn(scheduler, steps)
            np.testing.assert_allclose(theirs, ours, atol=1e-4 * np.abs(ours).max())
    pipe._fewstep_hook.close()
    theirs, ours = drawn(scheduler, 4)
    assert np.abs(theirs - ours).max() > 1e-3 * np.abs(ours).max(), "s matters"
    file, _ = fewstep.export_as(student, "diffusers", out=tmp_path / "export", teacher=teacher)
    assert 'fewstep.flow_map_scheduler_for("export")' in (file.parent / "README.md").read_text(encoding="utf-8")
    assert fewstep.flow_map_scheduler_for(file.parent).config.shift == scheduler.config.shift


@pytest.mark.slow
def test_other_students_are_refused(tiny_overrides: list[str], tiny_cache: Path, tmp_path: Path) -> None:
    words = [*tiny_overrides, "loop.steps=1"]
    for name, recipe in {"path": "tcd-s", "extra_conditioning": "tcd"}.items():
        student = distill(resolve(recipe, None, words), tmp_path / name, cache=tiny_cache, quiet=True)
        with pytest.raises(UserError) as error:
            fewstep.flow_map_scheduler_for(student.parent)
        assert error.value.field == "student"
