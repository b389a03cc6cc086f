"""The kind of a single-file checkpoint, from the names and shapes in its header and its metadata; without torch."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from fewstep.common.choices import Prediction
from fewstep.common.errors import UserError
from fewstep.common.safetensors_header import Entry, metadata_record, read_floats, read_safetensors_header
from fewstep.common.text import read_table

UNET_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "")
"""Prefixes of the denoiser's keys: in a whole checkpoint, in ComfyUI's own files, in a denoiser alone."""
TRANSFORMERS = {
    "joint_blocks.": ("StableDiffusion3Pipeline", "SD3Transformer2DModel"),
    "double_blocks.": ("FluxPipeline", "FluxTransformer2DModel"),
}
"""Prefix of a transformer's keys -> its pipeline and class. All else comes from the folder of configs."""
Version = Literal["sd1", "sd2", "sdxl"]

TABLES: dict[str, dict[Any, Any]] = read_table(__file__)
_WIDTHS: dict[tuple[int, bool], Version] = {(768, False): "sd1", (1024, False): "sd2", (2048, True): "sdxl"}
"""Width of the text states, and whether a vector is embedded beside the time -> version."""
_REFUSED_WIDTHS = {
    (1280, True): "SDXL's refiner",
    (1024, True): "Stable Diffusion 2.x unCLIP or upscaler",
    (768, True): "Stable Diffusion 1.x with a vector embedded beside the time",
}
_WORDS: dict[str, Prediction] = {word: kind for kind, words in TABLES["words"].items() for word in words}
V_SPREAD = 0.09
"""Threshold for the standard deviation of a late norm's bias: above in 2.x networks of v, below in those of eps."""


@dataclass(frozen=True)
class Checkpoint:
    """A single-file checkpoint that can be read.

    Attributes:
        pipeline: its class in diffusers.
        prefix: of the denoiser's keys.
        transformer: class of the denoiser, if only that is read; empty for Stable Diffusion 1.x, 2.x and XL.
        version: which of those, by its widths; None of a network of other widths, which needs a folder of configs.
        prediction: what the denoiser predicts by the file's marks or metadata; None without any.
        guess: its prediction as the weights suggest (2.x without marks); None elsewhere.
        zero_snr: whether the schedule has zero terminal SNR; None where the file has no mark or metadata of it.
        file, metadata, entries: the file and its header.
        record: its `fewstep` record: settings of a student that was exported as one file; else empty.
    """

    pipeline: str
    prefix: str
    transformer: str = ""
    version: Version | None = None
    prediction: Prediction | None = None
    guess: Prediction | None = None
    zero_snr: bool | None = None
    file: Path = Path()
    metadata: Mapping[str, str] = field(default_factory=dict)
    entries: Mapping[str, Entry] = field(default_factory=dict)
    record: Mapping[str, Any] = field(default_factory=dict)


def read_checkpoint(file: Path) -> Checkpoint:
    """Read the header of a single-file checkpoint.

    Raises:
        UserError: as `recognise`; or a broken file.
    """
    metadata, entries = read_safetensors_header(file)
    record = metadata_record(metadata, "fewstep", file)
    checkpoint = recognise(file, metadata, entries, record)
    return replace(checkpoint, file=file, metadata=metadata, entries=entries, record=record)


def recognise(
    file: Path, metadata: Mapping[str, str], entries: Mapping[str, Entry], notes: Mapping[str, Any]
) -> Checkpoint:
    """Return the kind of a checkpoint.

    Args:
        metadata, entries: its header.
        notes: its `fewstep` record; empty for another tool's file.

    Raises:
        UserError: a kind that is not read, or an unknown architecture.
    """
    name = f"teacher = {str(file)!r}"
    prefix = next((p for p in UNET_PREFIXES if p and any(key.startswith(p) for key in entries)), "")
    adapter = next((key for key in entries if re.search(r"\.lora_(down|up|A|B)\b|\.hada_w1|\.lokr_w", key)), None)
    if adapter and f"{prefix}input_blocks.0.0.weight" in entries:
        raise UserError(f"{name} holds an adapter beside its weights, {adapter!r}; merge it into them, or remove it")
    if adapter:
        raise UserError(f"{name} is a LoRA; give it as --lora, and its base as --teacher")
    inner = [key.removeprefix(prefix) for key in entries if key.startswith(prefix)]
    other = _known(TABLES["others"], [*inner, *entries])
    start = next((start for start in TRANSFORMERS if any(key.startswith(start) for key in inner)), "")
    first = entries.get(f"{prefix}input_blocks.0.0.weight")
    if first is None and not start:
        unknown = f"of an unknown architecture: it holds {min(entries, default='nothing')!r}"
        other = other or _known(TABLES["alone"], [*inner, *entries]) or unknown
    if other:
        raise UserError(
            f"{name} is {other}; give a checkpoint of Stable Diffusion 1.x, 2.x or XL, or a transformer of Stable "
            "Diffusion 3 or Flux"
        )
    if first is None:
        return Checkpoint(TRANSFORMERS[start][0], prefix, TRANSFORMERS[start][1])
    channels, vector = first.shape[1], f"{prefix}label_emb.0.0.weight" in entries
    if channels in TABLES["channels"]:
        what = TABLES["channels"][channels]
        raise UserError(f"{name} is {what} ({channels} input channels); give a text-to-image one (4)")
    width = next(
        (entries[key].shape[1] for key in sorted(entries) if re.search(r"input_blocks.*\.attn2\.to_k\.weight$", key)), 0
    )
    if (width, vector) in _REFUSED_WIDTHS:
        raise UserError(
            f"{name} is {_REFUSED_WIDTHS[width, vector]}; give a checkpoint of Stable Diffusion 1.x, 2.x or XL's base"
        )
    version = _WIDTHS.get((width, vector))
    prediction, zero_snr = _prediction(name, metadata, entries, notes)
    guess: Prediction | None = None
    if version == "sd2" and prediction is None:
        guess = _guess(file, entries, prefix)
    pipeline = "StableDiffusionXLPipeline" if vector else "StableDiffusionPipeline"
    return Checkpoint(pipeline, prefix, "", version, prediction, guess, zero_snr)


def _known(kinds: Mapping[str, str], keys: list[str]) -> str | None:
    """Return what keys belong to, by the prefix of one of them; None for unknown prefixes."""
    return next((what for start, what in kinds.items() if any(key.startswith(start) for key in keys)), None)


def _prediction(
    name: str, metadata: Mapping[str, str], entries: Mapping[str, Entry], notes: Mapping[str, Any]
) -> tuple[Prediction | None, bool | None]:
    """Return the prediction type and zero terminal SNR by a file's marks and metadata; None each without any.

    v networks have an empty tensor `v_pred`, and `ztsnr` for zero terminal SNR (kohya, ComfyUI). Metadata may have
    `modelspec.prediction_type`, or name the architecture of 2.x (its 768 network predicts v).

    Raises:
        UserError: an unknown prediction type.
    """
    if "v_pred" in entries:
        return "v", "ztsnr" in entries
    word = str(notes.get("prediction") or metadata.get("modelspec.prediction_type") or "")
    found = _WORDS.get(word.strip().lower().replace("-", "_"))
    if word.strip() and found is None:
        raise UserError(f"{name} predicts {word!r} by its metadata; it must be one of {', '.join(_WORDS)}")
    architecture = metadata.get("modelspec.architecture", "")
    if found is None and architecture.startswith("stable-diffusion-v2"):
        found = "v" if "768-v" in architecture else "eps"
    if found is None:
        return None, True if "ztsnr" in entries else None
    return found, "ztsnr" in entries


def _guess(file: Path, entries: Mapping[str, Entry], prefix: str) -> Prediction:
    """Return what a network of 2.x predicts, by the spread of a bias (`V_SPREAD`)."""
    key = f"{prefix}output_blocks.11.1.transformer_blocks.0.norm1.bias"
    if key not in entries:
        return "v"
    values = read_floats(file, key, entries[key])
    mean = sum(values) / len(values)
    spread = math.sqrt(sum((value - mean) ** 2 for value in values) / len(values))
    return "v" if spread > V_SPREAD else "eps"


def formats_of(metadata: Mapping[str, str], file: Path) -> dict[str, str]:
    """Return layer -> the format that it is quantised in, from ComfyUI's `_quantization_metadata`; mostly empty.

    Raises:
        UserError: broken metadata.
    """
    try:
        layers = json.loads(metadata.get("_quantization_metadata", "{}")).get("layers", {})
        return {str(layer): str(entry["format"]) for layer, entry in layers.items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{file} has broken metadata: _quantization_metadata: {error!r}") from error
