"""What a teacher may be named by: a pipeline folder, a single-file checkpoint, or a hub id. All end as a folder.

A single file is taken apart once, into a pipeline folder in the user's cache, and read from there ever after; so is
what comes from a hub. Neither reads a pickle.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Collection
from pathlib import Path

from fewstep.errors import UserError
from fewstep.export.header import read_notes
from fewstep.export.pipeline import RECORD, write_pipeline
from fewstep.files import atomic_folder, read_mapping, sha256, write_json
from fewstep.tensor_header import Entry, read_safetensors_header

PICKLES = (".ckpt", ".bin", ".pt", ".pth")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w.-]+)?")
"""owner/name, and a revision behind @ if one is meant."""
TAKEN = ("*.json", "*.txt", "*.model", "*.safetensors", "LICENSE*", "LICENCE*", "NOTICE*")
"""What is fetched from a hub: configs, vocabularies, weights, licences."""
WHOLE = {
    "conditioner.embedders.1.": "StableDiffusionXLPipeline",
    "cond_stage_model.": "StableDiffusionPipeline",
}
"""How keys of a whole checkpoint begin, and what pipeline it is."""
NETWORKS = {
    "joint_blocks.": ("StableDiffusion3Pipeline", "SD3Transformer2DModel"),
    "double_blocks.": ("FluxPipeline", "FluxTransformer2DModel"),
}
"""The same of files whose transformer alone is taken, and its class: all else comes from the folder beside them."""
IN_A_WHOLE = "model.diffusion_model."
"""Before a transformer's keys, where the file holds more."""


def cache_folder() -> Path:
    """Where teachers that came as one file, or from a hub, are kept as folders: $FEWSTEP_CACHE, or ~/.cache/fewstep."""
    return Path(os.environ.get("FEWSTEP_CACHE") or Path.home() / ".cache" / "fewstep") / "teachers"


def teacher_folder(named: Path | str, config: Path | str = "") -> Path:
    """The pipeline folder of a teacher that is named.

    Args:
        named: a pipeline folder, a single-file checkpoint (.safetensors), or a hub id.
        config: for a single file, a pipeline folder of its kind: its configs, tokenizers, and whatever the file does
            not hold.

    Raises:
        UserError: a pickle, a checkpoint of an unknown architecture or without the configs of its kind, a hub that
            cannot be reached, or a config beside something that needs none.
    """
    place = Path(named)
    if place.suffix.lower() in PICKLES:
        target = place.with_suffix(".safetensors").name
        raise UserError(
            f"teacher = {str(named)!r} is a pickle, which is never read; convert it where you trust it: python -c "
            f'"import torch, safetensors.torch as s; w = torch.load({place.name!r}, weights_only=True); '
            f"s.save_file({{k: v.contiguous() for k, v in w.get('state_dict', w).items() if hasattr(v, 'shape')}}, "
            f'{target!r})"'
        )
    if place.suffix == ".safetensors":
        return taken_apart(place, Path(config) if config else None)
    if config:
        raise UserError(f"config = {str(config)!r} goes with a single-file teacher; {str(named)!r} is none")
    if not place.exists() and HUB_ID.fullmatch(str(named)):
        return fetched(str(named))
    return place


def pipeline_of(keys: Collection[str], file: Path) -> str:
    """The pipeline class of a checkpoint, from the names of its tensors.

    Raises:
        UserError: an unknown architecture.
    """
    for start, pipeline in WHOLE.items():
        if any(key.startswith(start) for key in keys):
            return pipeline
    for start, (pipeline, _) in NETWORKS.items():
        if any(key.removeprefix(IN_A_WHOLE).startswith(start) for key in keys):
            return pipeline
    raise UserError(
        f"teacher = {str(file)!r} is of an unknown architecture: it holds {min(keys, default='nothing')!r}; the "
        "nearest that is known is a whole checkpoint of Stable Diffusion 1.x, 2.x or XL, or a transformer of 3 or Flux"
    )


def taken_apart(file: Path, config: Path | None) -> Path:
    """The folder of a single-file checkpoint, made if it is not there yet.

    Raises:
        UserError: as `teacher_folder`.
    """
    _, entries = read_safetensors_header(file)
    pipeline = pipeline_of(entries, file)
    if config is None:
        raise UserError(
            f"teacher = {str(file)!r} is one file, without its configs; give --config FOLDER, any {pipeline}'s"
        )
    index = config / "model_index.json"
    found = str(read_mapping(index).get("_class_name")) if index.is_file() else "no pipeline folder"
    if found != pipeline:
        raise UserError(f"config = {str(config)!r} is {found}; {file.name} needs the nearest folder of a {pipeline}")
    beside = sorted(path for path in config.rglob("*") if path.is_file())
    told = [f"{path.relative_to(config)} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in beside]
    key = hashlib.sha256("\n".join([sha256(file), *told]).encode()).hexdigest()
    place = cache_folder() / f"{file.stem}-{key[:16]}"
    if not place.is_dir():
        with atomic_folder(place) as part:
            _take_apart(file, config, pipeline, entries, part)
    return place


def _take_apart(file: Path, config: Path, pipeline: str, entries: dict[str, Entry], part: Path) -> None:
    import diffusers
    import torch

    from fewstep.backbones.base import loading

    notes = read_notes(file)  # of a student that was exported as one file: it brings its settings
    half = all(entry.dtype in ("F16", "BF16") for entry in entries.values() if len(entry.shape) > 1)
    transformer = dict(NETWORKS.values()).get(pipeline)
    if transformer:
        with loading(str(file)):
            network = getattr(diffusers, transformer).from_single_file(
                str(file),
                config=str(config),
                subfolder="transformer",
                local_files_only=True,
                torch_dtype=torch.float16 if half else torch.float32,
            )
        write_pipeline(part, config, network, notes)
        return
    more = {"safety_checker": None} if pipeline == "StableDiffusionPipeline" else {}
    with loading(str(file)):
        pipe = getattr(diffusers, pipeline).from_single_file(
            str(file),
            config=str(config),
            local_files_only=True,
            torch_dtype=torch.float16 if half else torch.float32,
            **more,
        )
    pipe.save_pretrained(part)
    if notes:
        write_json(part / RECORD, notes)


def fetched(named: str) -> Path:
    """The folder of a hub id, fetched if it is not there yet: configs, vocabularies and safetensors alone.

    Raises:
        UserError: no such repository, or no way there.
    """
    from huggingface_hub import snapshot_download

    name, _, revision = named.partition("@")
    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=list(TAKEN)))
    except Exception as error:  # the hub's own classes change from version to version; none of them is ours
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"teacher = {named!r} is neither a folder here nor could be fetched from the hub ({type(error).__name__}: "
            f"{reason}); the nearest is a local folder of it"
        ) from error
