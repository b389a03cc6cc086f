"""Prompt agreement: the cosine of a picture and its prompt by a scorer trained on Emoji-8's training split.

It is no CLIP score: it is valid for drawn emoji and their names only. Its training is in `train`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fewstep.common.config import validate
from fewstep.common.errors import UserError
from fewstep.common.files import atomic_folder, read_json, sha256, write_json
from fewstep.common.tensors import load_tensors, save_tensors
from fewstep.evaluation.metric import Array, Identity, Pictures, check_pictures
from fewstep.evaluation.per_picture import PerPictureMetric
from fewstep.inference.multilingual.sentence import SentenceEncoder
from fewstep_worlds.emoji8.config import ScorerConfig
from fewstep_worlds.emoji8.scorers.network import SIZE, Scorer

WEIGHTS = "scorer.safetensors"
RECORD = "scorer.json"
BATCH = 128


@dataclass(frozen=True)
class Agreement:
    """A trained scorer with its text backbone.

    Attributes:
        scorer: the trained parts, in evaluation mode.
        text: the frozen text backbone it was trained with.
        weights_sha256: of the weights file.
        record: of the training.
    """

    scorer: Scorer
    text: SentenceEncoder
    weights_sha256: str
    record: dict[str, Any]

    @torch.inference_mode()
    def embed_pictures(self, pictures: Pictures) -> Tensor:
        """Return unit vectors of uint8 pictures of any size, float32 [N, width]."""
        check_pictures(pictures)
        parts = [self.scorer.embed_pictures(to_input(pictures[i : i + BATCH])) for i in range(0, len(pictures), BATCH)]
        return torch.cat(parts)

    @torch.inference_mode()
    def embed_text(self, prompts: Sequence[str]) -> Tensor:
        """Return unit vectors of prompts, float32 [N, width]; equal prompts are encoded once."""
        distinct = list(dict.fromkeys(prompts))
        vectors = self.scorer.embed_text(torch.as_tensor(self.text(distinct)))
        number = {prompt: i for i, prompt in enumerate(distinct)}
        return vectors[[number[prompt] for prompt in prompts]]

    def scores(self, pictures: Pictures, prompts: Sequence[str]) -> Array:
        """Return the cosine of each picture and its prompt, float64 [N] in [-1, 1].

        Raises:
            UserError: not one prompt a picture.
        """
        check_pictures(pictures, prompts)
        cosine = (self.embed_pictures(pictures) * self.embed_text(prompts)).sum(1)
        scores: Array = cosine.clamp(-1, 1).double().numpy()
        return scores


class PromptAgreement(PerPictureMetric):
    """Mean score of pictures and their prompts."""

    def __init__(self, agreement: Agreement) -> None:
        self._agreement = agreement
        self.identity = Identity(
            name="agreement",
            group="prompt",
            measures="how well pictures fit their prompts, by a picture network trained on Emoji-8 "
            "alone; prompts are encoded by the teacher's text encoder, whose errors it inherits",
            better="higher",
            unit="cosine",
            reduction="mean over pictures of the cosine of picture and prompt",
            backbone=f"Emoji-8 scorer; text: {agreement.text.name} (sha256 {agreement.text.sha256[:16]})",
            weights_sha256=agreement.weights_sha256,
            licence="Apache-2.0",
            input=f"{SIZE}x{SIZE}, bicubic where resized, rgb / 127.5 - 1",
        )

    @property
    def scorer(self) -> Agreement:
        """The trained scorer."""
        return self._agreement

    def features(self, pictures: Pictures, prompts: Sequence[str]) -> Array:
        """Return each picture's score, [N]."""
        return self._agreement.scores(pictures, prompts)


def to_input(pictures: Pictures) -> Tensor:
    """Return uint8 [N, H, W, 3] as float32 [N, 3, 64, 64] in [-1, 1], channels_last."""
    x = torch.from_numpy(np.array(pictures)).permute(0, 3, 1, 2)
    if x.shape[2:] != (SIZE, SIZE):
        x = F.interpolate(x, (SIZE, SIZE), mode="bicubic", antialias=True)
    return x.float().div_(127.5).sub_(1.0).contiguous(memory_format=torch.channels_last)


def save_scorer(
    folder: Path, config: ScorerConfig, weights: dict[str, Tensor], text: SentenceEncoder, notes: dict[str, Any]
) -> None:
    """Write fp16 weights and what identifies them; the folder appears whole or not at all."""
    record = {
        "network": config.model_dump(mode="json"),
        "text": {"name": text.name, "sha256": text.sha256, "width": text.width},
        **notes,
    }
    with atomic_folder(folder) as part:
        half = {name: tensor.detach().half().contiguous() for name, tensor in sorted(weights.items())}
        save_tensors(part / WEIGHTS, half, metadata={"licence": "Apache-2.0"})
        write_json(part / RECORD, {**record, "weights_sha256": sha256(part / WEIGHTS)})


def load_scorer(folder: Path, text: SentenceEncoder) -> Agreement:
    """Read a scorer.

    Args:
        text: the text backbone that it was trained with.

    Raises:
        UserError: a part is missing, truncated or foreign, or the text backbone is another one.
    """
    if not (folder / RECORD).is_file():
        raise UserError(f"{folder} has no {RECORD}; name a folder that a scorer's training wrote")
    record = read_json(folder / RECORD)
    try:
        config = validate(ScorerConfig, record["network"])
        trained_on = record["text"]
        width, expected, digest = (
            int(trained_on["width"]),
            str(trained_on["sha256"]),
            str(record["weights_sha256"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder / RECORD} is not a scorer's record: {error!r} is wrong or missing") from error
    if text.sha256 != expected:
        raise UserError(
            f"the scorer in {folder} was trained on text encoder {expected[:16]}, not {text.sha256[:16]}; "
            "train it again or restore that encoder"
        )
    path = folder / WEIGHTS
    try:
        scorer = Scorer(config, width)
        scorer.load_state_dict({name: tensor.float() for name, tensor in load_tensors(path).items()})
    except RuntimeError as error:
        raise UserError(f"{path} is not this scorer's weights: {' '.join(str(error).split())[:200]}") from error
    if sha256(path) != digest:
        raise UserError(f"{path} is not the file that {RECORD} names (sha256 {digest[:16]}); restore it")
    scorer.eval().requires_grad_(False).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return Agreement(scorer, text, digest, record)
