"""A student that is told where it lands, or the guidance it stands for, in a diffusers pipeline.

Plain diffusers loads such a student's LoRA, but has nobody who tells it: no stock pipeline passes s or w. `attach`
loads the LoRA, puts in a scheduler that knows where each jump lands, and lets the network hear it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import LCMScheduler, TCDScheduler

# diffusers finds out how a saved component is loaded by the base classes that the component's own module holds
from diffusers.schedulers.scheduling_utils import SchedulerMixin as SchedulerMixin
from torch import Tensor

from fewstep.common.arguments import checked
from fewstep.common.errors import UserError
from fewstep.diffusion.config import Sampling
from fewstep.diffusion.samplers import check_gamma
from fewstep.diffusion.time_conditioning import ExtraEmbedding, ExtraEmbeddingHook
from fewstep.students.conditioning_file import read_extra_embeddings
from fewstep.students.lora_checks import check_fits, check_noise
from fewstep.students.lora_file import student_of_run
from fewstep.students.lora_header import LoraHeader, read_header
from fewstep.students.sampling import sampling_of


class ToldTCDScheduler(TCDScheduler):  # type: ignore[misc]
    """diffusers' TCDScheduler with a gamma of its own, so that it is known before the network is called.

    A pipeline's `eta`, 0 by default, is not listened to.
    """

    gamma: float = 0.3
    attached: bool = False
    """Whether `attach` has set the pipeline up; a pipeline that was saved and loaded again needs that anew."""

    def landing(self, t: Tensor) -> int:
        """The index that the jump from timestep t lands at: floor((1 - gamma) t_next), or 0 after the last one."""
        times = self.timesteps.tolist()
        place = times.index(int(t))
        following = times[place + 1] if place + 1 < len(times) else 0
        return int((1 - self.gamma) * following + 1e-9)

    def step(
        self, model_output: Tensor, timestep: Any, sample: Tensor, eta: float = 0.0, generator: Any = None, **more: Any
    ) -> Any:
        """As diffusers', at this scheduler's own gamma. Pipelines look for `eta` and `generator` by name.

        Raises:
            UserError: nothing tells the network where this step lands.
        """
        if not self.attached:
            raise UserError(
                "the pipeline's student is not attached; call fewstep.attach(pipe, student) after loading it"
            )
        return super().step(model_output, timestep, sample, eta=self.gamma, generator=generator, **more)


class _Teller:
    """Tells a network before each of its calls, and falls silent after it."""

    def __init__(self, pipe: Any, embedding: ExtraEmbedding, w: float | None) -> None:
        self.pipe, self.embedding, self.w = pipe, embedding, w
        self.ear = ExtraEmbeddingHook(pipe.unet.time_embedding)

    def before(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        sample = args[0] if args else kwargs["sample"]
        t = torch.as_tensor(args[1] if len(args) > 1 else kwargs["timestep"]).flatten()[0]
        told = {"w": self.w or 0.0}
        if "s" in self.embedding.parts:
            told["s"] = float(self.pipe.scheduler.landing(t))
        self.embedding.to(sample.device)  # the pipeline may have moved since
        wanted = {name: torch.full((len(sample),), told[name], dtype=torch.float64) for name in self.embedding.parts}
        self.ear.addition = self.embedding(wanted)

    def after(self, *_: Any) -> None:
        self.ear.addition = None


def _check_scheduler(sampling: Sampling, gamma: float, name: str) -> None:
    """Refuse what neither diffusers' TCDScheduler nor its LCMScheduler does.

    Raises:
        UserError: naming what the nearer of them does instead.
    """
    law = sampling.gamma_law if gamma else "time"  # without noise both laws are one
    by_index = sampling.grid if isinstance(sampling.grid, int) else 50
    asked: dict[str, tuple[object, object]] = {"grid": (sampling.grid, by_index), "spacing": (sampling.spacing, "grid")}
    if sampling.sampler == "lcm":
        scheduler = "LCMScheduler"
        asked |= {"jump": (sampling.step_jump, "skip")}
    else:
        scheduler = "TCDScheduler"
        asked |= {
            "sampler": (sampling.sampler, "sss"),
            "jump": (sampling.step_jump, "first_order"),
            "gamma_law": (law, "time"),
            "end": (sampling.end, "index0"),
        }
    for field, (value, legal) in asked.items():
        if value != legal:
            raise UserError(
                f"student = {name!r} is sampled with {field} = {value!r}, which {scheduler} is not; "
                f"the nearest that can be attached is {legal!r}"
            )


def _read_student(pipe: Any, student: Path) -> tuple[Sampling, Path, LoraHeader | None]:
    """How a student is sampled, where it lies, and its LoRA's header; None for one that is the pipeline itself."""
    if (student / "model_index.json").is_file():
        return sampling_of(student) or Sampling(), student, None
    # other LoRAs may be loaded already: PEFT then keeps the base's layers under another name
    named = {name.replace(".base_layer", ""): value for name, value in pipe.unet.state_dict().items()}
    weights = {name: tuple(value.shape) for name, value in named.items() if "lora_" not in name}
    header = read_header(student, weights)
    check_fits(header, weights, header.base)  # by shapes: a pipeline in memory has no files to compare
    return header.sampling or Sampling(), header.file, header


@checked
def attach(pipe: Any, student: Path | str, *, gamma: float | None = None) -> Any:
    """Make a diffusers Stable Diffusion pipeline run a student that is told where it lands, or its guidance.

    Then `pipe(prompt, num_inference_steps=4, guidance_scale=0)`; gamma is the student's own unless it is given here.

    Args:
        pipe: a StableDiffusionPipeline of the student's base; of the student's own folder, if that is a whole pipeline.
        student: folder with its LoRA and `conditioning.safetensors`, or that whole pipeline's.

    Returns:
        the same pipeline.

    Raises:
        UserError: not such a student, one of another base or noise, one that no scheduler of diffusers samples, or a
            pipeline that has a student already.
    """
    if not hasattr(pipe, "unet"):
        raise UserError(
            f"pipe is a {type(pipe).__name__}, whose network is no UNet; the nearest way to draw with "
            f"student = {str(student)!r} is `fewstep sample`"
        )
    if getattr(pipe, "_fewstep_teller", None) is not None:
        raise UserError("pipe has a student attached already; load a fresh pipeline for another one")
    sampling, place, header = _read_student(pipe, student_of_run(Path(student)))
    # the pipeline itself passes w, from its guidance_scale, to a UNet that embeds it
    embedded = pipe.unet.config.time_cond_proj_dim is not None
    beside = tuple(name for name in sampling.extra_conditioning if name != "w" or not embedded)
    if not beside:
        raise UserError(
            f"student = {str(student)!r} is told nothing; plain diffusers and its scheduler are all it needs"
        )
    strength = check_gamma(sampling.gamma if gamma is None else gamma)
    _check_scheduler(sampling, strength, str(student))
    if header is not None:
        check_noise(header, pipe.scheduler.config, "pipe")
    embedding = read_extra_embeddings(place, beside, int(pipe.unet.time_embedding.linear_2.out_features))
    assert embedding is not None
    if header is not None:
        pipe.load_lora_weights(str(header.file.parent), weight_name=header.file.name)
    keep = {**pipe.scheduler.config, "original_inference_steps": sampling.grid}
    if sampling.sampler == "lcm":
        pipe.scheduler = LCMScheduler.from_config(keep)
    else:
        pipe.scheduler = ToldTCDScheduler.from_config(keep)
        pipe.scheduler.gamma, pipe.scheduler.attached = strength, True
    teller = pipe._fewstep_teller = _Teller(pipe, embedding, sampling.w)
    pipe.unet.register_forward_pre_hook(teller.before, with_kwargs=True)
    pipe.unet.register_forward_hook(teller.after)
    return pipe
