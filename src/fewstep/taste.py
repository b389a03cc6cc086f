"""A preference scorer on a teacher's latents: decoded with gradient, scored with the prompts of the training set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fewstep.backbones.sd import StableDiffusion
from fewstep.errors import UserError
from fewstep.objectives.preference import Taste
from fewstep.preference.scorer import PreferenceScorer


def make_taste(backbone: StableDiffusion, scorer: PreferenceScorer, prompts: Sequence[str]) -> tuple[Taste, int]:
    """What the preference term asks: (x_0, which prompts) -> scores; and of how many prompts.

    All prompts are prepared once. Pictures are decoded in fp32 and scored as they are; they are decoded once for all
    prompts that they are scored with.

    Raises:
        UserError: a single prompt, beside which no other one is wrong.
    """
    if len(prompts) < 2:
        raise UserError("data.source holds one prompt; preference needs a wrong one beside it, at least 2")
    said = scorer.prepare(prompts)

    def rows(which: Tensor) -> Mapping[str, Tensor]:
        return {name: value[which.cpu()] for name, value in said.items()}

    def taste(x0: Tensor, asked: Sequence[Tensor]) -> list[Tensor]:
        with torch.autocast(x0.device.type, enabled=False):
            pictures = backbone.decode(x0.float())
            return [scorer.score(pictures, rows(which)) for which in asked]

    return taste, len(prompts)
