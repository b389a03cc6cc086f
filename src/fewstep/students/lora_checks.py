"""Refuse a LoRA that does not belong to a base, from headers alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fewstep.backbones.pipeline_folder import PipelineFolder
from fewstep.backbones.scheduler_config import is_flow, noise_difference, prediction_of, shift_of
from fewstep.common.errors import UserError
from fewstep.common.safetensors_header import Shape
from fewstep.students.lora_file import CONDITIONING
from fewstep.students.lora_header import LoraHeader, base_shapes, read_header


def check_lora(path: Path | str, folder: PipelineFolder, *, same_base: bool = True) -> LoraHeader:
    """Read a LoRA's header and refuse it if it does not belong to the pipeline folder; takes milliseconds.

    Args:
        same_base: refuse a LoRA of another base of the same shapes, too.

    Raises:
        UserError: as `read_header`, `check_fits` and `check_noise`; or its extra embedding is missing.
    """
    weights = base_shapes(folder)
    header = read_header(path, weights)
    beside = folder.extra_inputs(header.sampling.extra_conditioning) if header.sampling else ()
    if beside and not (header.file.parent / CONDITIONING).is_file():
        raise UserError(
            f"lora = {str(path)!r} has extra conditioning ({', '.join(beside)}) without its {CONDITIONING}; copy that "
            "file beside it"
        )
    own = folder.fingerprint(folder.network) if header.base and same_base else header.base
    check_fits(header, weights, own)
    check_noise(header, folder.noise, str(folder.path))
    return header


def check_fits(header: LoraHeader, weights: Mapping[str, Shape], fingerprint: str) -> None:
    """Refuse a LoRA that was trained on another base or does not fit this one.

    Args:
        weights: shapes of the base's network, by parameter name.
        fingerprint: sha256 of the base's network weights.
    """
    name = f"lora = {str(header.path)!r}"
    if header.base and header.base != fingerprint:
        raise UserError(
            f"{name} was trained on another base (sha256 {header.base[:12]}, this one {fingerprint[:12]})"
            f"{header.origin}; give its own as the teacher (a diffusers pipeline takes it on any of its shape: "
            "docs/results/add-ons.md)"
        )
    for module, layer in header.layers.items():
        shape, want = weights[f"{module}.weight"], (layer.b[0], *layer.a[1:])
        if _plain(shape) != _plain(want):
            message = f"{name} is for another base: {module} is {shape}, not {want}{header.origin}"
            raise UserError(message)


def _plain(shape: Shape) -> Shape:
    """Return a 1x1 convolution's shape as a linear layer's: trainers write either for the other."""
    return shape[:2] if math.prod(shape[2:]) == 1 else shape


def check_noise(header: LoraHeader, noise: Mapping[str, Any], place: str) -> None:
    """Refuse a LoRA of another prediction, path, shift or noise levels than a scheduler's config.

    Args:
        noise: the config.
        place: what the config belongs to, for errors.
    """
    flow = is_flow(noise)
    own = {
        "prediction": prediction_of(noise, place),
        "path": "flow" if flow else "vp",
        "shift": float(shift_of(noise) or 1.0) if flow else 1.0,
    }
    name, remedy = f"lora = {str(header.path)!r}", "use the scheduler of the LoRA's own base"
    for field, value in own.items():
        found = header.record.get(field, value)
        close = isinstance(found, float) and isinstance(value, float) and math.isclose(found, value, rel_tol=1e-6)
        if found != value and not close:
            difference = f"{field} = {found!r}; the scheduler of {place} has {value!r}"
            raise UserError(f"{name} was trained at {difference}: {remedy}")
    if difference := noise_difference(header.record, noise):
        raise UserError(f"{name} was trained at {difference} in {place}; {remedy}")
