"""A preference scorer on a teacher's latents: decoded with gradient, scored with the prompts of the training set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fewstep.backbones.base import Backbone
from fewstep.errors import UserError
from fewstep.objectives.preference import Taste
from fewstep.preference.scorer import PreferenceScorer

MOST_HELD = 2**30
"""Bytes of prepared prompts that are kept in memory; more are prepared as they are asked for."""


class Prepared:
    """What a scorer made of prompts: of all of them beforehand, where that fits into memory, or batch by batch."""

    def __init__(self, scorer: PreferenceScorer, prompts: Sequence[str]) -> None:
        self._scorer, self._prompts = scorer, prompts
        a_prompt = sum(rows.nbytes for rows in scorer.prepare(prompts[:1]).values())
        self._all = scorer.prepare(prompts) if a_prompt * len(prompts) <= MOST_HELD else None

    def rows(self, which: Tensor) -> Mapping[str, Tensor]:
        """The rows of some prompts, int64 [B]."""
        chosen = which.cpu()
        if self._all is None:
            return self._scorer.prepare([self._prompts[row] for row in chosen.tolist()])
        return {name: value[chosen] for name, value in self._all.items()}


def make_taste(backbone: Backbone, scorer: PreferenceScorer, prompts: Sequence[str]) -> tuple[Taste, int]:
    """What the preference term asks: (x_0, which prompts) -> scores; and of how many prompts.

    Pictures are decoded in fp32, once for all prompts that they are scored with.

    Raises:
        UserError: a single prompt, beside which no other one is wrong.
    """
    if len(prompts) < 2:
        raise UserError("data.source holds one prompt; preference needs a wrong one beside it, at least 2")
    said = Prepared(scorer, prompts)

    def taste(x0: Tensor, asked: Sequence[Tensor]) -> list[Tensor]:
        with torch.autocast(x0.device.type, enabled=False):
            pictures = backbone.decode(x0.float())
            return [scorer.score(pictures, said.rows(which)) for which in asked]

    return taste, len(prompts)
