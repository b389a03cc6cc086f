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
from fewstep.common.device import pick_device
from fewstep.diffusion.grid import TLCM_TIMES
from fewstep.evaluation.metric import Pictures
from fewstep.inference.pipeline import call_settings, read_student, scheduler_for
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


def pipeline(kind: str, folder: Path, model: Model | None, gamma: float | None = None, **parts: Any) -> Any:
    """Return a diffusers pipeline with the student's LoRA and scheduler, or with DDIM.

    Args:
        kind: of pipeline, by its class name.
        folder: the checkpoint.
        model: None for the folder's own scheduler.
        gamma: of a student's sampler; None for the student's own.
        parts: components that replace or extend the folder's.
    """
    import diffusers

    with loading(str(folder)), redirect_stderr(StringIO()):  # its warnings about the classes do not apply
        pipe = getattr(diffusers, kind).from_pretrained(
            folder, safety_checker=None, local_files_only=True, use_safetensors=True, **parts
        )
    pipe.set_progress_bar_config(disable=True)
    if model and model.lora is None:
        pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    elif model and model.lora:
        place = model.lora / FILE if model.lora.is_dir() else model.lora
        pipe.load_lora_weights(str(place.parent), weight_name=place.name, adapter_name="student")
        pipe.scheduler = scheduler_for(model.lora, pipe.scheduler.config, gamma)
    return pipe.to(pick_device("auto"))


def call_arguments(model: Model, strength: float = 1.0) -> dict[str, Any]:
    """Return guidance and as many steps as leave `model.steps` network calls below a strength."""
    scale = model.scale if model.lora is None else call_settings(model.lora)["guidance_scale"]
    return {"guidance_scale": scale, "num_inference_steps": math.ceil(model.steps / strength)}


def can_draw(model: Model, strength: float) -> bool:
    """Return whether the student's times allow as many calls below a strength (TLCM has 8 times in all)."""
    if model.lora is None or strength == 1:
        return True
    _, own = read_student(model.lora)
    points = own.grid if isinstance(own.grid, int) else len(own.grid)
    most = {"tlcm": max(TLCM_TIMES), "grid": points}.get(own.spacing, math.inf)
    return math.ceil(model.steps / strength) <= most


def draw_pictures(
    pipe: Any,
    prompts: Sequence[str],
    seed: int,
    rows: Mapping[str, Sequence[Any]],
    features: Tensor | None = None,
    **more: Any,
) -> Pictures:
    """Draw one picture a prompt, uint8 [N, H, W, 3], each from its own generator.

    Args:
        rows: arguments with a row for each prompt (source pictures, masks, ControlNet maps).
        features: of an IP-Adapter, [N, width]; a guided call has zeros for its unconditional branch.
        more: arguments that are shared.
    """
    parts = []
    size = BATCH if features is None else 1  # a pipeline conditions each picture of a call on the features of all
    for start in range(0, len(prompts), size):
        part = slice(start, start + size)
        generators = [torch.Generator("cpu").manual_seed(seed + i) for i in range(start, start + len(prompts[part]))]
        own: dict[str, Any] = {name: list(values[part]) for name, values in rows.items()}
        if features is not None:
            seen = features[part, None]
            both = torch.cat([torch.zeros_like(seen), seen]) if more["guidance_scale"] > 1 else seen
            own["ip_adapter_image_embeds"] = [both]
        drawn = pipe(list(prompts[part]), generator=generators, output_type="np", **own, **more).images
        parts.append((drawn * 255).round().astype(np.uint8))
    return np.concatenate(parts)


def images(pictures: np.ndarray) -> list[Image.Image]:
    """Return pictures, or maps of bool [N, H, W], as PIL images."""
    return [Image.fromarray(picture) for picture in pictures]
