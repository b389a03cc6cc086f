"""The preference scorers by name. Light: torch and transformers come in when one is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast, get_args

from fewstep.common.errors import UserError, nearest
from fewstep.methods.rewards import folder_layout as layout
from fewstep.methods.rewards import licences as facts
from fewstep.methods.rewards.folder_layout import Find, ScorerFiles
from fewstep.methods.rewards.licences import Facts
from fewstep.methods.rewards.reward import PreferenceScorer

if TYPE_CHECKING:
    import torch

Computes = Literal["fp32", "bf16", "fp16"]
"""What a scorer's networks compute in; preprocessing and the score itself are fp32 always."""


@dataclass(frozen=True)
class Entry:
    """One scorer: what is published of it, what its folder must hold, and the module whose `load` makes it."""

    facts: Facts
    find: Find
    module: str


SCORERS = {
    entry.facts.name: entry
    for entry in (
        Entry(facts.CLIP, layout.clip_files, "clip"),
        Entry(facts.PICKSCORE, layout.clip_files, "pickscore"),
        Entry(facts.HPSV2, layout.hpsv2_files, "hpsv2"),
        Entry(facts.IMAGE_REWARD, layout.image_reward_files, "image_reward"),
        Entry(facts.MPS, layout.mps_files, "mps"),
    )
}


def check_scorer(name: str, folder: Path | str) -> ScorerFiles:
    """Refuse what cannot be loaded, before torch is imported: names, JSON and headers are read, no weights.

    Raises:
        UserError: an unknown name, or a folder that lacks a file or holds another scorer's.
    """
    if name not in SCORERS:
        raise UserError(f"scorer = {name!r} is not known; the nearest legal one is {nearest(name, SCORERS)!r}")
    return SCORERS[name].find(Path(folder), name)


def load_scorer(
    name: str, folder: Path | str, device: torch.device | str = "cpu", precision: Computes = "fp32"
) -> PreferenceScorer:
    """Load a scorer from a folder of safetensors and JSON; nothing is downloaded, nothing unpickled.

    Args:
        name: one of `SCORERS`.
        folder: what docs/guide/rewards.md lists for it.
        device: where its networks run.
        precision: what they compute in.

    Returns:
        The scorer, its networks frozen and in eval mode.

    Raises:
        UserError: what `check_scorer` refuses, another precision, or weights that lack a key, hold a foreign one or
            have other shapes.
    """
    files = check_scorer(name, folder)
    if precision not in get_args(Computes):
        raise UserError(
            f"precision = {precision!r}; the nearest legal one is {nearest(precision, get_args(Computes))!r}"
        )
    import torch

    from fewstep.common.device import DTYPES

    module = import_module(f"fewstep.methods.rewards.{SCORERS[name].module}")
    return cast(PreferenceScorer, module.load(files, torch.device(device), DTYPES[precision]))
