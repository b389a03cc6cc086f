"""A single-file checkpoint as a pipeline folder in the user's cache, converted once."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from fewstep.backbones.config_keys import SCHEDULERS
from fewstep.backbones.families import FAMILIES
from fewstep.backbones.pipeline_folder import INDEX
from fewstep.backbones.pipeline_writer import RECORD
from fewstep.backbones.scheduler_config import BETAS, PREDICTIONS, is_flow
from fewstep.backbones.single_file.known_configs import config_folder
from fewstep.backbones.single_file.recognise import Checkpoint, read_checkpoint
from fewstep.backbones.single_file.vocabulary import clip_vocabulary
from fewstep.common.errors import UserError
from fewstep.common.files import atomic_folder, cache_root, file_lock, read_mapping, write_json
from fewstep.common.messages import logger


def cache_folder() -> Path:
    """Return the folder of converted single files, below $FEWSTEP_CACHE or ~/.cache/fewstep."""
    return cache_root() / "teachers"


def convert_single_file(file: Path, config: Path | None) -> Path:
    """Return the folder of a single-file checkpoint, converted if it is not in the cache.

    Args:
        config: a pipeline folder of its kind; None for a known one.

    Raises:
        UserError: a checkpoint of an unknown kind, without configs, or that does not fit them.
    """
    checkpoint = read_checkpoint(file)
    if config is None:
        config = _known_config(checkpoint)
    found = str(read_mapping(config / INDEX).get("_class_name")) if (config / INDEX).is_file() else "no pipeline folder"
    if found not in FAMILIES or FAMILIES[found] is not FAMILIES[checkpoint.pipeline]:
        raise UserError(
            f"teacher_config = {str(config)!r} is {found}; {file.name} needs a folder of a {checkpoint.pipeline}"
        )
    _check_flow(checkpoint, config)
    beside = sorted(path for path in config.rglob("*") if path.is_file())
    stamps = [f"{path.relative_to(config)} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in beside]
    # by size and time, not by content: a checkpoint is gigabytes, and every command computes this key
    stat = file.stat()
    stamps.append(f"{file.resolve()} {stat.st_size} {stat.st_mtime_ns}")
    key = hashlib.sha256("\n".join(stamps).encode()).hexdigest()
    place = cache_folder() / f"{file.stem}-{key[:16]}"
    if place.is_dir():
        return place
    # one process of a launch converts it, the others wait
    with file_lock(place.with_name(f".{place.name}.lock")):
        if not place.is_dir():
            with atomic_folder(place, keep=True) as part:
                _convert(checkpoint, config, part)
    return place


def _check_flow(checkpoint: Checkpoint, config: Path) -> None:
    """Refuse a network of flow matching beside a scheduler of betas, or the reverse, by the file's own prediction."""
    if checkpoint.prediction is None or checkpoint.transformer:
        return
    scheduler = config / "scheduler" / "scheduler_config.json"
    if (checkpoint.prediction == "flow") != is_flow(read_mapping(scheduler)):
        raise UserError(
            f"teacher = {str(checkpoint.file)!r} predicts {checkpoint.prediction} by its metadata, and {scheduler} is "
            "of another kind; give --teacher-config FOLDER with a scheduler of the file's prediction"
        )


def _known_config(checkpoint: Checkpoint) -> Path:
    """Return the shipped configs of a checkpoint as a folder.

    Raises:
        UserError: a kind whose configs are not shipped, or no vocabulary for its tokenizer.
    """
    if checkpoint.version is None or checkpoint.prediction == "flow":
        raise UserError(
            f"teacher = {str(checkpoint.file)!r} is one file, without its configs; give --teacher-config FOLDER, a "
            f"{checkpoint.pipeline}'s of the same prediction ({checkpoint.prediction or 'eps or v'})"
        )
    cache = cache_folder().parent / "configs"
    vocabulary = clip_vocabulary(checkpoint.file, cache)
    return config_folder(checkpoint.version, checkpoint.prediction or checkpoint.guess or "eps", vocabulary, cache)


def _convert(checkpoint: Checkpoint, config: Path, part: Path) -> None:
    """Write a checkpoint as a pipeline folder."""
    from fewstep.backbones.single_file.components import write_components

    lines = write_components(checkpoint, config, part)
    if checkpoint.record:
        write_json(part / RECORD, checkpoint.record)
    _write_prediction(part, checkpoint)
    for line in lines:
        logger.info(line)


def _write_prediction(part: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint's own prediction type and zero terminal SNR into the scheduler's config.

    A scheduler that cannot rescale its betas to zero terminal SNR becomes a DDIMScheduler of the same betas.
    """
    words: dict[str, str] = {ours: theirs for theirs, ours in PREDICTIONS.items()}
    own: dict[str, Any] = {}
    if checkpoint.prediction in words and checkpoint.prediction != "flow" and not checkpoint.transformer:
        own["prediction_type"] = words[str(checkpoint.prediction)]
    if checkpoint.zero_snr or (checkpoint.zero_snr is not None and checkpoint.prediction == "eps"):
        own["rescale_betas_zero_snr"] = checkpoint.zero_snr  # eps has no x0 in pure noise
    if not own:
        return
    scheduler = part / "scheduler" / "scheduler_config.json"
    config = read_mapping(scheduler)
    kind = SCHEDULERS.get(str(config.get("_class_name")))
    if own.get("rescale_betas_zero_snr") and kind and "rescale_betas_zero_snr" not in kind.known:
        config = {key: config[key] for key in BETAS if key in config} | {"_class_name": "DDIMScheduler"}
        index = read_mapping(part / INDEX)
        write_json(part / INDEX, index | {"scheduler": ["diffusers", "DDIMScheduler"]})
    write_json(scheduler, config | own)
