"""The tensors of a checkpoint that no network takes: known to be without effect, or refused by name."""

from __future__ import annotations

import re
from collections.abc import Sequence

from fewstep.backbones.pipeline_folder import PipelineFolder
from fewstep.backbones.scheduler_config import sigmas_at
from fewstep.backbones.single_file.reader import Reader
from fewstep.backbones.single_file.recognise import TABLES
from fewstep.common.errors import UserError

_TOLERANCE = 1e-2
"""Largest difference of alpha^2 in a file (often fp16) from the schedule's."""


def account(reader: Reader, folder: PipelineFolder, elsewhere: Sequence[str] = ()) -> str:
    """Refuse a checkpoint with tensors that nothing has read; return one line that counts those without effect.

    Args:
        elsewhere: prefixes of components that are taken from the folder of configs.

    Raises:
        UserError: naming the first tensor that nothing reads, or a noise schedule other than the config's.
    """
    counts: dict[str, int] = {}
    extra = _penultimate(folder)
    for key in reader.unread():
        if key == "alphas_cumprod":
            _check_noise(reader, folder)
            continue
        what = next((what for pattern, what in TABLES["unused"].items() if re.fullmatch(pattern, key)), None)
        if what is None and extra and key.startswith(extra):
            what = "the text encoder's last block, whose states are not used"
        if what is None and key.startswith(tuple(elsewhere)):
            what = "components that come from the config folder"
        if what is None:
            raise UserError(
                f"teacher = {str(reader.file)!r} holds {key!r}, which nothing reads; it "
                "is of another kind than its config, or has parts that are not supported"
            )
        if what != "marks":
            counts[what] = counts.get(what, 0) + 1
    line = "; ".join(f"{count} tensor{'s' * (count > 1)} of {what}" for what, count in sorted(counts.items()))
    return f"{reader.file.name}: not used: {line}" if line else ""


def _penultimate(folder: PipelineFolder) -> str:
    """Return the prefix of 2.x's last text block, which configs leave out as its states are not used; else ""."""
    if folder.family.encoders != ("text_encoder",) or folder.config("text_encoder").get("hidden_act") != "gelu":
        return ""
    layers = folder.config("text_encoder").get("num_hidden_layers")
    return f"cond_stage_model.model.transformer.resblocks.{layers}."


def _check_noise(reader: Reader, folder: PipelineFolder) -> None:
    """Refuse a file whose own table of alpha^2 is not that of the scheduler's config."""
    table = reader.get("alphas_cumprod").double().flatten()
    own = sigmas_at(folder.config("scheduler"), range(len(table)))
    if own is None or max(abs(float(a) - (1 - s**2)) for a, s in zip(table, own, strict=True)) > _TOLERANCE:
        raise UserError(
            f"teacher = {str(reader.file)!r} has another noise schedule (alphas_cumprod) than {folder.path}; give "
            "--teacher-config FOLDER with a scheduler of that noise"
        )
