"""Who draws: the base, or it with a student's LoRA, in diffusers' own pipelines; and how each add-on is put in."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fewstep.backbones.base import loading
from fewstep.diffusion.grid import TLCM_TIMES
from fewstep.inference.pipeline import call_settings, sampling_of_student, scheduler_for
from fewstep.students.lora_header import FILE

BATCH = 32


@dataclass(frozen=True)
class Who:
    """One column of the figure.

    Attributes:
        name: of the column.
        lora: the student's; None for the base alone.
        steps: network calls.
        scale: guidance in diffusers' words, of the base.
    """

    name: str
    lora: Path | None
    steps: int
    scale: float = 1.0

    @property
    def label(self) -> str:
        """Name and calls."""
        return f"{self.name} {self.steps}"


def pipeline(
    kind: str, folder: Path, who: Who, parts: Mapping[str, Any] | None = None, gamma: float | None = None
) -> Any:
    """A pipeline of diffusers with who draws in it: the student's LoRA and scheduler, or DDIM.

    Args:
        kind: of pipeline, by its class name.
        folder: the checkpoint.
        parts: further components, ControlNets say.
        gamma: of a student's sampler, where it shall not be the student's own.
    """
    import diffusers

    with loading(str(folder)), redirect_stderr(StringIO()):  # its warnings are about classes, which are meant
        pipe = getattr(diffusers, kind).from_pretrained(
            folder, safety_checker=None, local_files_only=True, use_safetensors=True, **(parts or {})
        )
    pipe.set_progress_bar_config(disable=True)
    if who.lora is None:
        pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    else:
        place = who.lora / FILE if who.lora.is_dir() else who.lora
        pipe.load_lora_weights(str(place.parent), weight_name=place.name, adapter_name="student")
        pipe.scheduler = scheduler_for(who.lora, pipe.scheduler.config, gamma)
    return pipe


def asked(who: Who, strength: float = 1.0) -> dict[str, Any]:
    """What the pipeline is called with: guidance, and as many steps as leave `who.steps` calls below a strength."""
    scale = who.scale if who.lora is None else call_settings(who.lora)["guidance_scale"]
    return {"guidance_scale": scale, "num_inference_steps": math.ceil(who.steps / strength)}


def can_draw(who: Who, strength: float) -> bool:
    """Whether there are times for as many calls below a strength: TLCM's grid and lists have 8 in all."""
    if who.lora is None or strength == 1:
        return True
    own = sampling_of_student(who.lora)
    points = own.grid if isinstance(own.grid, int) else len(own.grid)
    most = {"tlcm": max(TLCM_TIMES), "grid": points}.get(own.spacing, math.inf)
    return math.ceil(who.steps / strength) <= most


def drawn(pipe: Any, prompts: Sequence[str], seed: int, rows: Mapping[str, Sequence[Any]], **more: Any) -> np.ndarray:
    """One picture a prompt, uint8 [N, H, W, 3]; each from a generator of its own.

    Args:
        rows: arguments with a row for each prompt (source pictures, masks, what a ControlNet is shown).
        more: arguments that all share.
    """
    parts = []
    for start in range(0, len(prompts), BATCH):
        part = slice(start, start + BATCH)
        generators = [torch.Generator("cpu").manual_seed(seed + i) for i in range(start, start + len(prompts[part]))]
        own = {name: list(values[part]) for name, values in rows.items()}
        made = pipe(list(prompts[part]), generator=generators, output_type="np", **own, **more).images
        parts.append((made * 255).round().astype(np.uint8))
    return np.concatenate(parts)


def images(pictures: np.ndarray) -> list[Image.Image]:
    """Pictures as pipelines take them."""
    return [Image.fromarray(picture) for picture in pictures]


def drawn_after(
    pipe: Any, prompts: Sequence[str], features: Tensor, seed: int, *, guidance_scale: float, **more: Any
) -> np.ndarray:
    """As `drawn`, with an IP-Adapter and each picture after its own features.

    One call a picture: `ip_adapter_image_embeds` are all of them told to every picture of a call.

    Args:
        features: [N, width]; where a call is guided, none (zeros) stand before them.
    """
    made = []
    for i, (prompt, row) in enumerate(zip(prompts, features, strict=True)):
        shown = row[None, None]
        told = torch.cat([torch.zeros_like(shown), shown]) if guidance_scale > 1 else shown
        settings = {"guidance_scale": guidance_scale, "ip_adapter_image_embeds": [told], **more}
        made.append(drawn(pipe, [prompt], seed + i, {}, **settings))
    return np.concatenate(made)
