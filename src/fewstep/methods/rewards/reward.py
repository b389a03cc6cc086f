"""The interface of a preference scorer. Light: torch is not imported."""

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
        paper: its publication.
        licence: of code and weights, as published.
        commercial: what is known of commercial use, in words; no legal advice.
        measures: what the number is; higher is better for every scorer.
        span: the numbers that pictures usually get.
        backbone: the networks, with their sizes as loaded.
        weights_sha256: SHA-256 of the weights files.
        input: size, resizing and normalisation of the network's input.
    """

    name: str
    paper: str
    licence: str
    commercial: str
    measures: str
    span: str
    backbone: str = ""
    weights_sha256: str = ""
    input: str = ""


@runtime_checkable
class PreferenceScorer(Protocol):
    """A differentiable scorer of pictures with prompts; training uses these three members only."""

    @property
    def identity(self) -> ScorerIdentity:
        """The scorer and its terms of use."""
        ...

    def prepare(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Encode K prompts, [K, ...] each, on the CPU and without gradient.

        Called before training. Rows are independent: row i is the same beside any other prompts.
        """
        ...

    def score(self, pictures: Tensor, prepared: Mapping[str, Tensor]) -> Tensor:
        """Return one number per picture, float32 [B] (float64 from networks in float64), differentiable in `pictures`.

        Args:
            pictures: RGB [B, 3, H, W] in [-1, 1], any H and W; values outside are clamped.
            prepared: rows of `prepare`, one for each picture, on any device.

        Raises:
            ValueError: other shapes, or not one row per picture.
        """
        ...
