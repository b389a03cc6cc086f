"""A scene as a pure function of (seed, index): which stickers, where, how large, and on which background."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np

from fewstep.common.errors import UserError
from fewstep.common.random_streams import generator
from fewstep_worlds.stickers.heldout import KINDS as HELD_OUT
from fewstep_worlds.stickers.heldout import held_out_kinds
from fewstep_worlds.stickers.vocabulary import COLOURS, NAMES, STYLES

Choice = TypeVar("Choice")

SIDE = 64
"""Edge of a scene, in pixels."""
MOST = 9
"""Most stickers of a scene."""

Relation = Literal["left", "right", "above", "below"]

KINDS = {"single": 0.2, "several": 0.3, "two": 0.28, "relation": 0.22}
"""Kind of scene -> probability: one sticker; several of one concept; two concepts; two, clearly beside each other."""
COUNTS = {2: 0.2, 3: 0.2, 4: 0.16, 5: 0.12, 6: 0.1, 7: 0.08, 8: 0.07, 9: 0.07}
"""Stickers of a scene of several -> probability."""
SIZES = {
    1: (24, 54), 2: (20, 32), 3: (18, 27), 4: (17, 25), 5: (15, 21), 6: (14, 20), 7: (14, 18), 8: (13, 17), 9: (13, 16)
}  # fmt: skip
"""Stickers of a scene -> smallest and largest edge of one, in pixels."""
PATTERN_SHARES = {"plain": 0.3, "stripes": 0.14, "dots": 0.14, "checks": 0.14, "stars": 0.14, "gradient": 0.14}
STYLE_TRIES = 20
TURN = 25.0
"""Largest turn of a sticker, in degrees."""
CLEAR = 1.6
"""A relation holds if the distance along its axis is at least so many times the distance across."""


@dataclass(frozen=True)
class Sticker:
    """One sticker.

    Attributes:
        x, y: its centre in pixels, from the left and from the top.
        size: length of its longer side, in pixels.
        turn: counter-clockwise, in degrees.
        mirrored: left and right exchanged, before it is turned.
    """

    concept: str
    x: float
    y: float
    size: float
    turn: float
    mirrored: bool


@dataclass(frozen=True)
class Background:
    """A pattern in two tones of one colour.

    Attributes:
        angle: of the pattern, in degrees.
        period: of the pattern, in pixels.
        phase: shift of the pattern along both of its axes, in periods.
    """

    pattern: str
    colour: str
    angle: float
    period: float
    phase: tuple[float, float]


@dataclass(frozen=True)
class Scene:
    """Every fact of a picture. The stickers do not overlap; those of one concept follow each other."""

    style: str
    background: Background
    stickers: tuple[Sticker, ...]

    @property
    def counts(self) -> dict[str, int]:
        """Concept -> number of its stickers, the first concept first."""
        result: dict[str, int] = {}
        for sticker in self.stickers:
            result[sticker.concept] = result.get(sticker.concept, 0) + 1
        return result


def relation(x: float, y: float, other_x: float, other_y: float) -> Relation | None:
    """Return where (x, y) lies as seen from the other point, y pointing down; None if that is not clear."""
    across, down = x - other_x, y - other_y
    if abs(across) >= CLEAR * abs(down):
        return "left" if across < 0 else "right"
    if abs(down) >= CLEAR * abs(across):
        return "above" if down < 0 else "below"
    return None


def make_scene(seed: int, index: int, split: str = "train") -> Scene:
    """Return scene `index` of a split: `train` has nothing that is held out, another split holds just its own kind.

    The splits are `train` and `heldout.KINDS`.

    Raises:
        UserError: an unknown split.
    """
    if split not in ("train", *HELD_OUT):
        raise UserError(f"split = {split!r} is not one of train, {', '.join(HELD_OUT)}")
    rng = generator(seed, f"stickers {split}", index)
    wanted = frozenset() if split == "train" else frozenset((split,))
    kind, concepts, style, colour = _contents(rng, wanted)
    background = make_background(rng, colour)
    return Scene(style, background, place(rng, concepts, apart=kind == "relation"))


def make_background(rng: np.random.Generator, colour: str, pattern: str | None = None) -> Background:
    """Return a background of a colour, with the pattern or any."""
    pattern = pattern or weighted(rng, PATTERN_SHARES)
    angle = float(rng.uniform(0, 360))
    if pattern in ("checks", "dots", "stars"):
        angle = 45.0 * int(rng.integers(2))
    period, phase = float(rng.uniform(*_periods(pattern))), (float(rng.random()), float(rng.random()))
    return Background(pattern, colour, angle, period, phase)


def pick(rng: np.random.Generator, choices: tuple[str, ...]) -> str:
    """Return any of the choices."""
    return choices[int(rng.integers(len(choices)))]


def weighted(rng: np.random.Generator, weights: Mapping[Choice, float]) -> Choice:
    """Return a choice by its probability."""
    return list(weights)[int(np.searchsorted(np.cumsum(list(weights.values())), rng.random(), side="right"))]


def _contents(rng: np.random.Generator, wanted: frozenset[str]) -> tuple[str, list[str], str, str]:
    """Return kind of scene, concept of each sticker, style and colour, of just the `wanted` kinds of held-out scenes.

    Styles and colours are drawn anew before concepts are, so that concepts with less of them are not rarer.
    """
    while True:
        kind, concepts = _concepts(rng)
        for _ in range(STYLE_TRIES):
            style, colour = pick(rng, STYLES), pick(rng, tuple(COLOURS))
            if held_out_kinds(set(concepts), style, colour) == wanted:
                return kind, concepts, style, colour


def _concepts(rng: np.random.Generator) -> tuple[str, list[str]]:
    """Return the kind of scene, and the concept of each sticker."""
    kind = weighted(rng, KINDS)
    first, second = (NAMES[i] for i in rng.choice(len(NAMES), 2, replace=False))
    if kind == "single":
        return kind, [first]
    if kind == "several":
        return kind, [first] * weighted(rng, COUNTS)
    if kind == "relation" or rng.random() < 0.4:
        return kind, [first, second]
    return kind, [first] * int(rng.integers(1, 5)) + [second] * int(rng.integers(1, 5))


def _periods(pattern: str) -> tuple[float, float]:
    return {"stars": (12.0, 17.0), "dots": (8.0, 14.0)}.get(pattern, (8.0, 16.0))


def place(rng: np.random.Generator, concepts: list[str], apart: bool) -> tuple[Sticker, ...]:
    """Return a sticker of each concept, none on another; `apart` puts the first one clearly beside the second."""
    count = len(concepts)
    low, high = SIZES[count]
    common = rng.uniform(low, high)
    sizes = np.clip(common * rng.uniform(0.85, 1.15, count), low, high)
    while True:
        centres = _centres(rng, sizes)
        if centres is not None and (not apart or relation(*centres[0], *centres[1])):
            break
        sizes = np.maximum(0.98 * sizes, low)
    turns, mirrored = rng.uniform(-TURN, TURN, count), rng.random(count) < 0.5
    return tuple(
        Sticker(concept, x, y, float(size), float(turn), bool(mirror))
        for concept, (x, y), size, turn, mirror in zip(concepts, centres, sizes, turns, mirrored)
    )


def _centres(rng: np.random.Generator, sizes: np.ndarray, tries: int = 24) -> list[tuple[float, float]] | None:
    """Return centres of discs of these diameters that neither meet nor leave the picture; None if it fails."""
    found: list[tuple[float, float]] = []
    spots = rng.random((len(sizes), tries, 2)).tolist()
    for number, size in enumerate(sizes.tolist()):
        room = SIDE - size
        for across, down in spots[number]:
            x, y = size / 2 + room * across, size / 2 + room * down
            if all(
                math.hypot(x - other_x, y - other_y) >= (size + other) / 2
                for (other_x, other_y), other in zip(found, sizes)
            ):
                found.append((x, y))
                break
        else:
            return None
    return found
