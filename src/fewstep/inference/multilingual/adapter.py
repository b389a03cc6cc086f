"""Adapter from multilingual sentence vectors to a teacher's token states, by retrieval of stored captions.

A sentence vector v is mapped to q = (W v + b) / |W v + b|. The weights of the stored captions are
w = softmax(q . k / temperature) over the `mixed` captions (one by default) with the most similar vectors k. The
prompt's states are the weighted mean of the states of these captions. States regressed from v would be out of the
denoiser's training distribution, as a pooled vector does not hold the order of words; states of captions are within it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewstep.backbones.pipeline_folder import PipelineFolder
from fewstep.common.config import validate
from fewstep.common.errors import UserError
from fewstep.common.files import atomic_folder, sha256, write_json
from fewstep.common.tensors import load_tensors, save_tensors
from fewstep.diffusion.denoiser import Condition
from fewstep.inference.multilingual.record import RECORD, WEIGHTS, read_adapter, text_side
from fewstep.inference.multilingual.sentence import SentenceEncoder, UniversalSentence
from fewstep.inference.multilingual.settings import AdapterConfig

Encode = Callable[[Sequence[str]], Condition]


class SentenceMap(nn.Module):
    """Linear map of sentence vectors onto the vectors of the stored captions; the identity before training."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, vectors: Tensor) -> Tensor:
        """Map vectors [N, width] to unit vectors [N, width]."""
        return F.normalize(F.linear(vectors, self.weight, self.bias), dim=1)

    def moved(self) -> Tensor:
        """Return the squared distance of the weights from the identity."""
        return (self.weight - torch.eye(len(self.bias)).to(self.weight)).square().sum() + self.bias.square().sum()


@dataclass(frozen=True)
class Adapter:
    """A trained adapter, on the CPU.

    Attributes:
        network: the map of sentence vectors.
        keys: sentence vectors of the stored captions, float32 [K, width].
        captions: the K captions, in the teacher's language.
        sentence: the sentence encoder.
        config: its settings; `mixed` and `temperature` apply to inference.
    """

    network: SentenceMap
    keys: Tensor
    captions: tuple[str, ...]
    sentence: SentenceEncoder
    config: AdapterConfig

    @torch.inference_mode()
    def shares(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return caption numbers and weights, int64 and float32 [N, mixed], largest first; rows of weights sum to 1."""
        similarity = self.network(torch.from_numpy(self.sentence(prompts))) @ self.keys.T
        best, rows = similarity.topk(min(self.config.mixed, len(self.captions)), dim=1)
        return rows, (best / self.config.temperature).softmax(dim=1)

    @torch.inference_mode()
    def readings(self, prompts: Sequence[str]) -> list[tuple[str, float]]:
        """Return the most similar caption of each prompt and their cosine similarity."""
        rows, _ = self.shares(prompts)
        first = [int(row) for row in rows[:, 0]]
        cosines = (self.network(torch.from_numpy(self.sentence(prompts))) * self.keys[first]).sum(1)
        return [(self.captions[row], float(cosine)) for row, cosine in zip(first, cosines, strict=True)]

    def encode(self, prompts: Sequence[str], encode: Encode) -> Condition:
        """Encode prompts of any language as weighted means of the captions' states by the teacher's `encode`.

        Names, shapes and padding are those of `encode`, float32 [N, tokens, width].
        """
        rows, weights = self.shares(prompts)
        distinct, place = torch.unique(rows, return_inverse=True)
        encoded = encode([self.captions[int(row)] for row in distinct])
        return {name: torch.einsum("nk,nk...->n...", weights, states[place]) for name, states in encoded.items()}


def save_adapter(place: Path, adapter: Adapter, folder: PipelineFolder, notes: Mapping[str, Any]) -> None:
    """Write weights and their record to a folder, atomically.

    Raises:
        UserError: the folder cannot be written.
    """
    with atomic_folder(place) as part:
        save_tensors(part / WEIGHTS, {**adapter.network.state_dict(), "keys": adapter.keys})
        record = {
            "teacher": text_side(folder),
            "sentence": {"name": adapter.sentence.name, "sha256": adapter.sentence.sha256},
            "settings": adapter.config.model_dump(mode="json"),
            **notes,
            "weights_sha256": sha256(part / WEIGHTS),
            "captions": list(adapter.captions),
        }
        write_json(part / RECORD, record)


def load_adapter(place: Path | str, folder: PipelineFolder, sentence: SentenceEncoder | None = None) -> Adapter:
    """Read an adapter for a teacher.

    Args:
        place: its folder.
        folder: the teacher.
        sentence: the sentence encoder; the one of the extra `multilingual` by default.

    Raises:
        UserError: no adapter, a damaged one, or one of another teacher or sentence encoder.
    """
    record, path = read_adapter(place, folder), Path(place) / WEIGHTS
    sentence = sentence or UniversalSentence()
    try:
        config = validate(AdapterConfig, record["settings"])
        trained_on, captions = record["sentence"], tuple(str(caption) for caption in record["captions"])
        name, expected = str(trained_on["name"]), str(trained_on["sha256"])
    except (KeyError, TypeError) as error:
        raise UserError(f"{Path(place) / RECORD} is not an adapter's record: {error!r} is wrong or missing") from error
    if sentence.sha256 != expected:
        raise UserError(f"adapter = {str(place)!r} was trained on {name}, not on {sentence.name}; install that")
    tensors = load_tensors(path)
    if sha256(path) != record["weights_sha256"]:
        raise UserError(f"{path} is not the file that {RECORD} names; restore it or train the adapter again")
    keys, network = tensors.pop("keys", torch.zeros(0, 0)), SentenceMap(sentence.width)
    try:
        network.load_state_dict(tensors)
    except RuntimeError as error:
        raise UserError(f"{path} is not an adapter's weights: {' '.join(str(error).split())[:200]}") from error
    if keys.shape != (len(captions), sentence.width):
        raise UserError(f"{path} holds keys {list(keys.shape)} for {len(captions)} captions; train the adapter again")
    return Adapter(network.eval().requires_grad_(False), keys, captions, sentence, config)
