"""Adversarial terms: a critic discriminates the student's landings from real points.

A critic is any function (x, t, condition) -> logits [B, ...]: heads on frozen teacher features, or a small network of
its own. Its inputs are noised by a drawn amount if the recipe sets it, which makes the two distributions overlap.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fewstep.common.distributed import average_over_processes
from fewstep.common.rng import KeyedRng
from fewstep.diffusion.denoiser import Condition
from fewstep.diffusion.samplers import diffuse
from fewstep.diffusion.schedule import Path
from fewstep.methods.distances import FeaturesOf
from fewstep.methods.term_config import AdversarialConfig
from fewstep.training.loss import Loss

Critic = Callable[[Tensor, Tensor, Condition], Tensor]
"""(x [B, ...], t float64 [B], condition) -> logits [B, ...], high for real."""


def per_item(values: Tensor) -> Tensor:
    """Return the mean over all axes but the first, [B]."""
    return values.flatten(1).mean(1) if values.dim() > 1 else values


def noised_for_critic(
    config: AdversarialConfig,
    path: Path,
    x: Tensor,
    at: Tensor,
    top: Tensor,
    rng: KeyedRng,
    purpose: str,
    to: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return points x at the times `at` diffused to drawn times above, or to `to`; and those times, float64 [B].

    Drawn times lie up to the share `config.noise` of the way to `top`, the upper edge of the segment (PCM, arXiv
    2405.18407, draws from the whole segment). `purpose` keys the noise: real and fake points have their own.
    """
    if to is None:
        to = at + rng.uniform("critic t", 0, config.noise) * (top - at) if config.noise else at
    if to is at:
        return x, at
    return diffuse(path, x, at, to, rng.normal(f"{purpose} noise", tuple(x.shape[1:]))), to


def generator_loss(config: AdversarialConfig, logits: Tensor) -> Tensor:
    """Return the student's loss, [B]: -D (hinge, arXiv 1802.05957) or softplus(-D) (non-saturating, 1406.2661)."""
    return per_item(-logits if config.kind == "hinge" else torch.nn.functional.softplus(-logits))


def discriminate(
    config: AdversarialConfig,
    critic: Critic,
    real: tuple[Tensor, Tensor],
    fake: tuple[Tensor, Tensor],
    condition: Condition,
) -> Loss:
    """Return the critic's loss: relu(1 - D(real)) + relu(1 + D(fake)), or softplus(-D(real)) + softplus(D(fake)).

    R1 (arXiv 1801.04406) adds r1/2 |dD(real)/dx|^2. The log gets both mean logits, and the share of all pairs
    (real, fake) that the critic ranks right: 0.5 is chance, whatever the logits' offset.
    """
    real_x = real[0].detach().requires_grad_(config.r1 > 0)
    # R1 needs a second derivative, which fused attention does not have
    with sdpa_kernel(SDPBackend.MATH) if config.r1 else nullcontext():
        on_real = critic(real_x, real[1], condition)
    on_fake = critic(fake[0].detach(), fake[1], condition)
    if config.kind == "hinge":
        per_sample = per_item(torch.relu(1 - on_real)) + per_item(torch.relu(1 + on_fake))
    else:
        soft = torch.nn.functional.softplus
        per_sample = per_item(soft(-on_real)) + per_item(soft(on_fake))
    above = per_item(on_real.detach())[:, None] - per_item(on_fake.detach())
    scalars = {
        "real": on_real.detach().mean(),
        "fake": on_fake.detach().mean(),
        "ranked": (0.5 + 0.5 * above.sign()).float().mean(),
    }
    if config.r1:
        (slope,) = torch.autograd.grad(on_real.sum(), real_x, create_graph=True)
        per_sample = per_sample + config.r1 / 2 * slope.square().flatten(1).sum(1)
    return Loss(per_sample.mean(), per_sample.detach(), None, scalars)


GRADIENT_EPSILON = 1e-4
"""Added to the norm that is divided by, as in CTM's released code."""
ANY_RATIO = (0.0, 1e4)
"""Default range of a ratio of gradients, as in CTM's released code."""


def gradient_ratio(first: Tensor, second: Tensor, weight: Tensor, clip: tuple[float, float] = ANY_RATIO) -> Tensor:
    """Return |d first/d weight| / (|d second/d weight| + 1e-4) of the means over the batch, clipped; a scalar.

    CTM multiplies its second and third loss by it, at the network's last layer (arXiv 2310.02279, eq 13, after VQGAN);
    for a LoRA, its last adapter. Gradients are averaged over processes, which all must call.

    Args:
        first, second: losses, [B] each.
        weight: parameter that both depend on.
        clip: smallest and largest ratio.
    """
    slopes = [torch.autograd.grad(loss.mean(), weight, retain_graph=True)[0] for loss in (first, second)]
    average_over_processes(slopes)  # before the norms: the norm of the mean is needed
    one, other = (slope.norm() for slope in slopes)
    ratio: Tensor = (one / (other + GRADIENT_EPSILON)).clamp(*clip)
    return ratio.detach()


class FeatureCritic(nn.Module):
    """Heads of two 1x1 convolutions on each feature map, as in PCM and LADD (arXiv 2405.18407, 2403.12015).

    The last layers start at zero, so that a fresh critic's logits are 0.

    Args:
        features: of the frozen network, whose weights are no part of this module.
        channels: of each feature map.
    """

    def __init__(self, features: FeaturesOf, channels: Sequence[int], width: int = 64, seed: int = 0) -> None:
        super().__init__()
        self._features = features
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.heads = nn.ModuleList()
            for count in channels:
                last = nn.Conv2d(width, 1, 1).requires_grad_(False)
                last.weight.zero_()
                last.bias.zero_()  # type: ignore[union-attr]
                last.requires_grad_(True)
                self.heads.append(nn.Sequential(nn.Conv2d(count, width, 1), nn.SiLU(), last))

    def forward(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Return logits [B, maps] of x [B, ...] at t float64 [B], the mean over each map's places."""
        maps = self._features(x, t, condition)
        return torch.stack([head(part).flatten(1).mean(1) for head, part in zip(self.heads, maps, strict=True)], 1)
