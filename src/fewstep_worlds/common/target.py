"""The check of a place that a teacher's pipeline is written to. Light: imported before torch."""

from __future__ import annotations

from pathlib import Path

from fewstep.backbones.families import FAMILIES
from fewstep.backbones.pipeline_writer import RECORD
from fewstep.common.errors import UserError

PIPELINE = {*FAMILIES["StableDiffusionPipeline"].parts, "model_index.json", RECORD}
"""Entries of a pipeline folder, which may be replaced."""
RUN_PARTS = ("vae", "unet", "decoder")
"""Folders of a teacher's training."""


def check_target(target: Path, out: Path) -> None:
    """Refuse a target that holds anything but a pipeline: writing replaces it as a whole.

    Args:
        target: where the pipeline will be written.
        out: the run folder of its training.

    Raises:
        UserError: a file, a folder that holds more than a pipeline, or one that contains the run.
    """
    place, run = target.resolve(), out.resolve()
    advice = f"use {str(out / 'pipeline')!r}"
    if place in (run, *run.parents) or any(run / part in (place, *place.parents) for part in RUN_PARTS):
        raise UserError(f"target = {str(target)!r} belongs to the run in {out}; {advice}")
    held = sorted(item.name for item in place.iterdir()) if place.is_dir() else [place.name] * place.exists()
    others = [name for name in held if name not in PIPELINE]
    if others or (held and "model_index.json" not in held):
        raise UserError(f"target = {str(target)!r} holds {(others or held)[0]}, which would be lost; {advice}")
