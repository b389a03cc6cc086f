"""The terms beside the consistency loss: denoising, adversarial, distribution matching, reward.

Denoising: with s = t the network learns E[x0 | x_t] (CTM, arXiv 2310.02279, section 3.3).

Reward: a differentiable scorer of pictures and prompts, used as in TLCM (arXiv 2406.05768, section 3.3),

    L = relu(s0 - s(x0, c)) + relu(s(x0, c') - s1)

with an unrelated prompt c' as negative. In the paper s0 is 16, on its scorer's scale, and s1 is 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from fewstep.common.rng import KeyedRng
from fewstep.diffusion.denoiser import Condition, Denoiser, extended
from fewstep.diffusion.grid import training_grid
from fewstep.diffusion.schedule import Path, add_noise, expand, index_of, share_of
from fewstep.methods.adversarial import generator_loss, noised_for_critic
from fewstep.methods.config import ConsistencyConfig
from fewstep.methods.consistency import Term
from fewstep.methods.distances import NetworkDistance
from fewstep.methods.distribution_matching import as_data, matching_loss
from fewstep.methods.pair import Pair
from fewstep.methods.term_config import RewardConfig
from fewstep.training.loss import Loss

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


def edm_weight(path: Path, t: Tensor, sigma_data: float = 0.5) -> Tensor:
    """Return EDM's weight of x0 errors, (rho^2 + d^2)/(rho d)^2 with rho = sigma/alpha (arXiv 2206.00364, table 1)."""
    rho2 = (path.sigma(t) / path.alpha(t)).square()
    return 1 / sigma_data**2 + 1 / rho2


def denoising_times(config: ConsistencyConfig, path: Path, rng: KeyedRng) -> Tensor:
    """Draw the times of the denoising loss, uniformly over the training grid, float64 [B]."""
    grid = training_grid(path, config.grid)
    return grid[rng.integers("denoising t", 0, len(grid))]


def denoising_loss(
    config: ConsistencyConfig, denoiser: Denoiser, x_0: Tensor, condition: Condition, rng: KeyedRng
) -> Tensor:
    """Return the weighted squared error of the student's x0 at `denoising_times`, [B]; one student call.

    Its minimiser is E[x0 | x_t]: the diffusion model itself, at s = t, where a jump's slope is the PF-ODE's.
    """
    t = denoising_times(config, denoiser.path, rng)
    eps = rng.normal("denoising noise", tuple(x_0.shape[1:]))
    x_t = add_noise(denoiser.path, x_0, eps, t)
    inputs = {"s": index_of(denoiser.path, t), "w": torch.zeros_like(t)}
    extra = extended(condition, **{name: inputs[name] for name in config.extra_conditioning})
    found = denoiser.estimate(x_t, t, extra, "student").x0
    error = (found - x_0).square().flatten(1).mean(1)
    return expand(edm_weight(denoiser.path, t), error) * error


def fine_tuning_loss(
    config: ConsistencyConfig, denoiser: Denoiser, x_0: Tensor, condition: Condition, rng: KeyedRng
) -> Loss:
    """Return the denoising loss alone, for recipes that train the diffusion model itself."""
    error = config.denoising * denoising_loss(config, denoiser, x_0, condition, rng)
    return Loss(error.mean(), error.detach(), share_of(denoiser.path, denoising_times(config, denoiser.path, rng)))


@dataclass(frozen=True)
class FrozenNetworks:
    """The frozen networks that a recipe needs, and its critic; None where it needs none.

    Attributes:
        distance: the recipe's distance by a frozen network.
        critic: the discriminator of the adversarial term.
        reward: scores of pictures with prompts, and the number of prompts.
    """

    distance: NetworkDistance | None = None
    critic: nn.Module | None = None
    reward: tuple[Reward, int] | None = None


def terms_of(method: ConsistencyConfig, frozen_networks: FrozenNetworks) -> list[Term]:
    """Return the terms beside the consistency loss."""
    terms = []
    if method.denoising:

        def denoising(pair: Pair, landing: Tensor, at: Tensor, rng: KeyedRng) -> Tensor:
            return denoising_loss(method, pair.denoiser, pair.batch.data, pair.batch.condition, rng)

        terms.append(Term("denoising", method.denoising, denoising))
    critic, config = frozen_networks.critic, method.adversarial
    if config.weight and critic is not None:

        def adversarial(pair: Pair, landing: Tensor, at: Tensor, rng: KeyedRng) -> Tensor:
            x, t = noised_for_critic(config, pair.denoiser.path, landing, at, pair.times.top, rng, "fake")
            return generator_loss(config, critic(x, t, pair.batch.condition))

        terms.append(Term("adversarial", config.weight, adversarial, config.start, config.clip))
    if method.matching.weight:
        terms.append(Term("matching", method.matching.weight, partial(matching_loss, method.matching)))
    if method.reward.weight and frozen_networks.reward is not None:
        score, count = frozen_networks.reward

        def reward(pair: Pair, landing: Tensor, at: Tensor, rng: KeyedRng) -> Tensor:
            assert pair.batch.prompts is not None
            x0 = as_data(pair.denoiser.path, landing, at)
            return reward_loss(method.reward, score, x0, pair.batch.prompts, count, rng)

        terms.append(Term("reward", method.reward.weight, reward))
    return terms
