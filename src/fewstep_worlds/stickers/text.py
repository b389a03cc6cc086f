"""The teacher's text encoder: a BERT of a few layers, of whose word pieces those are kept that the grammar uses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from fewstep.common.errors import UserError
from fewstep.common.files import atomic_folder, read_json
from fewstep.common.tensors import save_tensors
from fewstep_worlds.stickers.grammar import languages

TOKENS = 28
"""Tokens of a prompt, [CLS] and [SEP] included; 1 prompt of 1,000 is longer, and loses its end."""
EMBEDDING = "embeddings.word_embeddings.weight"


def trim_text(source: Path, target: Path) -> None:
    """Write `target`/text_encoder and `target`/tokenizer: those of `source` with the pieces of English sentences.

    Single characters are kept too, so that other words are spelt. States of a sentence do not change.

    Args:
        source: folder with the text_encoder/ and tokenizer/ of a BertModel with a WordPiece vocabulary.

    Raises:
        UserError: it lacks one of them.
    """
    from tokenizers import Tokenizer
    from transformers import BertModel

    for file in (source / "text_encoder" / "config.json", source / "tokenizer" / "tokenizer.json"):
        if not file.is_file():
            raise UserError(f"text = {str(source)!r} lacks {file.relative_to(source)}; give the folder of a pipeline")
    full = Tokenizer.from_file(str(source / "tokenizer" / "tokenizer.json"))
    pieces = _used_pieces(full)
    ids = full.get_vocab()
    encoder = BertModel.from_pretrained(
        source / "text_encoder", local_files_only=True, use_safetensors=True, dtype=torch.float32
    )
    state = {name: value.half().contiguous() for name, value in encoder.state_dict().items()}
    state[EMBEDDING] = state[EMBEDDING][[ids[piece] for piece in pieces]].contiguous()
    encoder.config.vocab_size = len(pieces)
    with atomic_folder(target) as part:
        encoder.config.save_pretrained(part / "text_encoder")
        save_tensors(part / "text_encoder" / "model.safetensors", state, metadata={"format": "pt"})
        (part / "tokenizer").mkdir()
        _with_pieces(full, pieces).save(str(part / "tokenizer" / "tokenizer.json"))
        settings = read_json(source / "tokenizer" / "tokenizer_config.json") | {"model_max_length": TOKENS}
        (part / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
        (part / "tokenizer" / "vocab.txt").write_text("".join(f"{piece}\n" for piece in pieces), encoding="utf-8")


def _used_pieces(full: Any) -> list[str]:
    """Return special tokens, single characters, and the pieces of every phrase of the grammar, in their old order."""
    tables = languages()["english"]
    pairs = [*tables.joints, *tables.grounds]
    phrases = [*tables.nouns, *tables.styles, *(phrase for pair in pairs for phrase in pair)]
    used = {piece for found in full.encode_batch(phrases) for piece in found.tokens}
    used |= {token.content for token in full.get_added_tokens_decoder().values()}
    ids = full.get_vocab()
    kept = (piece for piece in ids if piece in used or len(piece.removeprefix("##")) == 1)
    return sorted(kept, key=ids.__getitem__)


def _with_pieces(full: Any, pieces: list[str]) -> Any:
    """Return the tokenizer with `pieces` as its whole vocabulary, numbered in that order."""
    spec = json.loads(full.to_str())
    ids = {piece: number for number, piece in enumerate(pieces)}
    spec["model"]["vocab"] = ids
    for token in spec["added_tokens"]:
        token["id"] = ids[token["content"]]
    for name, token in spec["post_processor"]["special_tokens"].items():
        token["ids"] = [ids[name]]
    return type(full).from_str(json.dumps(spec))
