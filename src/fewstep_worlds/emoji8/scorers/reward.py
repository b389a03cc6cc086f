"""The bundled world's reward, which students may be trained by.

It shares no weights and no backbone with the evaluating scorer: the picture network has another shape and seed, and the
text backbone is a multilingual sentence encoder instead of the teacher's text encoder. Both are trained on Emoji-8's
training split.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from fewstep.inference.multilingual.sentence import UniversalSentence
from fewstep.methods.rewards.reward import ScorerIdentity
from fewstep_worlds.common.location import root
from fewstep_worlds.emoji8.scorers.agreement import Agreement, load_scorer
from fewstep_worlds.emoji8.scorers.network import SIZE
from fewstep_worlds.emoji8.scorers.text import TextBackbone


class SentenceVectors:
    """The multilingual sentence encoder's vectors (the extra `multilingual`), exact but for their last digits.

    Raises:
        UserError: the extra is not installed.
    """

    def __init__(self) -> None:
        self._encoder = UniversalSentence(batch=256)
        self.width, self.name = self._encoder.width, self._encoder.name

    @property
    def sha256(self) -> str:
        """SHA-256 of the encoder's files."""
        return self._encoder.sha256

    def __call__(self, prompts: Sequence[str]) -> Tensor:
        """Return float32 [N, 512], of length 1."""
        return torch.from_numpy(self._encoder(prompts))


@dataclass(frozen=True)
class WorldScorer:
    """The cosine of picture and prompt, differentiable in pictures."""

    trained: Agreement
    device: torch.device

    @property
    def identity(self) -> ScorerIdentity:
        """Identity and licence of the scorer."""
        channels = self.trained.record["network"]["channels"]
        return ScorerIdentity(
            name="world",
            paper="none: trained here, contrastively, on Emoji-8's training split",
            backbone=f"residual picture network {tuple(channels)}; text: {self.trained.text.name}",
            weights_sha256=self.trained.weights_sha256,
            licence="Apache-2.0; pictures and captions as in world/emoji8/ATTRIBUTION.md",
            commercial="free, with the attribution of Emoji-8's artists",
            input=f"{SIZE} x {SIZE}, antialiased bicubic where resized, in [-1, 1]",
            measures="cosine of a picture and its prompt; valid for drawn emoji and their names only",
            span="-1 to 1; matching pairs about .5, others about 0",
        )

    @torch.no_grad()
    def prepare(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Return unit vectors of prompts, [K, width]."""
        vectors: Tensor = self.trained.scorer.embed_text(self.trained.text(list(prompts)).to(self.device))
        return {"text": vectors.cpu()}

    def score(self, pictures: Tensor, prepared: Mapping[str, Tensor]) -> Tensor:
        """Return one cosine a picture, float32 [B].

        Raises:
            ValueError: other shapes, or not one row a picture.
        """
        if pictures.dim() != 4 or pictures.shape[1] != 3 or len(pictures) != len(prepared["text"]):
            raise ValueError(f"pictures {list(pictures.shape)} with {len(prepared['text'])} prompts")
        x = pictures.float().clamp(-1, 1)
        if x.shape[2:] != (SIZE, SIZE):
            x = F.interpolate(x, (SIZE, SIZE), mode="bicubic", antialias=True).clamp(-1, 1)
        vectors = self.trained.scorer.embed_pictures(x.contiguous(memory_format=torch.channels_last))
        return (vectors * prepared["text"].to(vectors, non_blocking=True)).sum(1)


def load_world_scorer(text: TextBackbone, device: torch.device, folder: Path | None = None) -> WorldScorer:
    """Return the bundled scorer, or the one in `folder`.

    Args:
        text: the text backbone that it was trained with.

    Raises:
        UserError: a part is missing, truncated or foreign, or another text backbone.
    """
    trained = load_scorer(folder or root() / "reward", text)
    trained.scorer.to(device)
    return WorldScorer(trained, device)
