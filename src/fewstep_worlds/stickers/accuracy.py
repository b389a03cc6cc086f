"""Scene accuracy: the share of prompts whose every stated fact a reader finds in the picture."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fewstep_worlds.stickers.claim import Claim, check
from fewstep_worlds.stickers.reader import Reader, read_pictures


def scene_accuracy(reader: Reader, pictures: np.ndarray, claims: Sequence[Claim]) -> dict[str, float]:
    """Return the share of pictures that agree with their claim, in `all`, by kind of claim, and by stated fact.

    Args:
        pictures: uint8 [N, 64, 64, 3].
        claims: what the prompt of each picture states.
    """
    found: dict[str, list[bool]] = {"all": []}
    for claim, facts in zip(claims, read_pictures(reader, pictures), strict=True):
        right = check(claim, facts)
        agrees = all(right.values())
        for name, value in (("all", agrees), (claim.kind, agrees), *((f"fact_{k}", v) for k, v in right.items())):
            found.setdefault(name, []).append(value)
    return {name: float(np.mean(values)) for name, values in found.items()}
