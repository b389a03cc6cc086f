"""Refuse a target folder of `train-teacher` that holds anything but a pipeline."""

from __future__ import annotations

from pathlib import Path

from fewstep.backbones.families import SD
from fewstep.backbones.pipeline_writer import RECORD
from fewstep.common.errors import UserError

PIPELINE = {*SD.parts, "model_index.json", RECORD}
"""What `train-teacher` writes, and so may replace."""


def check_target(target: Path, out: Path) -> None:
    """Refuse a place for a pipeline folder where something else stands: it would be replaced as a whole.

    Args:
        target: where the pipeline will be written.
        out: the run folder that it is made in.

    Raises:
        UserError: a file, a folder that holds more than a pipeline, or one that the run itself lies in.
    """
    place, run = target.resolve(), out.resolve()
    advice = f"the nearest legal one is {str(out / 'pipeline')!r}"
    if place == run or place in run.parents or any(part in (place, *place.parents) for part in _run_parts(run)):
        raise UserError(f"target = {str(target)!r} is a place of the run in {out}; {advice}")
    if not place.exists():
        return
    held = sorted(item.name for item in place.iterdir()) if place.is_dir() else [place.name]
    others = [name for name in held if name not in PIPELINE]
    if others or (held and "model_index.json" not in held):
        raise UserError(
            f"target = {str(target)!r} holds {(others or held)[0]}, which would be lost; give a new folder, {advice}"
        )


def _run_parts(run: Path) -> list[Path]:
    return [run / part for part in ("vae", "unet", "decoder")]
