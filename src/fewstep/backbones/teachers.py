"""What a teacher may be named by: a pipeline folder, a single-file checkpoint, or a hub id. All end as a folder.

A single file is taken apart once, into a pipeline folder in the user's cache, and read from there ever after; so is
what comes from a hub. Neither reads a pickle.
"""

from __future__ import annotations

import hashlib
import re
import sys
from pathlib import Path
from typing import Any

from fewstep.backbones.config_keys import SCHEDULERS
from fewstep.backbones.families import FAMILIES
from fewstep.backbones.pipeline_folder import VARIANTS, PipelineFolder, read_folder, weight_files
from fewstep.backbones.pipeline_writer import LICENCES, RECORD
from fewstep.backbones.scheduler_config import BETAS, PREDICTIONS, is_flow
from fewstep.backbones.single_file.known_configs import config_folder
from fewstep.backbones.single_file.recognise import Checkpoint, recognise
from fewstep.backbones.single_file.vocabulary import clip_vocabulary
from fewstep.backbones.unsafe_weights import advice, is_pickle
from fewstep.common.defaults import world
from fewstep.common.errors import UserError
from fewstep.common.files import atomic_folder, cache_root, file_lock, read_mapping, write_json
from fewstep.common.safetensors_header import is_safetensors, metadata_record, read_safetensors_header

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w.-]+)?")
"""owner/name, and a revision behind @ if one is meant."""
ADDRESS = re.compile(r"hf:/{0,2}(?!/)(?P<hf>.*)|(?:https?:/{1,2})?(?:www\.)?(?:huggingface\.co|hf\.co)/(?P<web>.*)")
"""A hub address: hf:owner/name, hf://owner/name, or as a browser shows it; a `Path` of one has lost a slash."""
ONE_FILE = (".safetensors", ".sft")
"""How names of single-file checkpoints end."""
INDEX = "model_index.json"
SETTINGS = ("*.json", "*.txt", "*.model")
"""What is fetched of each component that pictures are drawn with: configs and vocabularies, ..."""
WEIGHTS = {
    variant: tuple(
        f"{name}{f'.{variant}' * bool(variant)}{end}.safetensors"
        for name in ("diffusion_pytorch_model", "model")
        for end in ("", "-*")
    )
    for variant in VARIANTS
}
"""... and its weights under the names that are read, the plain variant first; no root files of other tools."""


def cache_folder() -> Path:
    """Where teachers that came as one file, or from a hub, are kept as folders: $FEWSTEP_CACHE, or ~/.cache/fewstep."""
    return cache_root() / "teachers"


def teacher_folder(named: Path | str, config: Path | str = "") -> Path:
    """The pipeline folder of a teacher that is named.

    Args:
        named: a pipeline folder, a single-file checkpoint (.safetensors), or a hub id.
        config: for a single file, a pipeline folder of its kind: its configs, tokenizers, and whatever the file does
            not hold. Those of Stable Diffusion 1.5, 2.1 and XL's base are known here.

    Raises:
        UserError: a pickle, a checkpoint of an unknown architecture or without the configs of its kind, a hub that
            cannot be reached, or a config beside something that needs none.
    """
    place = Path(named)
    if not place.exists():
        named = hub_id(str(named))
        place = Path(named)
    if is_pickle(place):
        raise UserError(f"teacher = {str(named)!r} is a pickle, which is never read; {advice(place)}")
    if place.suffix.lower() in ONE_FILE or is_safetensors(place):
        return taken_apart(place, Path(config) if config else None)
    if config:
        raise UserError(
            f"teacher_config = {str(config)!r} is for single-file teachers, and teacher = {str(named)!r} is none",
            field="teacher_config",
        )
    if not place.exists() and HUB_ID.fullmatch(str(named)):
        return fetched(str(named))
    return place


def teacher_name(place: Path) -> str:
    """Return what a teacher's folder is called, without where it lies: owner/name of a hub's, the file's name of one
    that was taken apart, else the folder's own name."""
    parts = place.absolute().parts
    if len(parts) > 2 and parts[-2] == "snapshots" and parts[-3].startswith("models--"):
        return parts[-3].removeprefix("models--").replace("--", "/")
    if place.absolute().parent == cache_folder().absolute():
        return f"{place.name.rpartition('-')[0]}.safetensors"
    return place.absolute().name


def hub_id(named: str) -> str:
    """The owner/name[@revision] of an address on the Hugging Face hub; any other name as it is.

    Raises:
        UserError: an address of one file or of a folder in a repository, of no repository, or of another site.
    """
    found = ADDRESS.fullmatch(named)
    if found is None:
        if re.match(r"[a-z][a-z0-9+.-]+:/", named):
            address = re.sub(r"^([a-z0-9+.-]+):/+", r"\1://", named)
            raise UserError(f"teacher = {address!r} is an address outside the Hugging Face hub; download it first")
        return named
    parts = (found["hf"] if found["hf"] is not None else found["web"]).split("?")[0].split("#")[0].strip("/").split("/")
    owner_and_name, rest = "/".join(parts[:2]), parts[2:]
    if rest and rest[0] == "tree" and len(rest) == 2:
        owner_and_name, rest = f"{owner_and_name}@{rest[1]}", []
    if rest or not HUB_ID.fullmatch(owner_and_name) or parts[0] in ("datasets", "spaces", "models"):
        kind = "a file or folder in a repository" if rest else "no model repository"
        raise UserError(
            f"teacher = {named!r} is {kind} of the hub; give owner/name[@revision] of a diffusers pipeline, or "
            "download the file and give its path"
        )
    return owner_and_name


def taken_apart(file: Path, config: Path | None) -> Path:
    """The folder of a single-file checkpoint, made if it is not there yet.

    Raises:
        UserError: as `teacher_folder`.
    """
    metadata, entries = read_safetensors_header(file)
    notes = metadata_record(metadata, "fewstep", file)  # the settings of a student that was exported as one file
    checkpoint = recognise(file, metadata, entries, notes)
    if config is None:
        config = _known_config(file, checkpoint)
    found = str(read_mapping(config / INDEX).get("_class_name")) if (config / INDEX).is_file() else "no pipeline folder"
    if found not in FAMILIES or FAMILIES[found] is not FAMILIES[checkpoint.pipeline]:
        raise UserError(
            f"teacher_config = {str(config)!r} is {found}; {file.name} needs a folder of a {checkpoint.pipeline}",
            field="teacher_config",
        )
    _check_flow(file, config, checkpoint)
    beside = sorted(path for path in config.rglob("*") if path.is_file())
    told = [f"{path.relative_to(config)} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in beside]
    # by size and time, not by content: a checkpoint is gigabytes, and every command begins here
    stat = file.stat()
    told.append(f"{file.resolve()} {stat.st_size} {stat.st_mtime_ns}")
    key = hashlib.sha256("\n".join(told).encode()).hexdigest()
    place = cache_folder() / f"{file.stem}-{key[:16]}"
    if place.is_dir():
        return place
    # all processes of a launch begin here: one takes it apart, the others wait and read what it made
    with file_lock(place.with_name(f".{place.name}.lock")):
        if not place.is_dir():
            with atomic_folder(place, keep=True) as part:
                _take_apart(file, config, checkpoint, part)
    return place


def _check_flow(file: Path, config: Path, checkpoint: Checkpoint) -> None:
    """Refuse a network of flow matching beside a scheduler of betas, or the other way round, where the file says so.

    Raises:
        UserError: the two differ.
    """
    if checkpoint.prediction is None or checkpoint.transformer:
        return
    scheduler = config / "scheduler" / "scheduler_config.json"
    if (checkpoint.prediction == "flow") != is_flow(read_mapping(scheduler)):
        raise UserError(
            f"teacher = {str(file)!r} predicts {checkpoint.prediction}, as the file says, and {scheduler} is of "
            "another kind; give --teacher-config FOLDER with a scheduler of the file's prediction"
        )


def _known_config(file: Path, checkpoint: Checkpoint) -> Path:
    """The folder of configs of a checkpoint that comes without any.

    Raises:
        UserError: a kind whose configs are not shipped, or no vocabulary for its tokenizer.
    """
    if checkpoint.version is None or checkpoint.prediction == "flow":
        raise UserError(
            f"teacher = {str(file)!r} is one file, without its configs; give --teacher-config FOLDER, a "
            f"{checkpoint.pipeline}'s of the same prediction ({checkpoint.prediction or 'eps or v'})"
        )
    cache = cache_folder().parent / "configs"
    vocabulary = clip_vocabulary(file, cache)
    return config_folder(checkpoint.version, checkpoint.prediction or checkpoint.guess or "eps", vocabulary, cache)


def _take_apart(file: Path, config: Path, checkpoint: Checkpoint, part: Path) -> None:
    """Write a checkpoint as a pipeline folder."""
    from fewstep.backbones.single_file.components import write_components

    notes = metadata_record(read_safetensors_header(file)[0], "fewstep", file)
    said = write_components(file, config, checkpoint, part)
    if notes:
        write_json(part / RECORD, notes)
    _tell_prediction(part, checkpoint)
    for line in said:
        print(line, file=sys.stderr)


def _tell_prediction(part: Path, checkpoint: Checkpoint) -> None:
    """What a checkpoint says of its prediction goes before the config beside it.

    A scheduler that cannot rescale its betas to zero terminal SNR becomes a DDIMScheduler of the same betas.
    """
    words: dict[str, str] = {ours: theirs for theirs, ours in PREDICTIONS.items()}
    told: dict[str, Any] = {}
    if checkpoint.prediction in words and checkpoint.prediction != "flow" and not checkpoint.transformer:
        told["prediction_type"] = words[str(checkpoint.prediction)]
    if checkpoint.zero_snr or (checkpoint.zero_snr is not None and checkpoint.prediction == "eps"):
        told["rescale_betas_zero_snr"] = checkpoint.zero_snr  # eps has no x0 where the noise is pure
    if not told:
        return
    scheduler = part / "scheduler" / "scheduler_config.json"
    config = read_mapping(scheduler)
    kind = SCHEDULERS.get(str(config.get("_class_name")))
    if told.get("rescale_betas_zero_snr") and kind and "rescale_betas_zero_snr" not in kind.known:
        config = {key: config[key] for key in BETAS if key in config} | {"_class_name": "DDIMScheduler"}
        index = read_mapping(part / INDEX)
        write_json(part / INDEX, index | {"scheduler": ["diffusers", "DDIMScheduler"]})
    write_json(scheduler, config | told)


def fetched(named: str) -> Path:
    """The folder of a hub id, fetched if it is not there yet: what pictures are drawn with, and its licences.

    Raises:
        UserError: no such repository, or no way there.
    """
    from huggingface_hub import snapshot_download

    name, _, revision = named.partition("@")
    try:
        place = Path(snapshot_download(name, revision=revision or None, allow_patterns=[INDEX, *LICENCES]))
        if not (place / INDEX).is_file():
            raise FileNotFoundError(f"it holds no {INDEX}")
        kind = str(read_mapping(place / INDEX).get("_class_name"))
        if kind not in FAMILIES:
            return place  # refused by its class when it is read, before its weights are fetched
        family = FAMILIES[kind]
        asked = [INDEX, *LICENCES, *(f"{part}/{pattern}" for part in family.parts for pattern in SETTINGS)]
        lacking = list(family.weighed)
        for variant in VARIANTS:
            asked += [f"{part}/{pattern}" for part in lacking for pattern in WEIGHTS[variant]]
            place = Path(snapshot_download(name, revision=revision or None, allow_patterns=asked))
            lacking = [part for part in lacking if not weight_files(place / part)]
            if not lacking:
                break
        return place
    except Exception as error:  # the hub's own classes change from version to version; none of them is ours
        raise UserError(
            f"teacher = {named!r} is neither a folder here nor could be fetched from the hub: {_reason(error)}"
        ) from error


REASONS = {
    "GatedRepoError": "its owner asks you to accept terms on its page and to give a token (hf auth login)",
    "RepositoryNotFoundError": "the hub has no such repository, or it is private and asks for a token (hf auth login)",
    "RevisionNotFoundError": "the repository has no such revision",
    "OfflineModeIsEnabled": "HF_HUB_OFFLINE is set, and it was not fetched before",
    "LocalEntryNotFoundError": "the hub cannot be reached, and it was not fetched before",
}
"""huggingface_hub's errors, the most special ones first, in words."""


def _reason(error: BaseException) -> str:
    """Why a repository could not be fetched: in our words for known causes, else the hub's first sentence."""
    chain = [error, *filter(None, (error.__cause__, error.__context__))]
    names = {kind.__name__ for one in chain for kind in type(one).__mro__}
    known = next((words for name, words in REASONS.items() if name in names), None)
    return known or re.split(r"(?<=[a-z)])\. ", " ".join(str(error).split()))[0] or type(error).__name__


def teacher_path(named: str | Path) -> Path:
    """The teacher's folder: the named one (a folder, or a hub id), or the bundled one for "".

    Raises:
        UserError: as `backbones.teachers.teacher_folder`.
    """
    return teacher_folder(named) if named else world("teacher").root() / "teacher"


def named_teacher(teacher: Path | str, config: Path | str = "") -> str:
    """What settings name a teacher by: its folder, made first where it is a single file; empty for the bundled one.

    Raises:
        UserError: as `backbones.teachers.teacher_folder`; a config without a teacher.
    """
    if config and not teacher:
        raise UserError(
            f"teacher_config = {str(config)!r} is for a single-file teacher; give --teacher, or remove it",
            field="teacher_config",
        )
    return str(teacher_folder(teacher, config)) if teacher else ""


def read_teacher(teacher: Path | str, config: Path | str = "") -> PipelineFolder:
    """Read the pipeline folder of a teacher; the bundled one for "".

    Raises:
        UserError: as `teacher_folder` and `read_folder`.
    """
    return read_folder(teacher_path(named_teacher(teacher, config)))
