"""Students with extra conditioning (the landing s, the guidance w) in a diffusers pipeline.

Plain diffusers loads the LoRA of such a student, but no stock pipeline passes s or w. `attach` loads the LoRA, sets a
scheduler that provides the landing of each jump, and adds the extra embedding to the network's time embedding.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

# diffusers finds the loader of a saved component by the base classes in the component's own module
from diffusers.schedulers.scheduling_utils import SchedulerMixin as SchedulerMixin
from torch import Tensor

from fewstep.common.arguments import checked
from fewstep.common.errors import UserError
from fewstep.diffusion.time_conditioning import ExtraEmbedding, ExtraEmbeddingHook
from fewstep.inference.pipeline import make_scheduler, read_student
from fewstep.inference.schedulers.few_step import SSSScheduler
from fewstep.students.conditioning_file import read_extra_embeddings
from fewstep.students.lora_checks import check_fits
from fewstep.students.lora_file import student_of_run
from fewstep.students.lora_header import LoraHeader, read_header


class AttachedScheduler(SSSScheduler):
    """SSSScheduler of an attached student. A saved pipeline refuses to draw until `attach` is called again."""

    attached = False

    def step(
        self, model_output: Tensor, timestep: Any, sample: Tensor, generator: Any = None, return_dict: bool = True
    ) -> Any:  # pipelines pass the arguments that they find in the signature
        """Make one step, see `FewStepScheduler.step`.

        Raises:
            UserError: the student is not attached, so that its network would receive neither s nor w.
        """
        if not self.attached:
            raise UserError(
                "the pipeline's student is not attached; call fewstep.attach(pipe, student) after loading it"
            )
        return super().step(model_output, timestep, sample, generator, return_dict)


def _read_lora(pipe: Any, student: Path) -> LoraHeader | None:
    """Read and check the header of a student's LoRA; None for a student that is a whole pipeline."""
    if (student / "model_index.json").is_file():
        return None
    # PEFT renames the base's layers where other LoRAs are loaded already
    named = {name.replace(".base_layer", ""): value for name, value in pipe.unet.state_dict().items()}
    weights = {name: tuple(value.shape) for name, value in named.items() if "lora_" not in name}
    header = read_header(student, weights)
    check_fits(header, weights, header.base)  # by shapes: a pipeline in memory has no files to compare
    return header


@checked
def attach(pipe: Any, student: Path | str, *, gamma: float | None = None) -> Any:
    """Make a diffusers Stable Diffusion pipeline run a student with extra conditioning (s or w).

    Then call `pipe(prompt, num_inference_steps=4, guidance_scale=0)`.

    Args:
        pipe: a StableDiffusionPipeline of the student's base, or of the student's own folder if that is a pipeline.
        student: folder with its LoRA and `conditioning.safetensors`, or a whole pipeline folder.
        gamma: stochasticity; the student's own by default.

    Returns:
        the same pipeline.

    Raises:
        UserError: not such a student, one of another base or noise, one that is sampled with a solver, or a pipeline
            that has a student already.
    """
    if not hasattr(pipe, "unet"):
        raise UserError(
            f"pipe is a {type(pipe).__name__}, whose network is no UNet; draw with `fewstep sample`", field="pipe"
        )
    if hasattr(pipe, "_fewstep_hook"):
        raise UserError("pipe has a student attached already; load a fresh pipeline for another one", field="pipe")
    place = student_of_run(Path(student))
    header, (record, sampling) = _read_lora(pipe, place), read_student(place)
    # the pipeline itself passes w, from its guidance_scale, to a UNet that embeds it
    embedded = pipe.unet.config.time_cond_proj_dim is not None
    extra = tuple(name for name in sampling.extra_conditioning if name != "w" or not embedded)
    if not extra:
        raise UserError(
            f"student = {str(student)!r} has no extra conditioning; use it in plain diffusers with "
            "fewstep.scheduler_for"
        )
    scheduler = make_scheduler(record, sampling, pipe.scheduler.config, gamma, str(student), sss=AttachedScheduler)
    file = place if header is None else header.file
    embedding = read_extra_embeddings(file, extra, int(pipe.unet.time_embedding.linear_2.out_features))
    assert embedding is not None
    if header is not None:
        pipe.load_lora_weights(str(header.file.parent), weight_name=header.file.name)
    scheduler.attached = True
    pipe.scheduler = scheduler
    _condition(pipe, embedding, sampling.w or 0.0)
    return pipe


def _condition(pipe: Any, embedding: ExtraEmbedding, w: float) -> None:
    """Add the embedding of s and w to the time embedding of the pipeline's UNet in each of its calls."""
    hook = pipe._fewstep_hook = ExtraEmbeddingHook(pipe.unet.time_embedding)

    def before(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        sample = args[0] if args else kwargs["sample"]
        values = {"w": w}
        if "s" in embedding.parts:
            values["s"] = pipe.scheduler.landing(args[1] if len(args) > 1 else kwargs["timestep"])
        embedding.to(sample.device)  # the pipeline may have moved since
        hook.addition = embedding(
            {n: torch.full((len(sample),), values[n], dtype=torch.float64) for n in embedding.parts}
        )

    def after(*_: Any) -> None:
        hook.addition = None

    pipe.unet.register_forward_pre_hook(before, with_kwargs=True)
    pipe.unet.register_forward_hook(after)
