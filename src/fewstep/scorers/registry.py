"""The preference scorers by name, and the files of their folders. Light: torch is imported when one is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

from fewstep.backbones.weight_files import first_pickle, weight_files
from fewstep.common.choices import check_choice
from fewstep.common.errors import UserError
from fewstep.common.files import read_mapping
from fewstep.common.safetensors_header import read_safetensors_header
from fewstep.scorers.reward import PreferenceScorer

if TYPE_CHECKING:
    import torch

ScorerPrecision = Literal["fp32", "bf16", "fp16"]
"""Precision of a scorer's networks; preprocessing and the score itself are always fp32."""


GUIDE = "docs/guide/rewards.md"
TOKENIZERS = {
    "clip": (("tokenizer.json",), ("vocab.json", "merges.txt")),
    "bert": (("tokenizer.json",), ("vocab.txt",)),
}
"""Alternative sets of files that a tokenizer is loaded from."""


@dataclass(frozen=True)
class FolderLayout:
    """The files that a scorer is published as.

    Attributes:
        mark: a key of its checkpoint that other scorers' checkpoints lack.
        config: JSON file of the networks' sizes; empty where the weights' shapes state them.
        config_needed: whether the folder must hold it.
        tokenizer: key of `TOKENIZERS`; empty for a network that reads no prompt.
        guide: page that describes the folder.
    """

    mark: str
    config: str = ""
    config_needed: bool = True
    tokenizer: str = "clip"
    guide: str = GUIDE


CLIP_FOLDER = FolderLayout("vision_model.embeddings.class_embedding", "config.json")
"""A folder that transformers' CLIPModel was saved in."""
HPSV2_FOLDER = FolderLayout(
    "visual.transformer.resblocks.0.attn.in_proj_weight", "open_clip_config.json", config_needed=False
)
"""HPS v2's open_clip checkpoint; ViT-H-14 unless the config has other sizes."""
IMAGE_REWARD_FOLDER = FolderLayout("blip.visual_encoder.cls_token", "med_config.json", tokenizer="bert")
MPS_FOLDER = FolderLayout("cross_model.layers.0.0.fn.to_q.weight", "config.json")


@dataclass(frozen=True)
class ScorerFiles:
    """The files that a scorer is loaded from.

    Attributes:
        folder: where all of them lie.
        weights: the safetensors files, in name order.
        config: the networks' sizes, from JSON; empty where there is no config file.
        is_clip_folder: whether the keys are those of transformers' CLIPModel rather than the scorer's own.
    """

    folder: Path
    weights: tuple[Path, ...]
    config: dict[str, Any]
    is_clip_folder: bool


SCORERS = {
    "clip": CLIP_FOLDER,
    "pickscore": CLIP_FOLDER,
    "hpsv2": HPSV2_FOLDER,
    "image_reward": IMAGE_REWARD_FOLDER,
    "mps": MPS_FOLDER,
}
"""The layout of each scorer's folder; the module of the same name builds the scorer by its `load`."""


def find_files(folder: Path, name: str, layout: FolderLayout) -> ScorerFiles:
    """Return the files of scorer `name`. HPS v2 may also be a folder of transformers' CLIPModel.

    Raises:
        UserError: a file is missing or belongs to another scorer.
    """

    def refuse(reason: str) -> UserError:
        return UserError(f"{name} folder {str(folder)!r} {reason}; see {layout.guide}", field=str(folder))

    if not folder.is_dir():
        raise refuse("does not exist")
    if layout is HPSV2_FOLDER and (folder / CLIP_FOLDER.config).is_file() and weight_files(folder):
        layout = CLIP_FOLDER
    weights = weight_files(folder) if layout is CLIP_FOLDER else sorted(folder.glob("*.safetensors"))
    if not weights:
        pickled = first_pickle(folder.iterdir())
        found = f", but {pickled.name}; convert this pickle once" if pickled else ""
        raise refuse(f"holds no safetensors file{found}")
    if layout is not CLIP_FOLDER and weights[1:]:
        raise refuse(f"holds {weights[0].name} and {weights[1].name}, of which one must be removed")
    keys = {key for file in weights for key in read_safetensors_header(file)[1]}
    if layout.mark not in keys:
        others = [f"; its keys are those of {other!r}" for other, entry in SCORERS.items() if entry.mark in keys]
        raise refuse(f"is not of {name!r}: {weights[0].name} holds no {layout.mark!r}{''.join(others[:1])}")
    config: dict[str, Any] = {}
    if layout.config and (folder / layout.config).is_file():
        config = read_mapping(folder / layout.config)
    elif layout.config and layout.config_needed:
        raise refuse(f"holds no {layout.config}")
    if layout.config == CLIP_FOLDER.config and config.get("model_type") != "clip":
        raise refuse(f"has {layout.config} with model_type {config.get('model_type')!r}, which must be 'clip'")
    sets = TOKENIZERS[layout.tokenizer] if layout.tokenizer else ((),)
    if not any(all((folder / file).is_file() for file in files) for files in sets):
        raise refuse(f"holds no tokenizer ({' or '.join(' and '.join(files) for files in sets)})")
    return ScorerFiles(folder, tuple(weights), config, layout is CLIP_FOLDER)


def check_scorer(name: str, folder: Path | str) -> ScorerFiles:
    """Return a scorer's files from names, JSON and headers, before torch is imported and weights are read.

    Raises:
        UserError: an unknown name, or a folder that lacks a file or holds another scorer's.
    """
    check_choice("scorer", name, SCORERS)
    return find_files(Path(folder), name, SCORERS[name])


def load_scorer(
    name: str, folder: Path | str, device: torch.device | str = "cpu", precision: ScorerPrecision = "fp32"
) -> PreferenceScorer:
    """Load a scorer from a folder of safetensors and JSON. Nothing is downloaded, nothing unpickled.

    Args:
        name: one of `SCORERS`.
        folder: with the files that docs/guide/rewards.md lists.
        device: where its networks run.
        precision: of its networks.

    Returns:
        The scorer, its networks frozen and in eval mode.

    Raises:
        UserError: as `check_scorer`, another precision, or weights with missing or unknown keys or other shapes.
    """
    files = check_scorer(name, folder)
    check_choice("precision", precision, get_args(ScorerPrecision))
    import torch

    from fewstep.common.device import DTYPES

    module = import_module(f"fewstep.scorers.{name}")
    return cast(PreferenceScorer, module.load(files, torch.device(device), DTYPES[precision]))
