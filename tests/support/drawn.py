"""Latents that a folder's own pipeline in diffusers draws. Not a test."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from fewstep.backbones.base import load_backbone
from fewstep.backbones.modular import modular_latents
from fewstep.export.verify import load_pipeline
from fewstep.inference.schedulers.few_step import SSSScheduler


def by_pipeline(
    folder: Path,
    prompts: Sequence[str],
    seeds: Sequence[int],
    steps: int,
    guidance: float,
    size: tuple[int, int] | None = None,
) -> Tensor:
    """Draw under our scheduler, deterministic: flows hand no generators on.

    Args:
        guidance: as most pipelines count it, 1 for none.
        size: width and height; the trained one by default.
    """
    backbone = load_backbone(folder)
    own, family = backbone.folder, backbone.folder.family
    pipe = load_pipeline(folder, own)
    scheduler = SSSScheduler.from_config(own.noise, gamma=0.0)
    width, height = size or (own.picture_size, own.picture_size)
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    given: dict[str, Any] = {"num_inference_steps": steps, "height": height, "width": width, **family.call}
    given[family.guided] = guidance - 1 + family.unguided
    if family.kind == "qwen_image":  # which names no unconditional prompt itself
        given["negative_prompt"] = [" "] * len(prompts)
    if family.modular:
        pipe.update_components(scheduler=scheduler)
        drawn = modular_latents(pipe, list(prompts), generators, given)
    else:
        pipe.scheduler = scheduler
        pipe.set_progress_bar_config(disable=True)
        with mock.patch("torch.norm", lambda x, **_: x.new_ones(())):  # Qwen-Image's guidance keeps each token's norm
            drawn = pipe(prompt=list(prompts), output_type="latent", generator=generators, **given).images
    return backbone.from_pipeline(drawn, height, width)
