"""Scene accuracy: the share of pictures that show every fact that their prompt states."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fewstep_worlds.common.tables import markdown
from fewstep_worlds.stickers.claim import Claim, Facts, check

Z = 1.959964
"""Standard normal quantile of a 95 % interval."""


@dataclass(frozen=True)
class Share:
    """Count of right pictures among `n`."""

    right: int
    n: int

    @property
    def value(self) -> float:
        """Return the share."""
        return self.right / self.n

    @property
    def interval(self) -> tuple[float, float]:
        """Return its 95 % interval (Wilson's)."""
        middle = (self.value + Z**2 / (2 * self.n)) / (1 + Z**2 / self.n)
        spread = math.sqrt(self.value * (1 - self.value) / self.n + Z**2 / (4 * self.n**2))
        half = Z * spread / (1 + Z**2 / self.n)
        return max(middle - half, 0.0), min(middle + half, 1.0)


def scene_accuracy(found: Sequence[Facts], claims: Sequence[Claim]) -> dict[str, Share]:
    """Return which share of pictures agrees with its claim: `all`, by kind of claim, and `fact NAME` by stated fact.

    Args:
        found: what a reader finds in each picture.
        claims: what the prompt of each picture states.
    """
    rights: dict[str, list[bool]] = {"all": []}
    for facts, claim in zip(found, claims, strict=True):
        stated = check(claim, facts)
        agrees = all(stated.values())
        for name, right in {"all": agrees, claim.kind: agrees, **{f"fact {k}": v for k, v in stated.items()}}.items():
            rights.setdefault(name, []).append(right)
    return {name: Share(sum(values), len(values)) for name, values in rights.items()}


def as_table(rows: Mapping[str, Mapping[str, Share]]) -> str:
    """Return a Markdown table of shares with their intervals, a row each, and n of the `all` column."""
    names = list(dict.fromkeys(name for shares in rows.values() for name in shares))
    cells = (
        [row, f"{shares['all'].n}", *(_cell(shares[name]) if name in shares else "" for name in names)]
        for row, shares in rows.items()
    )
    return markdown(["", "n", *names], cells)


def _cell(share: Share) -> str:
    low, high = share.interval
    return f"{share.value:.3f} ({low:.3f} to {high:.3f})"
