"""CLIP's vocabulary of 49,408 tokens, for single-file checkpoints of Stable Diffusion 1.x, 2.x and XL.

Such files lack it, and it is too large to ship; it is searched for in other programs, packages and on the hub.
"""

from __future__ import annotations

import gzip
import importlib.util
import json
from pathlib import Path

from fewstep.common.errors import UserError
from fewstep.common.files import atomic_folder, read_mapping

FILES = ("vocab.json", "merges.txt")
PACKAGES = ("open_clip", "clip")
"""Packages that hold the merges as `bpe_simple_vocab_16e6.txt.gz`; they are not imported."""
HUB = "openai/clip-vit-large-patch14"
TOKENS = 49408
_SPECIAL = ("<|startoftext|>", "<|endoftext|>")


def clip_vocabulary(near: Path, cache: Path) -> tuple[Path, Path]:
    """Return CLIP's vocab.json and merges.txt.

    They are searched for in the ComfyUI that a checkpoint lies in, in installed packages, and on the hub or its cache.

    Args:
        near: the checkpoint.
        cache: folder for what is made of a package's merges.

    Raises:
        UserError: none was found.
    """
    for parent in near.resolve().parents:
        for folder in (parent / "comfy" / "sd1_tokenizer", parent / "ComfyUI" / "comfy" / "sd1_tokenizer"):
            if all((folder / name).is_file() for name in FILES):
                return _checked(folder)
    for package in PACKAGES:
        if merges := _merges_of(package):
            place = cache / f"clip-vocabulary-{package}"
            if not all((place / name).is_file() for name in FILES):
                vocabulary, lines = vocabulary_of(merges)
                with atomic_folder(place) as part:
                    (part / FILES[0]).write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
                    (part / FILES[1]).write_text("\n".join(["#version: 0.2", *lines, ""]), encoding="utf-8")
            return _checked(place)
    return _from_hub(near)


def _merges_of(package: str) -> Path | None:
    """Return the file of merges in an installed package, None if there is none."""
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        file = Path(folder) / "bpe_simple_vocab_16e6.txt.gz"
        if file.is_file():
            return file
    return None


def vocabulary_of(merges: Path) -> tuple[dict[str, int], list[str]]:
    """Return CLIP's tokens and merges from its original file of merges.

    Tokens are the 256 bytes as printable characters, the same at the end of a word, one for each of the first 48,894
    merges, and two special ones.
    """
    lines = gzip.decompress(merges.read_bytes()).decode("utf-8").split("\n")[1 : TOKENS - 2 - 2 * 256 + 1]
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    letters = [*map(chr, plain), *(chr(256 + place) for place in range(len(others)))]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(line.split()) for line in lines), *_SPECIAL]
    return {token: number for number, token in enumerate(tokens)}, lines


def _from_hub(near: Path) -> tuple[Path, Path]:
    from huggingface_hub import hf_hub_download

    try:
        first, second = (Path(hf_hub_download(HUB, name)) for name in FILES)
    except Exception as error:  # the hub's own classes change from version to version; none of them is ours
        raise UserError(
            f"teacher = {str(near)!r} is one file, and CLIP's vocabulary, which its tokenizer needs, was not found "
            f"({HUB} could not be fetched: {type(error).__name__}); give --teacher-config FOLDER, a diffusers pipeline "
            "of its kind (configs and tokenizers suffice), go online once, or `pip install --no-deps open_clip_torch`"
        ) from error
    return _checked(first.parent) if first.parent == second.parent else (first, second)


def _checked(folder: Path) -> tuple[Path, Path]:
    """Return a folder's vocabulary files.

    Raises:
        UserError: another vocabulary than CLIP's, or a broken file.
    """
    tokens = read_mapping(folder / FILES[0])
    if len(tokens) != TOKENS or tokens.get(_SPECIAL[1]) != TOKENS - 1 or tokens.get("cat</w>") != 2368:
        raise UserError(
            f"{folder / FILES[0]} is not CLIP's vocabulary of {TOKENS} tokens; give --teacher-config FOLDER instead"
        )
    return folder / FILES[0], folder / FILES[1]
