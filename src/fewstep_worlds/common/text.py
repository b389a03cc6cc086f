"""The text encoders of teachers: BERTs of a few layers with the word pieces that a world needs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.common.errors import UserError
from fewstep.common.files import atomic_folder, read_json
from fewstep.common.tensors import save_tensors

EMBEDDING = "embeddings.word_embeddings.weight"


def load_text_encoder(folder: Path) -> tuple[Any, Any]:
    """Return the tokenizer and the frozen fp32 BertModel of a pipeline folder."""
    from transformers import AutoTokenizer, BertModel

    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
    encoder: Any = BertModel.from_pretrained(
        folder / "text_encoder", local_files_only=True, use_safetensors=True, dtype=torch.float32
    )
    return tokenizer, encoder.eval().requires_grad_(False)


def trim_text(source: Path, target: Path, phrases: Sequence[str], tokens: int, layers: int | None = None) -> None:
    """Write `target`/text_encoder and `target`/tokenizer: those of `source` with the word pieces of some phrases.

    Single ASCII characters are kept too, so that other words are spelt. States of a sentence do not change, apart from
    those that layers are left out of.

    Args:
        source: folder with the text_encoder/ and tokenizer/ of a BertModel with a WordPiece vocabulary.
        tokens: largest number of tokens of a prompt, [CLS] and [SEP] included.
        layers: how many of the encoder's first layers are kept; None for all.

    Raises:
        UserError: `source` lacks one of them.
    """
    from tokenizers import Tokenizer

    for file in (source / "text_encoder" / "config.json", source / "tokenizer" / "tokenizer.json"):
        if not file.is_file():
            raise UserError(f"text = {str(source)!r} lacks {file.relative_to(source)}; give the folder of a pipeline")
    full = Tokenizer.from_file(str(source / "tokenizer" / "tokenizer.json"))
    ids = full.get_vocab()
    used = {piece for encoding in full.encode_batch(list(phrases)) for piece in encoding.tokens}
    used |= {token.content for token in full.get_added_tokens_decoder().values()}
    letters = {piece for piece in ids if piece.isascii() and len(piece.removeprefix("##")) == 1}
    pieces = sorted((piece for piece in ids if piece in used | letters), key=ids.__getitem__)
    _, encoder = load_text_encoder(source)
    if layers is not None:
        encoder.encoder.layer = encoder.encoder.layer[:layers]
        encoder.config.num_hidden_layers = len(encoder.encoder.layer)
    state = dict(encoder.state_dict())
    state[EMBEDDING] = state[EMBEDDING][[ids[piece] for piece in pieces]]
    encoder.config.vocab_size = len(pieces)
    with atomic_folder(target) as part:
        encoder.config.save_pretrained(part / "text_encoder")
        save_text_weights(part, state)
        (part / "tokenizer").mkdir()
        keep_pieces(full, pieces).save(str(part / "tokenizer" / "tokenizer.json"))
        settings = read_json(source / "tokenizer" / "tokenizer_config.json") | {"model_max_length": tokens}
        (part / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
        (part / "tokenizer" / "vocab.txt").write_text("".join(f"{piece}\n" for piece in pieces), encoding="utf-8")


def save_text_weights(folder: Path, state: Mapping[str, Tensor]) -> None:
    """Write the weights of a text encoder as fp16 to `folder`/text_encoder."""
    half = {name: value.detach().half().cpu().contiguous() for name, value in state.items()}
    save_tensors(folder / "text_encoder" / "model.safetensors", half, metadata={"format": "pt"})


def keep_pieces(full: Any, pieces: Sequence[str]) -> Any:
    """Return the tokenizer with `pieces` as its whole vocabulary, numbered in that order."""
    spec = json.loads(full.to_str())
    ids = {piece: number for number, piece in enumerate(pieces)}
    spec["model"]["vocab"] = ids
    for token in spec["added_tokens"]:
        token["id"] = ids[token["content"]]
    for name, token in spec["post_processor"]["special_tokens"].items():
        token["ids"] = [ids[name]]
    return type(full).from_str(json.dumps(spec))
