"""The teacher's text encoder as a frozen `SentenceEncoder`: one vector a prompt."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch

from fewstep.common.errors import UserError
from fewstep.common.files import sha256
from fewstep.inference.multilingual.sentence import Vectors
from fewstep_worlds.common.text import load_text_encoder

BATCH = 256


class BertStates:
    """Mean over the real tokens of a BERT encoder's last states.

    Args:
        folder: holds `text_encoder/` and `tokenizer/`, as a diffusers pipeline does.

    Raises:
        UserError: one of the two is missing or unreadable.
    """

    def __init__(self, folder: Path) -> None:
        from transformers.utils import logging

        for part in ("text_encoder", "tokenizer"):
            if not (folder / part).is_dir():
                raise UserError(f"{folder} has no {part}/ folder; give one that holds a BERT text encoder")
        logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        try:
            self.tokenizer, self.model = load_text_encoder(folder)
        except Exception as error:
            raise UserError(f"cannot read the text encoder in {folder}: {' '.join(str(error).split())}") from error
        self.width = int(self.model.config.hidden_size)
        self.name = f"BERT, {self.model.config.num_hidden_layers} layers, mean of the last states of real tokens"
        self.sha256 = _sha256(folder)

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> Vectors:
        """Return float32 [N, width]."""
        result = torch.zeros(len(texts), self.width)
        # Prompts of one length together: most of the time would go into padding otherwise.
        by_length = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        for start in range(0, len(texts), BATCH):
            rows = by_length[start : start + BATCH]
            tokens = self.tokenizer([texts[i] for i in rows], padding=True, truncation=True, return_tensors="pt")
            states = self.model(tokens.input_ids, tokens.attention_mask).last_hidden_state.float()
            mask = tokens.attention_mask[..., None].float()
            result[rows] = (states * mask).sum(1) / mask.sum(1)
        vectors: Vectors = result.numpy()
        return vectors


def _sha256(folder: Path) -> str:
    weights = sorted((folder / "text_encoder").glob("*.safetensors"))
    files = [*weights, folder / "tokenizer" / "tokenizer.json"]
    digest = hashlib.sha256()
    for path in files:
        digest.update(bytes.fromhex(sha256(path)))
    return digest.hexdigest()
