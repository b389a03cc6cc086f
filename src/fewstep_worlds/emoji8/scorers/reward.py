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

from fewstep.inference.multilingual.sentence import SentenceEncoder, UniversalSentence
from fewstep.methods.rewards.reward import ScorerIdentity
from fewstep_worlds.common.location import root
from fewstep_worlds.emoji8.scorers.agreement import Agreement, load_scorer
from fewstep_worlds.emoji8.scorers.network import SIZE


def sentence_encoder() -> UniversalSentence:
    """Return the multilingual sentence encoder (the extra `multilingual`), in batches.

    Raises:
        UserError: the extra is not installed.
    """
    return UniversalSentence(batch=256)


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
        vectors: Tensor = self.trained.scorer.embed_text(
            torch.as_tensor(self.trained.text(list(prompts))).to(self.device)
        )
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


def load_world_scorer(text: SentenceEncoder, device: torch.device, folder: Path | None = None) -> WorldScorer:
    """Return the bundled scorer, or the one in `folder`.

    Args:
        text: the text backbone that it was trained with.

    Raises:
        UserError: a part is missing, truncated or foreign, or another text backbone.
    """
    trained = load_scorer(folder or root() / "reward", text)
    trained.scorer.to(device)
    return WorldScorer(trained, device)
