"""From a teacher's name (a pipeline folder, single-file checkpoint or hub id) to its pipeline folder.

A single file is converted once, into a pipeline folder in the user's cache; the hub's files are cached too. Pickles are
never read.
"""

from __future__ import annotations

import re
from pathlib import Path

from fewstep.backbones.families import FAMILIES
from fewstep.backbones.pipeline_folder import INDEX, MODULAR_INDEX, SETTINGS, PipelineFolder, index_file, read_folder
from fewstep.backbones.pipeline_writer import LICENCES
from fewstep.backbones.single_file.convert import cache_folder, convert_single_file
from fewstep.backbones.weight_files import ADVICE, VARIANTS, is_pickle, weight_files
from fewstep.common.defaults import world
from fewstep.common.errors import UserError
from fewstep.common.files import read_mapping
from fewstep.common.safetensors_header import is_safetensors

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w.-]+)?")
"""owner/name[@revision]."""
ADDRESS = re.compile(r"hf:/{0,2}(?!/)(?P<hf>.*)|(?:https?:/{1,2})?(?:www\.)?(?:huggingface\.co|hf\.co)/(?P<web>.*)")
"""A hub address: hf:owner/name, hf://owner/name, or as a browser shows it; a `Path` of one has lost a slash."""
ONE_FILE = (".safetensors", ".sft")
"""Suffixes of single-file checkpoints."""
WEIGHTS = {
    variant: tuple(
        f"{name}{f'.{variant}' * bool(variant)}{end}.safetensors"
        for name in ("diffusion_pytorch_model", "model")
        for end in ("", "-*")
    )
    for variant in VARIANTS
}
"""Variant -> patterns of the weight files that are fetched of a component."""


def teacher_folder(named: Path | str, config: Path | str = "") -> Path:
    """Return a teacher's pipeline folder, converted or fetched first if it is not one.

    Args:
        named: a pipeline folder, a single-file checkpoint (.safetensors), or a hub id.
        config: for a single file, a pipeline folder of its kind: its configs, tokenizers, and any component that the
            file lacks. Those of Stable Diffusion 1.5, 2.1 and XL's base are known.

    Raises:
        UserError: a pickle, a checkpoint of an unknown architecture or without the configs of its kind, a hub that
            cannot be reached, or a config beside something that needs none.
    """
    place = Path(named)
    if not place.exists():
        named = hub_id(str(named))
        place = Path(named)
    if is_pickle(place):
        raise UserError(f"teacher = {str(named)!r} is a pickle, which is never read; {ADVICE}")
    if place.suffix.lower() in ONE_FILE or is_safetensors(place):
        return convert_single_file(place, Path(config) if config else None)
    if config:
        raise UserError(
            f"teacher_config = {str(config)!r} is for single-file teachers, and teacher = {str(named)!r} is not one"
        )
    if not place.exists() and HUB_ID.fullmatch(str(named)):
        return fetched(str(named))
    return place


def teacher_name(place: Path) -> str:
    """Return a teacher's name without its location: owner/name on a hub, a converted file's name, or the folder's."""
    parts = place.absolute().parts
    if len(parts) > 2 and parts[-2] == "snapshots" and parts[-3].startswith("models--"):
        return parts[-3].removeprefix("models--").replace("--", "/")
    if place.absolute().parent == cache_folder().absolute():
        return f"{place.name.rpartition('-')[0]}.safetensors"
    return place.absolute().name


def hub_id(named: str) -> str:
    """Return owner/name[@revision] of an address on the Hugging Face hub; any other name unchanged.

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


def fetched(named: str) -> Path:
    """Return the folder of a hub id; fetch the components that pictures are drawn with, and licences, if missing.

    Raises:
        UserError: no such repository, or the hub cannot be reached.
    """
    from huggingface_hub import snapshot_download

    name, _, revision = named.partition("@")
    names = (INDEX, MODULAR_INDEX, "README.md")
    try:
        place = Path(snapshot_download(name, revision=revision or None, allow_patterns=[*names, *LICENCES]))
        if not index_file(place).is_file():
            raise FileNotFoundError(f"it holds no {INDEX}")
        kind = str(read_mapping(index_file(place)).get("_class_name"))
        if kind not in FAMILIES:
            return place  # refused by its class when it is read, before its weights are fetched
        family = FAMILIES[kind]
        wanted = [
            *names,
            *LICENCES,
            *(f"{part}/{pattern}" for part in family.parts for pattern in SETTINGS),
        ]
        lacking = list(family.weighed)
        for variant in VARIANTS:
            wanted += [f"{part}/{pattern}" for part in lacking for pattern in WEIGHTS[variant]]
            place = Path(snapshot_download(name, revision=revision or None, allow_patterns=wanted))
            lacking = [part for part in lacking if not weight_files(place / part)]
            if not lacking:
                break
        return place
    except Exception as error:  # the hub's own classes change from version to version; none of them is ours
        raise UserError(
            f"teacher = {named!r} is neither a folder here nor could be fetched from the hub: {hub_reason(error)}"
        ) from error


REASONS = {
    "GatedRepoError": "its owner requires that you accept terms on its page and to use a token (hf auth login)",
    "RepositoryNotFoundError": "the hub has no such repository, or it is private and needs a token (hf auth login)",
    "RevisionNotFoundError": "the repository has no such revision",
    "OfflineModeIsEnabled": "HF_HUB_OFFLINE is set, and it was not fetched before",
    "LocalEntryNotFoundError": "the hub cannot be reached, and it was not fetched before",
}
"""huggingface_hub's error classes, the most special ones first -> the cause."""


def hub_reason(error: BaseException) -> str:
    """Return why a repository could not be fetched: a known cause, else the first sentence of the hub's message."""
    chain = [error, *filter(None, (error.__cause__, error.__context__))]
    names = {kind.__name__ for one in chain for kind in type(one).__mro__}
    known = next((words for name, words in REASONS.items() if name in names), None)
    return known or re.split(r"(?<=[a-z)])\. ", " ".join(str(error).split()))[0] or type(error).__name__


def teacher_path(named: Path | str, config: Path | str = "") -> Path:
    """Return a teacher's pipeline folder, converted or fetched first; the bundled one for "".

    Raises:
        UserError: as `teacher_folder`; a config without a teacher.
    """
    if config and not named:
        raise UserError(f"teacher_config = {str(config)!r} is for a single-file teacher; give --teacher, or remove it")
    return teacher_folder(named, config) if named else world("teacher").root() / "teacher"


def read_teacher(teacher: Path | str = "", config: Path | str = "") -> PipelineFolder:
    """Read a teacher's folder: the named one, or the bundled one for "".

    Args:
        teacher, config: as `teacher_folder`.

    Raises:
        UserError: as `teacher_path` and `pipeline_folder.read_folder`.
    """
    return read_folder(teacher_path(teacher, config))


def named_teacher(teacher: Path | str, config: Path | str = "") -> str:
    """Return a teacher's folder as settings name it, see `teacher_path`; "" for the bundled one."""
    return str(teacher_path(teacher, config)) if teacher or config else ""
