"""The record of an adapter's folder, read and checked against a teacher before torch is imported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fewstep.backbones.pipeline_folder import PipelineFolder
from fewstep.common.errors import UserError
from fewstep.common.extras import check_installed
from fewstep.common.files import read_mapping
from fewstep.inference.multilingual.settings import PACKAGES

WEIGHTS = "adapter.safetensors"
RECORD = "adapter.json"
FIELDS = ("teacher", "sentence", "settings", "shapes", "weights_sha256")
"""Required entries of a record."""


def text_side(folder: PipelineFolder) -> str:
    """Return a fingerprint of a teacher's text encoder and tokenizer."""
    return folder.identity("text_encoder", "tokenizer")


def read_adapter(place: Path | str, folder: PipelineFolder) -> dict[str, Any]:
    """Read an adapter's record.

    Args:
        place: its folder.
        folder: the teacher.

    Raises:
        UserError: no adapter, one that retrieves captions, one of another teacher's text encoder, or its sentence
            encoder is not installed.
    """
    path = Path(place) / RECORD
    if not path.is_file():
        raise UserError(f"adapter = {str(place)!r} holds no {RECORD}; give a folder that train-adapter wrote")
    record = read_mapping(path)
    if "captions" in record:
        raise UserError(
            f"adapter = {str(place)!r} retrieves captions, which is no longer supported; train a new one with "
            "fewstep train-adapter"
        )
    missing = [field for field in FIELDS if field not in record]
    if missing:
        raise UserError(f"{path} is not an adapter's record: {missing[0]} is missing")
    expected, found = str(record["teacher"]), text_side(folder)
    if expected != found:
        raise UserError(
            f"adapter = {str(place)!r} was trained for the text encoder {expected[:16]}, and {folder.path} has "
            f"{found[:16]}; give the teacher that it was trained for, or train another"
        )
    check_installed("an adapter", PACKAGES, extra="multilingual")
    return record
