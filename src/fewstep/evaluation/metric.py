"""The interface of a metric: an identity record, features of pictures, and a reduction of features to one figure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from fewstep.common.errors import UserError

Pictures: TypeAlias = npt.NDArray[np.uint8]
"""uint8 RGB [N, H, W, 3]."""
Array: TypeAlias = npt.NDArray[np.floating[Any]]
Group = Literal["quality", "teacher", "prompt", "category", "detail"]
"""What a metric measures: quality of the set, distance to the teacher's pictures, fit to prompts, of all or of one
category, fine structure."""
Against = Literal["nothing", "real", "teacher"]
"""What the reduction compares with: nothing, a set of real pictures, or the teacher's picture of each prompt."""
ARROWS = {"lower": " ↓", "higher": " ↑", "neither": ""}
"""`Identity.better` in a table's heading."""
TO_TEACHER = " (to teacher)"
"""Suffix of a set distance's name when it is taken from the teacher's pictures; its identity has against = teacher."""


@dataclass(frozen=True)
class Identity:
    """Everything that decides a figure besides the pictures. Two figures compare only if these are equal.

    Attributes:
        name: short name with its network, e.g. "FD-Lite0"; never the name of a standard metric that it is not.
        measures: one phrase that defines the figure.
        better: which way is better; "neither" for a figure to be read beside that of real pictures.
        unit: "" for a pure number.
        reduction: features -> figure, with its parameters.
        group: what tables and reports select by.
        against: what the pictures are compared with.
        backbone: network that computes the features, or "none".
        weights_sha256: of the network's weights file, or None.
        licence: of the weights, or None.
        input: size and resizing of the network's input.
        n: pictures measured; None until measured.
        seed: of the reduction's random numbers (bootstrap, floor).
        split: names of the prompts and of the real pictures, as the user calls them.
        prompts_sha256: first 16 digits of the SHA-256 of the prompts, one a line.
    """

    name: str
    measures: str
    better: Literal["lower", "higher", "neither"]
    unit: str
    reduction: str
    # Neither is compared: figures of older files lack them.
    group: Group = field(default="quality", compare=False)
    against: Against = field(default="nothing", compare=False)
    backbone: str = "none"
    weights_sha256: str | None = None
    licence: str | None = None
    input: str = "8-bit RGB as given"
    n: int | None = None
    seed: int | None = None
    split: str | None = None
    prompts_sha256: str | None = None

    def line(self) -> str:
        """Return what decides the figure, as one line."""
        parts = [self.backbone, f"weights {self.weights_sha256[:16]}" if self.weights_sha256 else "", self.input]
        parts += [self.reduction, f"n = {self.n}", f"split: {self.split}" if self.split else ""]
        parts += [f"prompts {self.prompts_sha256}" if self.prompts_sha256 else ""]
        return f"{self.name}: {'; '.join(part for part in parts if part)}"


@dataclass(frozen=True)
class Figure:
    """One measured number.

    Attributes:
        value: the figure.
        low: lower end of its 95 % bootstrap interval, or None.
        high: upper end, or None.
        n: number of pictures (for diversity: prompts).
        floor: the same figure of real pictures (of the teacher itself, for a distance between sets to it), measured
            with the same n, or None.
        identity: what was measured, filled in by `evaluate_pictures`.
    """

    value: float
    low: float | None
    high: float | None
    n: int
    floor: float | None = None
    identity: Identity | None = None

    def is_of(self, group: Group, against: Against | None = None) -> bool:
        """Return whether the figure is of a metric of `group`, compared with `against` where that is given."""
        identity = self.identity
        return identity is not None and identity.group == group and against in (None, identity.against)


class Metric(Protocol):
    """An identity record, features and a reduction."""

    identity: Identity

    def features(self, pictures: Pictures, prompts: Sequence[str]) -> Array:
        """Return what the reduction needs of each picture, [N, ...]."""

    def reduce(self, features: Array, against: Array | None, seed: int) -> Figure:
        """Return the figure of N pictures' features, with its bootstrap interval drawn from `seed`.

        Args:
            against: features of the pictures that `identity.against` names; None for "nothing".
        """


def check_pictures(pictures: Pictures, prompts: Sequence[str] | None = None) -> None:
    """Raise for an array that is not a set of pictures, or for prompts of another number."""
    if pictures.dtype != np.uint8 or pictures.ndim != 4 or pictures.shape[-1] != 3:
        raise UserError(f"pictures are {pictures.dtype} {list(pictures.shape)}; give uint8 [N, H, W, 3] in RGB order")
    if not len(pictures):
        raise UserError("there are 0 pictures to measure; give at least 1")
    if prompts is not None and len(prompts) != len(pictures):
        raise UserError(f"{len(pictures)} pictures came with {len(prompts)} prompts; give one per picture")
