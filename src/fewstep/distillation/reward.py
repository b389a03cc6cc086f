"""A preference scorer on a teacher's latents: decoded with gradient, scored with the prompts of the training set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fewstep.backbones.base import Backbone
from fewstep.backbones.recompute import recompute_blocks
from fewstep.common.errors import UserError
from fewstep.methods.reward_loss import Reward
from fewstep.methods.rewards.reward import PreferenceScorer

MOST_HELD = 2**30
"""Bytes of prepared prompts that are kept in memory; more are prepared as they are asked for."""
MOST_PIXELS = 2**17
"""Pixels that are decoded and scored at once with all activations kept: 2.8 GiB of SD's decoder in fp32."""


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


def pixels_of(backbone: Backbone, scorer: PreferenceScorer, x0: Tensor) -> int:
    """Return the pixels that a picture takes: its own, or those of the scorer's input where these are more."""
    own = x0.shape[-2] * x0.shape[-1] * backbone.folder.scale**2
    framing = getattr(scorer, "framing", None)
    return max(own, framing.size**2 if framing else 0)


def make_reward(backbone: Backbone, scorer: PreferenceScorer, prompts: Sequence[str]) -> tuple[Reward, int]:
    """What the reward term asks: (x_0, which prompts) -> scores; and of how many prompts.

    Pictures are decoded in fp32, once for all prompts that they are scored with. A batch of more than `MOST_PIXELS` is
    decoded and scored in parts, each computed again in the backward pass, so that the activations of one part are held
    at a time. The decoder of a picture that is larger by itself computes its blocks again as well.

    Raises:
        UserError: a single prompt, beside which no other one is wrong.
    """
    if len(prompts) < 2:
        raise UserError("data.source holds one prompt; method.reward needs a wrong one beside it, at least 2")
    said = Prepared(scorer, prompts)

    def scored(x0: Tensor, *rows: Mapping[str, Tensor]) -> list[Tensor]:
        pictures = backbone.decode(x0)
        return [scorer.score(pictures, own) for own in rows]

    def reward(x0: Tensor, asked: Sequence[Tensor]) -> list[Tensor]:
        pixels = pixels_of(backbone, scorer, x0)
        if pixels > MOST_PIXELS:
            recompute_blocks(backbone.vae.decoder)
        rows = [said.rows(which) for which in asked]
        with torch.autocast(x0.device.type, enabled=False):
            parts = torch.split(x0.float(), max(1, MOST_PIXELS // pixels))
            if len(parts) == 1:
                return scored(parts[0], *rows)
            found = []
            for start, part in zip(range(0, len(x0), len(parts[0])), parts, strict=True):
                own = [{name: value[start : start + len(part)] for name, value in row.items()} for row in rows]
                found.append(checkpoint(scored, part, *own, use_reentrant=False, preserve_rng_state=False))
        return [torch.cat(scores) for scores in zip(*found, strict=True)]

    return reward, len(prompts)
