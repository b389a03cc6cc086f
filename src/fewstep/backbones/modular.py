"""Modular pipelines of diffusers: blocks that share components, which are taken from a folder's own files alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fewstep.backbones.pipeline_folder import PipelineFolder

if TYPE_CHECKING:
    import torch


def modular_pipeline(folder: PipelineFolder, components: Mapping[str, Any]) -> Any:
    """Return a pipeline of a folder's class, with the given components."""
    import diffusers

    kind = getattr(diffusers, folder.pipeline)
    pipe = getattr(diffusers, kind.default_blocks_name)().init_pipeline()
    pipe.update_components(**components)
    return pipe


def modular_index(folder: PipelineFolder, place: Path) -> dict[str, Any]:
    """Return the index of a copy of a folder: each component is in the copy, whatever place the original names."""
    import diffusers

    blocks = getattr(diffusers, folder.pipeline).default_blocks_name
    specs = {
        name: [*kind, {"pretrained_model_name_or_path": str(place), "subfolder": name, "type_hint": list(kind)}]
        for name, kind in folder.components.items()
        if name in folder.family.parts
    }
    return {"_class_name": folder.pipeline, "_blocks_class_name": blocks, **specs}


def modular_latents(
    pipe: Any, prompts: list[str], generators: Sequence[torch.Generator], given: Mapping[str, Any]
) -> Any:
    """Draw by a modular pipeline: its last latents. Its guidance is a component, here by `guidance_scale`."""
    from diffusers import ClassifierFreeGuidance

    settings = dict(given)
    pipe.set_progress_bar_config(disable=True)
    pipe.update_components(guider=ClassifierFreeGuidance(guidance_scale=settings.pop("guidance_scale")))
    return pipe(prompt=prompts, generator=list(generators), output_type="pt", output="latents", **settings)
