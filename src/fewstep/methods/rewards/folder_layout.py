"""What lies in a scorer's folder, found out from names, JSON and headers: fast, and without torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewstep.backbones.pipeline_folder import weight_files
from fewstep.backbones.unsafe_weights import first_pickle
from fewstep.common.errors import UserError
from fewstep.common.files import read_mapping
from fewstep.common.safetensors_header import read_safetensors_header

GUIDE = "docs/guide/rewards.md"
CLIP_MARK = "vision_model.embeddings.class_embedding"
"""A key of transformers' CLIPModel, as of its folders."""
MARKS = {
    "hpsv2": "visual.transformer.resblocks.0.attn.in_proj_weight",
    "image_reward": "blip.visual_encoder.cls_token",
    "mps": "cross_model.layers.0.0.fn.to_q.weight",
}
"""One key that a scorer's own checkpoint has and no other scorer's."""
TOKENIZERS = {
    "clip": (("tokenizer.json",), ("vocab.json", "merges.txt")),
    "bert": (("tokenizer.json",), ("vocab.txt",)),
}
"""What a tokenizer is made from: any of these sets of files."""


@dataclass(frozen=True)
class ScorerFiles:
    """What a scorer is loaded from.

    Attributes:
        folder: where all of it lies.
        weights: the safetensors files, in name order.
        config: of the networks, from JSON; empty where the checkpoint's shapes say all.
        published: whether the keys are those of transformers' CLIPModel rather than the scorer's own.
    """

    folder: Path
    weights: tuple[Path, ...]
    config: dict[str, Any]
    published: bool = False


def clip_files(folder: Path, name: str) -> ScorerFiles:
    """A folder that transformers' CLIPModel was saved in: config.json, weights, tokenizer.

    Raises:
        UserError: it is none, or something is missing.
    """
    _check_folder(folder, name)
    config = _clip_config(folder, name)
    weights = tuple(weight_files(folder))
    if not weights:
        raise UserError(_without_weights(folder, name, "model.safetensors"))
    keys = {key for file in weights for key in read_safetensors_header(file)[1]}
    if CLIP_MARK not in keys:
        raise UserError(_foreign(weights[0], name, CLIP_MARK, keys))
    _check_tokenizer(folder, name, "clip")
    return ScorerFiles(folder, weights, config, published=True)


def hpsv2_files(folder: Path, name: str) -> ScorerFiles:
    """HPS v2's open_clip checkpoint as safetensors beside CLIP's tokenizer, or a folder of transformers' CLIPModel.

    An `open_clip_config.json` is read where there is one; without it the network is ViT-H-14.

    Raises:
        UserError: it is neither, or something is missing.
    """
    _check_folder(folder, name)
    if (folder / "config.json").is_file() and weight_files(folder):
        return clip_files(folder, name)
    weights = _own_checkpoint(folder, name)
    config = folder / "open_clip_config.json"
    _check_tokenizer(folder, name, "clip")
    return ScorerFiles(folder, (weights,), read_mapping(config).get("model_cfg", {}) if config.is_file() else {})


def image_reward_files(folder: Path, name: str) -> ScorerFiles:
    """ImageReward's checkpoint as safetensors, its med_config.json, and bert-base-uncased's tokenizer.

    Raises:
        UserError: something is missing.
    """
    _check_folder(folder, name)
    weights = _own_checkpoint(folder, name)
    if not (folder / "med_config.json").is_file():
        raise UserError(f"{name} folder {folder} holds no med_config.json; it is published beside ImageReward.pt")
    _check_tokenizer(folder, name, "bert")
    return ScorerFiles(folder, (weights,), read_mapping(folder / "med_config.json"))


def mps_files(folder: Path, name: str) -> ScorerFiles:
    """MPS's checkpoint as safetensors, with config.json and tokenizer of the CLIP-H that it was built on.

    Raises:
        UserError: something is missing.
    """
    _check_folder(folder, name)
    weights = _own_checkpoint(folder, name)
    config = _clip_config(folder, name)
    _check_tokenizer(folder, name, "clip")
    return ScorerFiles(folder, (weights,), config)


Find = Callable[[Path, str], ScorerFiles]


def _check_folder(folder: Path, name: str) -> None:
    if not folder.is_dir():
        raise UserError(f"{name} folder {str(folder)!r} does not exist; see {GUIDE} for what it holds")


def _clip_config(folder: Path, name: str) -> dict[str, Any]:
    file = folder / "config.json"
    if not file.is_file():
        raise UserError(f"{name} folder {folder} holds no config.json of a CLIPModel; see {GUIDE}")
    config = read_mapping(file)
    if config.get("model_type") != "clip":
        raise UserError(f"{file} has model_type {config.get('model_type')!r}; the nearest legal one is 'clip'")
    return config


def _own_checkpoint(folder: Path, name: str) -> Path:
    """The one safetensors file of a folder, if its keys are this scorer's."""
    found = sorted(folder.glob("*.safetensors"))
    if not found:
        raise UserError(_without_weights(folder, name, "a .safetensors file"))
    if found[1:]:
        raise UserError(f"{name} folder {folder} holds {found[0].name} and {found[1].name}; leave one checkpoint in it")
    keys = set(read_safetensors_header(found[0])[1])
    if MARKS[name] not in keys:
        raise UserError(_foreign(found[0], name, MARKS[name], keys))
    return found[0]


def _without_weights(folder: Path, name: str, wanted: str) -> str:
    pickled = first_pickle(folder.iterdir())
    if pickled:
        return (
            f"{name} folder {folder} holds {pickled.name} but not {wanted}; pickles are never read: convert it "
            f"once, as {GUIDE} shows"
        )
    return f"{name} folder {folder} does not hold {wanted}; see {GUIDE}"


def _foreign(file: Path, name: str, mark: str, keys: set[str]) -> str:
    others = [other for other, key in MARKS.items() if key in keys] + ["clip"] * (CLIP_MARK in keys)
    known = f"; its keys are those of {others[0]!r}" if others else f"; its first is {min(keys, default='none')!r}"
    return f"{file} is no checkpoint of {name!r}: it holds no {mark!r}{known}"


def _check_tokenizer(folder: Path, name: str, kind: str) -> None:
    sets = TOKENIZERS[kind]
    if not any(all((folder / file).is_file() for file in files) for files in sets):
        wanted = " or ".join(" and ".join(files) for files in sets)
        raise UserError(f"{name} folder {folder} holds no tokenizer ({wanted}); see {GUIDE} for where it comes from")
