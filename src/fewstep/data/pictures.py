"""Captioned pictures: the bundled set, or a folder of one's own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from fewstep.errors import UserError

SUFFIXES = (".png", ".webp", ".jpg", ".jpeg", ".bmp")


@dataclass(frozen=True)
class Captioned:
    """Pictures uint8 [N, H, W, 3] and, for each, one or more captions to draw from."""

    pictures: np.ndarray
    captions: Sequence[Sequence[str]]


def bundled(captions: int, seed: int) -> Captioned:
    """Emoji-8's training split with `captions` captions a picture."""
    from fewstep.world import emoji8

    data = emoji8.load("train")
    return Captioned(data.pictures, emoji8.caption_table(data.records, captions, seed))


def read_picture(path: Path, size: int) -> np.ndarray:
    """Read a picture as uint8 [size, size, 3]: transparent parts on white, centre crop, Lanczos.

    Raises:
        UserError: not a readable picture.
    """
    try:
        with Image.open(path) as image:
            rgba = ImageOps.exif_transpose(image).convert("RGBA")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"cannot read picture {path}: {error}") from error
    flat = Image.new("RGBA", rgba.size, "white")
    flat.alpha_composite(rgba)
    edge = min(flat.size)
    left, top = (flat.width - edge) // 2, (flat.height - edge) // 2
    square = flat.convert("RGB").crop((left, top, left + edge, top + edge))
    return np.asarray(square.resize((size, size), Image.Resampling.LANCZOS))


def from_folder(folder: Path, size: int) -> Captioned:
    """Read a folder of pictures with captions.

    Captions come from `metadata.jsonl` (lines {"file_name": ..., "text": ...}, the Hugging Face form), or from a
    `.txt` file beside each picture.

    Raises:
        UserError: no folder, no pictures, or a picture without caption.
    """
    if not folder.is_dir():
        raise UserError(f"data = {str(folder)!r} is not a folder; give a folder of pictures or 'emoji8'")
    index = folder / "metadata.jsonl"
    listed = _listed(index) if index.is_file() else {}
    if listed:
        captioned = {folder / name: text for name, text in listed.items()}
    else:
        files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES)
        captioned = {file: _caption_beside(file) for file in files}
    if not captioned:
        raise UserError(f"data = {str(folder)!r} holds no picture ({', '.join(SUFFIXES)})")
    return Captioned(
        np.stack([read_picture(file, size) for file in captioned]), [[text] for text in captioned.values()]
    )


def _listed(index: Path) -> dict[str, str]:
    """file_name -> text of a metadata.jsonl."""
    table = {}
    try:
        for line in index.read_text(encoding="utf-8").split("\n"):
            if line.strip():
                row = json.loads(line)
                name, text = row["file_name"], row["text"]
                if not isinstance(name, str) or not isinstance(text, str):
                    raise TypeError(f"{line.strip()[:80]} is not text")
                table[name] = text.strip()
    except KeyError as error:
        raise UserError(f"{index} needs lines with file_name and text: {error} is missing") from error
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{index} needs lines with file_name and text: {error}") from error
    return table


def _caption_beside(file: Path) -> str:
    beside = file.with_suffix(".txt")
    if not beside.is_file():
        raise UserError(f"picture {file} has no caption: write {beside.name} beside it or a metadata.jsonl")
    try:
        return beside.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read caption {beside}: {error}") from error
