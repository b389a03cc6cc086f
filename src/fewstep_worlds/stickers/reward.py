"""The preference scorer of sticker scenes, which students may be trained by, and its folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from fewstep.common.config import validate
from fewstep.common.errors import UserError
from fewstep.common.files import atomic_folder, read_json, sha256, write_json
from fewstep.common.tensors import load_tensors, save_tensors
from fewstep.scorers.reward import ScorerIdentity
from fewstep.scorers.scorer import check_rows, in_batches
from fewstep_worlds.common.location import root
from fewstep_worlds.stickers.reward_network import RewardNetwork, word_numbers
from fewstep_worlds.stickers.scene import SIDE
from fewstep_worlds.stickers.settings import RewardConfig

WEIGHTS = "reward.safetensors"
RECORD = "reward.json"
UNIT = 10.0
"""Logit of a score of 1."""


@dataclass(frozen=True)
class StickerScorer:
    """A tenth of the logit that a prompt is true of a picture, differentiable in pictures.

    Attributes:
        network: frozen, in evaluation mode.
        words: vocabulary, in the order of the embedding from its second row on.
        weights_sha256: of the weights file.
    """

    network: RewardNetwork
    words: tuple[str, ...]
    weights_sha256: str

    @property
    def identity(self) -> ScorerIdentity:
        """Identity and licence of the scorer."""
        return ScorerIdentity(
            name="world",
            paper="none: trained here on sticker scenes, each with a true and with wrong prompts",
            backbone=f"residual picture network and text transformer, {_parameters(self.network):,} parameters",
            weights_sha256=self.weights_sha256,
            licence="Apache-2.0; pictures as in the world's stickers/ATTRIBUTION.md",
            commercial="free, with the attribution of the stickers' artists",
            input=f"{SIDE} x {SIDE}, antialiased bicubic where resized, in [-1, 1]",
            measures="log-odds, in tens, that an English prompt is true; valid for sentences of the grammar only",
            span="above 0 where the prompt is more likely true than not",
        )

    @torch.no_grad()
    def prepare(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Return what `Words` returns of prompts, each of `LENGTH` words.

        Raises:
            UserError: a prompt has no known word.
        """
        numbers = {word: number for number, word in enumerate(self.words, 1)}
        device = self.network.places.device

        def encode(part: Sequence[str]) -> dict[str, Tensor]:
            rows = word_numbers(part, numbers)
            if not bool((rows > 0).any(1).all()):
                unknown = part[int((rows > 0).any(1).int().argmin())]
                raise UserError(f"prompt = {unknown!r} has no word of sticker scenes; the reward reads English ones")
            return dict(self.network.text(rows.to(device)))

        return in_batches(encode, prompts)

    def score(self, pictures: Tensor, prepared: Mapping[str, Tensor]) -> Tensor:
        """Return one score a picture, float32 [B].

        Raises:
            ValueError: other shapes, or not one row a picture.
        """
        if pictures.dim() != 4 or pictures.shape[1] != 3:
            raise ValueError(f"pictures are {list(pictures.shape)}, not [B, 3, H, W]")
        check_rows(pictures, prepared, ("queries", "states", "words"))
        x = pictures.float().clamp(-1, 1)
        if x.shape[2:] != (SIDE, SIDE):
            x = F.interpolate(x, (SIDE, SIDE), mode="bicubic", antialias=True).clamp(-1, 1)
        cells = self.network.pictures(x.contiguous(memory_format=torch.channels_last))
        own = {name: rows.to(cells.device, non_blocking=True)[:, None] for name, rows in prepared.items()}
        return self.network.compare(cells, own)[:, 0] / UNIT


def _parameters(network: RewardNetwork) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def save_reward(network: RewardNetwork, words: Sequence[str], folder: Path) -> None:
    """Write reward.safetensors in fp16, and reward.json, atomically."""
    half = {name: tensor.half().contiguous() for name, tensor in sorted(network.state_dict().items())}
    with atomic_folder(folder) as part:
        save_tensors(part / WEIGHTS, half, metadata={"licence": "Apache-2.0"})
        record = {"config": network.config.model_dump(mode="json"), "words": list(words)}
        write_json(part / RECORD, {**record, "weights_sha256": sha256(part / WEIGHTS)})


def load_reward(folder: Path) -> StickerScorer:
    """Return a saved scorer, on the CPU.

    Raises:
        UserError: a part is missing, damaged or of another scorer.
    """
    record, path = read_json(folder / RECORD), folder / WEIGHTS
    try:
        config, words, digest = record["config"], tuple(map(str, record["words"])), str(record["weights_sha256"])
    except (KeyError, TypeError) as error:
        raise UserError(f"{folder / RECORD} is no record of a reward: {error} is wrong or missing") from error
    network = RewardNetwork(validate(RewardConfig, config), len(words))
    tensors = load_tensors(path)
    if sha256(path) != digest:
        raise UserError(f"{path} is not the file that {RECORD} names (sha256 {digest[:16]}); restore it")
    try:
        network.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    except RuntimeError as error:
        raise UserError(
            f"{path} has other tensors than {RECORD} names: {' '.join(str(error).split())[:200]}"
        ) from error
    network.eval().requires_grad_(False).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return StickerScorer(network, words, digest)


def load_world_scorer(device: torch.device) -> StickerScorer:
    """Return the bundled world's scorer.

    Raises:
        UserError: a part is missing, damaged or of another scorer.
    """
    scorer = load_reward(root() / "reward")
    scorer.network.to(device)
    return scorer
