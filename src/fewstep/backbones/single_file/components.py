"""The weights of a single-file checkpoint by component, written as a pipeline folder.

Stable Diffusion's names are mapped by `sd_checkpoint`, the table that exports are written by, so that every tensor is
accounted for by name. Transformers are renamed by diffusers' own converters.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.backbones.loading import loading
from fewstep.backbones.pipeline_folder import INDEX, PipelineFolder, folder_of
from fewstep.backbones.pipeline_writer import copy_component, copy_licences
from fewstep.backbones.scheduler_config import prediction_of
from fewstep.backbones.single_file.accounting import account
from fewstep.backbones.single_file.reader import Reader
from fewstep.backbones.single_file.recognise import Checkpoint
from fewstep.backbones.single_file.sd_checkpoint import Place, text_keys, unet_keys, vae_keys
from fewstep.backbones.weight_files import weight_files
from fewstep.common.errors import UserError
from fewstep.common.files import read_mapping, write_json
from fewstep.common.safetensors_header import Shape

_OTHER_COMPONENTS = ("first_stage_model.", "vae.", "text_encoders.", "cond_stage_model.", "conditioner.")
"""Prefixes of the other components in a whole checkpoint of a transformer."""


def network_of(folder: PipelineFolder, component: str) -> nn.Module:
    """Build a component from its config, without weights (on torch's meta device).

    Raises:
        UserError: a config that its class does not take.
    """
    import diffusers
    import transformers

    library, kind = folder.components[component]
    config = folder.config(component)
    with loading(str(folder.path / component)), torch.device("meta"):
        made: Any
        if library == "diffusers":
            made = getattr(diffusers, kind).from_config(config)
        else:
            cls: Any = getattr(transformers, kind, None)
            if cls is None or not hasattr(cls, "config_class"):
                raise UserError(f"{folder.path / component} is a {kind}, which transformers does not have")
            made = cls(cls.config_class(**config))
    network: nn.Module = made
    return network


def checkpoint_places(
    folder: PipelineFolder, networks: Mapping[str, nn.Module], checkpoint: Checkpoint
) -> dict[str, dict[str, Place]]:
    """Return, for each component of Stable Diffusion 1.x, 2.x or XL, its tensors' places in a checkpoint."""
    names = {part: list(network.state_dict()) for part, network in networks.items()}
    encoders = folder.family.encoders
    acts = [str(folder.config(part).get("hidden_act")) for part in encoders]
    texts = text_keys([(act, names[part]) for act, part in zip(acts, encoders, strict=True)])
    return {
        folder.network: unet_keys(names[folder.network], checkpoint.prefix),
        "vae": vae_keys(names["vae"]),
        **dict(zip(encoders, texts, strict=True)),
    }


def fill(network: nn.Module, keys: Mapping[str, Place], reader: Reader, dtype: torch.dtype, component: str) -> None:
    """Load the weights of a checkpoint into a network without weights.

    Raises:
        UserError: naming the first tensor that the file lacks, or that has another shape.
    """
    wanted = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    lacking = sorted(name for name in wanted if name not in keys or keys[name].key not in reader)
    lacking = [name for name in lacking if not name.endswith("position_ids")]
    if lacking:
        more = f" and {len(lacking) - 1} more" if lacking[1:] else ""
        key = keys[lacking[0]].key if lacking[0] in keys else lacking[0]
        raise UserError(
            f"teacher = {str(reader.file)!r} holds no {key!r}{more}, of the {component}; it is incomplete, or its "
            "network is of another size: give --teacher-config FOLDER, a pipeline folder of its kind"
        )
    weights = {}
    for name, shape in wanted.items():
        if name in keys:
            weights[name] = _in_layout(reader.get(keys[name].key), keys[name], shape, reader.file).to(dtype)
    network.load_state_dict(weights, assign=True, strict=False)


def _in_layout(value: Tensor, held: Place, shape: Shape, file: Path) -> Tensor:
    """Return a tensor of a checkpoint in the layout of diffusers."""
    if held.third is not None and len(value) == 3 * shape[0]:
        value = value[held.third * shape[0] :][: shape[0]]
    if held.turned:
        value = value.T
    plain = tuple(size for size in value.shape if size != 1) == tuple(size for size in shape if size != 1)
    if value.dim() != len(shape) and plain:  # 1 x 1 convolutions and matrices are the same
        value = value.reshape(shape)
    if tuple(value.shape) != shape:
        raise UserError(
            f"teacher = {str(file)!r}: {held.key!r} is {tuple(value.shape)}, its config makes it {shape}; give "
            "--teacher-config FOLDER, a pipeline folder of its kind"
        )
    return value.contiguous().clone() if value._is_view() else value.contiguous()


def write_components(checkpoint: Checkpoint, config: Path, part: Path) -> list[str]:
    """Write a checkpoint as a pipeline folder; return lines to print about it.

    Weights have the dtype that the file's matrices share, else fp32. Components that the file lacks are copied from
    the folder of configs.

    Raises:
        UserError: a checkpoint that does not fit its config, or has tensors that nothing reads.
    """
    index = read_mapping(config / INDEX)
    folder = folder_of(config, index, f"teacher_config = {str(config)!r}")  # may hold configs and tokenizers alone
    lines = []
    with Reader(checkpoint.file, checkpoint.metadata, checkpoint.entries) as reader:
        if checkpoint.transformer:
            made = {folder.network: _transformer(folder, reader, checkpoint)}
        else:
            made = _stable_diffusion(folder, reader, checkpoint)
        if line := account(reader, folder, _OTHER_COMPONENTS if checkpoint.transformer else ()):
            lines.append(line)
    for name in folder.family.parts:
        if name in made:
            continue
        if not (config / name).is_dir() or (name in folder.family.weighed and not weight_files(config / name)):
            raise UserError(
                f"teacher = {str(checkpoint.file)!r} holds no {name}, and neither does {config}; give "
                f"--teacher-config FOLDER, a {checkpoint.pipeline} with one"
            )
        copy_component(config / name, part / name)
    for name, network in made.items():
        saver: Any = network
        saver.save_pretrained(part / name, safe_serialization=True)
    for name in set(folder.components) - set(folder.family.parts):
        index[name] = [None, None]
    if "requires_safety_checker" in index:
        index["requires_safety_checker"] = False
    write_json(part / INDEX, index)
    copy_licences(config, part)
    if checkpoint.version and not checkpoint.transformer:
        lines.insert(0, _read_as(checkpoint, folder))
    return lines


def _stable_diffusion(folder: PipelineFolder, reader: Reader, checkpoint: Checkpoint) -> dict[str, nn.Module]:
    """Return the networks of Stable Diffusion 1.x, 2.x or XL that a checkpoint holds."""
    clip = [name for name in folder.family.encoders if folder.components[name][1].startswith("CLIPText")]
    parts = [folder.network, "vae", *(clip if len(clip) == len(folder.family.encoders) else [])]
    networks = {name: network_of(folder, name) for name in parts if (folder.path / name).is_dir()}
    keys = checkpoint_places(folder, networks, checkpoint)
    held = {name: own for name, own in keys.items() if any(place.key in reader for place in own.values())}
    dtype = reader.shared_type(place.key for own in held.values() for place in own.values())
    for name, own in held.items():
        fill(networks[name], own, reader, dtype, name)
    return {name: networks[name] for name in held}


def _transformer(folder: PipelineFolder, reader: Reader, checkpoint: Checkpoint) -> nn.Module:
    """Return the transformer of Stable Diffusion 3 or Flux that a checkpoint holds, renamed by diffusers."""
    from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

    network = network_of(folder, folder.network)
    names = [name for name in reader.names if name.startswith(checkpoint.prefix) and not reader.beside(name)]
    if not checkpoint.prefix:
        names = [name for name in names if not name.startswith(_OTHER_COMPONENTS)]
    dtype = reader.shared_type(names)
    weights = {name.removeprefix(checkpoint.prefix): reader.get(name) for name in names}
    try:
        found = SINGLE_FILE_LOADABLE_CLASSES[checkpoint.transformer]["checkpoint_mapping_fn"](checkpoint=weights)
    except (KeyError, IndexError, ValueError, RuntimeError) as error:
        raise UserError(
            f"teacher = {str(reader.file)!r} is not a complete {checkpoint.transformer}: {error!r}; "
            "give a checkpoint of the published architecture"
        ) from error
    reader.read -= {
        reader.names[f"{checkpoint.prefix}{name}"] for name in weights
    }  # what diffusers has left unconverted
    own = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    wrong = sorted(name for name in own if name not in found or tuple(found[name].shape) != own[name])
    if wrong or set(found) - set(own):
        name = wrong[0] if wrong else min(set(found) - set(own))
        shape = tuple(found[name].shape) if name in found else None
        raise UserError(
            f"teacher = {str(reader.file)!r} does not fit {folder.path / folder.network}: {name} is {shape}, its "
            f"config makes it {own.get(name)}; give --teacher-config FOLDER of the same size"
        )
    network.load_state_dict({name: value.to(dtype).contiguous() for name, value in found.items()}, assign=True)
    return network


def _read_as(checkpoint: Checkpoint, folder: PipelineFolder) -> str:
    """Return one line: which kind a checkpoint was read as, and why."""
    kinds = {"sd1": "Stable Diffusion 1.x", "sd2": "Stable Diffusion 2.x", "sdxl": "Stable Diffusion XL"}
    by_config = prediction_of(folder.config("scheduler"), str(folder.path))
    if checkpoint.prediction:
        why = f"predicts {checkpoint.prediction}, by the file"
    elif checkpoint.guess == by_config:
        why = f"predicts {checkpoint.guess}, as its weights suggest"
    else:
        why = f"predicts {by_config}, by its config"
    return f"{checkpoint.file.name}: read as {kinds[str(checkpoint.version)]} that {why}; configs from {folder.path}"
