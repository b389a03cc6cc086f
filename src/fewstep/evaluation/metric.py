"""What a metric is: an identity record, features of pictures, and a reduction of features to one figure.

Standard FID, CLIP score, ImageReward or PickScore join as one small module each: a class with the members
of `Metric`. Nothing else of the package knows which metrics exist.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol, TypeAlias, runtime_checkable

import numpy as np
import numpy.typing as npt

from fewstep.common.errors import UserError

Pictures: TypeAlias = npt.NDArray[np.uint8]
"""uint8 RGB [N, H, W, 3]."""
Array: TypeAlias = npt.NDArray[np.floating[Any]]
Against = Literal["nothing", "real", "teacher"]
"""What the reduction compares with: nothing, a set of real pictures, or the teacher's for each prompt."""
ARROWS = {"lower": " ↓", "higher": " ↑", "neither": ""}
"""`Identity.better` in a table's heading."""


@dataclass(frozen=True)
class Identity:
    """Everything that decides a figure besides the pictures. Two figures compare only if these are equal.

    Attributes:
        name: short name with its backbone, e.g. "FD-Lite0"; never the name of a standard metric it is not.
        measures: one phrase that says what the figure means.
        better: which way is better; "neither" for a figure to be read beside that of real pictures.
        unit: "" for a pure number.
        backbone: network that makes the features, or "none".
        weights_sha256: of the network's weights file, or None.
        licence: of the weights, or None.
        input: size and resizing of what the network sees.
        reduction: features -> figure, with its parameters as "key=value" text.
        n: pictures measured; None until measured.
        seed: of the reduction's random draws (bootstrap, floor).
    """

    name: str
    measures: str
    better: Literal["lower", "higher", "neither"]
    unit: str
    reduction: str
    backbone: str = "none"
    weights_sha256: str | None = None
    licence: str | None = None
    input: str = "8-bit RGB as given"
    n: int | None = None
    seed: int | None = None


@dataclass(frozen=True)
class Figure:
    """One measured number.

    Attributes:
        value: the figure.
        low: lower end of its 95 % bootstrap interval, or None.
        high: upper end, or None.
        n: pictures (for diversity: prompts) it rests on.
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

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Figure:
        """Undo `to_dict`.

        Raises:
            UserError: fields are missing or unknown.
        """
        try:
            identity = data.get("identity")
            return cls(**{**data, "identity": Identity(**identity) if identity else None})
        except TypeError as error:
            raise UserError(f"not a figure: {error}") from error


class Metric(Protocol):
    """An identity record, features and a reduction."""

    @property
    def identity(self) -> Identity:
        """What is measured and how."""
        ...

    @property
    def against(self) -> Against:
        """What `reduce` needs as its second argument."""
        ...

    def features(self, pictures: Pictures, prompts: Sequence[str]) -> Array:
        """Return what the reduction needs of each picture, [N, ...]."""
        ...

    def reduce(self, features: Array, against: Array | None, seed: int) -> Figure:
        """Return the figure of N pictures' features, with its bootstrap interval drawn from `seed`."""
        ...


class Scored(Metric, Protocol):
    """A metric whose figure is the mean of a number for each picture: it compares prompt by prompt."""

    def scores(self, features: Array, against: Array | None) -> Array:
        """Return each picture's number, float64 [N]."""
        ...


@runtime_checkable
class Matched(Metric, Protocol):
    """A metric that takes account of two sets that answer the same prompts: they are no independent samples."""

    def reduce_matched(self, features: Array, against: Array, seed: int) -> Figure:
        """Return the figure of two sets in the order of the same prompts, from different noise."""
        ...


def check_pictures(pictures: Pictures, prompts: Sequence[str] | None = None) -> None:
    """Refuse what is no picture set, or not one prompt a picture.

    Raises:
        UserError: wrong type, shape or count.
    """
    if pictures.dtype != np.uint8 or pictures.ndim != 4 or pictures.shape[-1] != 3:
        raise UserError(f"pictures are {pictures.dtype} {list(pictures.shape)}; give uint8 [N, H, W, 3] in RGB order")
    if not len(pictures):
        raise UserError("there are 0 pictures to measure; give at least 1")
    if prompts is not None and len(prompts) != len(pictures):
        raise UserError(f"{len(pictures)} pictures came with {len(prompts)} prompts; give one a picture")
