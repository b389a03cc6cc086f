"""Students with extra conditioning (the landing s, the guidance w) in a diffusers pipeline.

Plain diffusers loads the LoRA of such a student, but no stock pipeline passes s or w. `attach` loads the LoRA, sets a
scheduler that provides the landing of each jump, and adds the extra embedding to the network's time embedding.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import torch

# diffusers finds the loader of a saved component by the base classes in the component's own module
from diffusers.schedulers.scheduling_utils import SchedulerMixin as SchedulerMixin
from torch import Tensor, nn

from fewstep.backbones.families import FAMILIES
from fewstep.backbones.pipeline_folder import index_file
from fewstep.common.arguments import checked
from fewstep.common.errors import UserError
from fewstep.diffusion.time_conditioning import ExtraEmbedding, ExtraEmbeddingHook, embedding_width
from fewstep.inference.pipeline import make_scheduler, read_student
from fewstep.inference.schedulers.base import FewStepScheduler
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


def denoiser_of(pipe: Any) -> tuple[nn.Module, nn.Module]:
    """Return a pipeline's network, and the module of it that embeds the time.

    Raises:
        UserError: a pipeline whose network this library does not know.
    """
    network: Any = getattr(pipe, "unet", None)
    if network is not None:
        return network, network.time_embedding
    kind = type(pipe).__name__
    if kind not in FAMILIES:
        raise UserError(
            f"pipe is a {kind}, whose network is no UNet, nor one of {', '.join(FAMILIES)}; draw with `fewstep sample`",
            field="pipe",
        )
    module, name = FAMILIES[kind].backbone.split(":")
    network = getattr(pipe, FAMILIES[kind].network)
    return network, network.get_submodule(getattr(import_module(module), name).time_embedder)


def _read_lora(network: nn.Module, student: Path) -> LoraHeader | None:
    """Read and check the header of a student's LoRA; None for a student that is a whole pipeline."""
    if index_file(student).is_file():
        return None
    # PEFT renames the base's layers where other LoRAs are loaded already
    named = {name.replace(".base_layer", ""): value for name, value in network.state_dict().items()}
    weights = {name: tuple(value.shape) for name, value in named.items() if "lora_" not in name}
    header = read_header(student, weights)
    check_fits(header, weights, header.base)  # by shapes: a pipeline in memory has no files to compare
    return header


@checked
def attach(pipe: Any, student: Path | str, *, gamma: float | None = None) -> Any:
    """Make a diffusers pipeline run a student with extra conditioning (s or w).

    Then call `pipe(prompt, num_inference_steps=4, guidance_scale=0)`. On a flow `flow_map_scheduler_for` returns
    diffusers' own scheduler for it.

    Args:
        pipe: a pipeline of the student's base, or of the student's own folder if that is a pipeline.
        student: folder with its LoRA and `conditioning.safetensors`, or a whole pipeline folder.
        gamma: stochasticity; the student's own by default.

    Returns:
        the same pipeline.

    Raises:
        UserError: not such a student, one of another base or noise, one that is sampled with a solver, or a pipeline
            that has a student already.
    """
    network, time_embedding = denoiser_of(pipe)
    if hasattr(pipe, "_fewstep_hook"):
        raise UserError("pipe has a student attached already; load a fresh pipeline for another one", field="pipe")
    place = student_of_run(Path(student))
    header, (record, sampling) = _read_lora(network, place), read_student(place)
    # the pipeline itself passes w, from its guidance_scale, to a UNet that embeds it
    embedded = getattr(network.config, "time_cond_proj_dim", None) is not None
    extra = tuple(name for name in sampling.extra_conditioning if name != "w" or not embedded)
    if not extra:
        raise UserError(
            f"student = {str(student)!r} has no extra conditioning; use it in plain diffusers with "
            "fewstep.scheduler_for"
        )
    scheduler = make_scheduler(record, sampling, pipe.scheduler.config, gamma, str(student), sss=AttachedScheduler)
    file = place if header is None else header.file
    embedding = read_extra_embeddings(file, extra, embedding_width(time_embedding))
    assert embedding is not None
    if header is not None:
        pipe.load_lora_weights(str(header.file.parent), weight_name=header.file.name)
    scheduler.attached = True
    pipe.scheduler = scheduler
    _condition(pipe, embedding, sampling.w or 0.0)
    return pipe


def landing_of(scheduler: Any, timestep: Any = None) -> float:
    """Return the landing s of the network call that is due, in training indices: on a flow 1000 sigma.

    Args:
        scheduler: ours, or a deterministic one of diffusers, whose step ends at the next of its sigmas.
        timestep: of the call, on the scale of `timesteps`; None where a pipeline scales it.
    """
    if isinstance(scheduler, FewStepScheduler):
        return scheduler.landing(timestep)
    place = scheduler.step_index if scheduler.step_index is not None else scheduler.begin_index or 0
    return float(scheduler.sigmas[place + 1]) * float(scheduler.config.num_train_timesteps)


def _condition(pipe: Any, embedding: ExtraEmbedding, w: float) -> None:
    """Add the embedding of s and w to the time embedding of the pipeline's network in each of its calls."""
    network, time_embedding = denoiser_of(pipe)
    hook = pipe._fewstep_hook = ExtraEmbeddingHook(time_embedding)

    def before(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        sample = args[0] if args else kwargs["sample" if "sample" in kwargs else "hidden_states"]
        values = {"w": w}
        if "s" in embedding.parts:
            unet = hasattr(pipe, "unet")  # transformers take scaled times
            timestep = (args[1] if len(args) > 1 else kwargs["timestep"]) if unet else None
            values["s"] = landing_of(pipe.scheduler, timestep)
        first = sample[0] if isinstance(sample, list) else sample  # Z-Image's network takes a list of pictures
        embedding.to(first.device)  # the pipeline may have moved since
        hook.addition = embedding(
            {n: torch.full((len(sample),), values[n], dtype=torch.float64) for n in embedding.parts}
        )

    def after(*_: Any) -> None:
        hook.addition = None

    network.register_forward_pre_hook(before, with_kwargs=True)
    network.register_forward_hook(after)
