"""The base, alone or with a student's LoRA, in diffusers' own pipelines."""

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

from fewstep.backbones.loading import loading
from fewstep.diffusion.grid import TLCM_TIMES
from fewstep.inference.pipeline import call_settings, sampling_of_student, scheduler_for
from fewstep.students.lora_file import FILE

BATCH = 32


@dataclass(frozen=True)
class Model:
    """The base or a student at a number of network calls: a column of the figure.

    Attributes:
        lora: the student's; None for the base alone.
        steps: network calls.
        scale: diffusers' `guidance_scale`, of the base.
    """

    name: str
    lora: Path | None
    steps: int
    scale: float = 1.0

    @property
    def label(self) -> str:
        """Name and network calls."""
        return f"{self.name} {self.steps}"


def pipeline(
    kind: str, folder: Path, model: Model, parts: Mapping[str, Any] | None = None, gamma: float | None = None
) -> Any:
    """Return a diffusers pipeline with the student's LoRA and scheduler, or with DDIM.

    Args:
        kind: of pipeline, by its class name.
        folder: the checkpoint.
        parts: further components, such as ControlNets.
        gamma: of a student's sampler; None for the student's own.
    """
    import diffusers

    with loading(str(folder)), redirect_stderr(StringIO()):  # its warnings about the classes do not apply
        pipe = getattr(diffusers, kind).from_pretrained(
            folder, safety_checker=None, local_files_only=True, use_safetensors=True, **(parts or {})
        )
    pipe.set_progress_bar_config(disable=True)
    if model.lora is None:
        pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    else:
        place = model.lora / FILE if model.lora.is_dir() else model.lora
        pipe.load_lora_weights(str(place.parent), weight_name=place.name, adapter_name="student")
        pipe.scheduler = scheduler_for(model.lora, pipe.scheduler.config, gamma)
    return pipe


def call_arguments(model: Model, strength: float = 1.0) -> dict[str, Any]:
    """Return guidance and as many steps as leave `model.steps` network calls below a strength."""
    scale = model.scale if model.lora is None else call_settings(model.lora)["guidance_scale"]
    return {"guidance_scale": scale, "num_inference_steps": math.ceil(model.steps / strength)}


def can_draw(model: Model, strength: float) -> bool:
    """Return whether the student's times allow as many calls below a strength (TLCM has 8 times in all)."""
    if model.lora is None or strength == 1:
        return True
    own = sampling_of_student(model.lora)
    points = own.grid if isinstance(own.grid, int) else len(own.grid)
    most = {"tlcm": max(TLCM_TIMES), "grid": points}.get(own.spacing, math.inf)
    return math.ceil(model.steps / strength) <= most


def draw_pictures(
    pipe: Any, prompts: Sequence[str], seed: int, rows: Mapping[str, Sequence[Any]], **more: Any
) -> np.ndarray:
    """Draw one picture a prompt, uint8 [N, H, W, 3], each from its own generator.

    Args:
        rows: arguments with a row for each prompt (source pictures, masks, ControlNet maps).
        more: arguments that are shared.
    """
    parts = []
    for start in range(0, len(prompts), BATCH):
        part = slice(start, start + BATCH)
        generators = [torch.Generator("cpu").manual_seed(seed + i) for i in range(start, start + len(prompts[part]))]
        own = {name: list(values[part]) for name, values in rows.items()}
        drawn = pipe(list(prompts[part]), generator=generators, output_type="np", **own, **more).images
        parts.append((drawn * 255).round().astype(np.uint8))
    return np.concatenate(parts)


def images(pictures: np.ndarray) -> list[Image.Image]:
    """Return pictures as PIL images."""
    return [Image.fromarray(picture) for picture in pictures]


def draw_from_features(
    pipe: Any, prompts: Sequence[str], features: Tensor, seed: int, *, guidance_scale: float, **more: Any
) -> np.ndarray:
    """Draw with an IP-Adapter, each picture from its own features.

    One call a picture: all `ip_adapter_image_embeds` of a call apply to each of its pictures.

    Args:
        features: [N, width]; a guided call has zeros in front for its unconditional branch.
    """
    parts = []
    for i, (prompt, row) in enumerate(zip(prompts, features, strict=True)):
        own = row[None, None]
        embeddings = torch.cat([torch.zeros_like(own), own]) if guidance_scale > 1 else own
        settings = {"guidance_scale": guidance_scale, "ip_adapter_image_embeds": [embeddings], **more}
        parts.append(draw_pictures(pipe, [prompt], seed + i, {}, **settings))
    return np.concatenate(parts)
