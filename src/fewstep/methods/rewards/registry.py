"""The preference scorers by name. Light: torch and transformers are imported when one is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast, get_args

from fewstep.common.errors import UserError, did_you_mean
from fewstep.methods.rewards import folder_layout as layout
from fewstep.methods.rewards import licences
from fewstep.methods.rewards.folder_layout import FolderLayout, ScorerFiles, find_files
from fewstep.methods.rewards.reward import PreferenceScorer, ScorerIdentity

if TYPE_CHECKING:
    import torch

ScorerPrecision = Literal["fp32", "bf16", "fp16"]
"""Precision of a scorer's networks; preprocessing and the score itself are always fp32."""


@dataclass(frozen=True)
class ScorerEntry:
    """One scorer: its published facts, its folder's layout, and the module whose `load` builds it."""

    identity: ScorerIdentity
    layout: FolderLayout
    module: str


SCORERS = {
    entry.identity.name: entry
    for entry in (
        ScorerEntry(licences.CLIP, layout.CLIP_FOLDER, "clip"),
        ScorerEntry(licences.PICKSCORE, layout.CLIP_FOLDER, "pickscore"),
        ScorerEntry(licences.HPSV2, layout.HPSV2_FOLDER, "hpsv2"),
        ScorerEntry(licences.IMAGE_REWARD, layout.IMAGE_REWARD_FOLDER, "image_reward"),
        ScorerEntry(licences.MPS, layout.MPS_FOLDER, "mps"),
    )
}


def check_scorer(name: str, folder: Path | str) -> ScorerFiles:
    """Return a scorer's files from names, JSON and headers, before torch is imported and weights are read.

    Raises:
        UserError: an unknown name, or a folder that lacks a file or holds another scorer's.
    """
    if name not in SCORERS:
        raise UserError(
            f"scorer = {name!r} must be one of {', '.join(SCORERS)}{did_you_mean(name, SCORERS)}", field="scorer"
        )
    return find_files(Path(folder), name, SCORERS[name].layout)


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
    if precision not in get_args(ScorerPrecision):
        raise UserError(
            f"precision = {precision!r} must be one of {', '.join(get_args(ScorerPrecision))}", field="precision"
        )
    import torch

    from fewstep.common.device import DTYPES

    module = import_module(f"fewstep.methods.rewards.{SCORERS[name].module}")
    return cast(PreferenceScorer, module.load(files, torch.device(device), DTYPES[precision]))
