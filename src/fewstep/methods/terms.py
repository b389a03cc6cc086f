"""Reward: a differentiable scorer of pictures and prompts, used as in TLCM (arXiv 2406.05768, section 3.3).

    L = relu(s0 - s(x0, c)) + relu(s(x0, c') - s1)

with an unrelated prompt c' as negative. In the paper s0 is 16, on its scorer's scale, and s1 is 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fewstep.common.rng import KeyedRng
from fewstep.methods.config import RewardConfig

Reward = Callable[[Tensor, Sequence[Tensor]], Sequence[Tensor]]
"""(clean latents x_0 [B, ...], several prompts for each: int64 [B] tensors of prompt numbers) -> scores with each, [B]
tensors, with gradient to x_0."""


def other_prompts(prompts: Tensor, count: int, rng: KeyedRng) -> Tensor:
    """Draw for each prompt another one of `count`, uniformly; int64 [B].

    A sample without prompt (its number is `count`) gets any.
    """
    shift = 1 + (rng.uniform("wrong prompt") * (count - 1)).long()
    return torch.where(prompts < count, (prompts + shift) % count, shift - 1)


def reward_loss(config: RewardConfig, reward: Reward, x0: Tensor, prompts: Tensor, count: int, rng: KeyedRng) -> Tensor:
    """Return the two-sided hinge, [B]; 0 for a sample without prompt.

    Args:
        prompts: number of each sample's prompt, int64 [B]; `count` for the empty one.
    """
    right, wrong = reward(x0, (prompts % count, other_prompts(prompts, count, rng)))
    hinge = torch.relu(config.aim - right) + torch.relu(wrong - config.s1)
    return torch.where((prompts < count).to(hinge.device, non_blocking=True), hinge, 0.0)
