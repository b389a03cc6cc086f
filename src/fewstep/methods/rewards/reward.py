"""What a preference scorer is: an identity record, prompts prepared once, and a score that pictures can follow.

Light: nothing here needs torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class ScorerIdentity:
    """Everything that decides a score besides picture and prompt, and on what terms it may be used.

    Attributes:
        name: the scorer's name in the registry.
        paper: where it comes from.
        backbone: the networks, with their sizes as loaded.
        weights_sha256: over the bytes of the weights files.
        licence: of code and weights, as published.
        commercial: what is known of commercial use, in words; no legal advice.
        input: what the network sees of a picture: size, resizing, normalisation.
        measures: what the number is; higher is better for every scorer.
        span: the numbers that pictures usually get.
    """

    name: str
    paper: str
    backbone: str
    weights_sha256: str
    licence: str
    commercial: str
    input: str
    measures: str
    span: str


@runtime_checkable
class PreferenceScorer(Protocol):
    """Any differentiable scorer: training knows these three members and nothing else."""

    @property
    def identity(self) -> ScorerIdentity:
        """What scores, and on what terms."""
        ...

    def prepare(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Return what the scorer needs of K prompts, [K, ...] each, on the CPU and without gradient.

        Called once, before training. Rows are independent: row i is the same beside any other prompts.
        """
        ...

    def score(self, pictures: Tensor, said: Mapping[str, Tensor]) -> Tensor:
        """Return one number a picture, float32 [B] (float64 from networks in float64), differentiable in `pictures`.

        Args:
            pictures: RGB [B, 3, H, W] in [-1, 1], any H and W; numbers outside count as the nearest inside.
            said: rows of `prepare`, one for each picture, on any device.

        Raises:
            ValueError: other shapes, or not one row a picture.
        """
        ...
