"""Training of the teacher's autoencoder on an endless stream of scenes.

The loss is of Stable Diffusion's kind: errors of pixels and of slopes, a perceptual distance, a KL term, and a patch
critic with a hinge loss whose gradient is scaled to a share of the other terms' (arXiv 2012.09841, eq. 7).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from fewstep.common.cpu_kernels import speed_up
from fewstep.common.rng import KeyedRng
from fewstep.evaluation.features import Features
from fewstep.evaluation.frechet import FrechetDistance, Projection
from fewstep.evaluation.lite0 import Lite0, Lite0Features, make_lite0
from fewstep.evaluation.lite0_weights import load_weights
from fewstep.training.loss import Loss
from fewstep.training.update import Batch, Update
from fewstep_worlds.common.autoencoder import fold_statistics, load_vae, make_vae, psnr, reconstruct, restore, to_tensor
from fewstep_worlds.common.networks import copy_weights
from fewstep_worlds.common.training import ENDLESS, Weights, fit
from fewstep_worlds.stickers.dataset import REFERENCE_SEED, SceneWorkers, draw_scenes, fingerprint
from fewstep_worlds.stickers.settings import AutoencoderConfig

EARLY_BLOCKS = 6
"""Blocks of EfficientNet-Lite0 that the perceptual distance reads: 8x8 cells and 40 channels at the last.

FD-Lite0 reads the same network's last features, of pictures enlarged to 128x128; the distance never sees those.
"""
VALIDATION_SCENES = 500
"""Unseen scenes of a validation."""


def early_features(network: Lite0, pictures: Tensor) -> list[Tensor]:
    """Return the outputs of the first blocks, each scaled to unit length over channels (arXiv 1801.03924, eq. 1).

    Args:
        pictures: [B, 3, H, W] in [-1, 1].
    """
    blocks = network.blocks(pictures * (127.5 / 128) + 0.5 / 128)
    return [F.normalize(features.float(), dim=1, eps=1e-4) for features, _ in zip(blocks, range(EARLY_BLOCKS))]


def perceptual_distance(network: Lite0, restored: Tensor, pictures: Tensor) -> Tensor:
    """Return the mean squared distance between early features, over blocks and cells, a scalar."""
    with torch.no_grad():
        targets = early_features(network, pictures)
    found = early_features(network, restored)
    return torch.stack([(a - b).square().sum(1).mean() for a, b in zip(found, targets, strict=True)]).mean()


def slope_error(error: Tensor) -> Tensor:
    """Return the mean squared difference of neighbouring errors [B, C, H, W] along both axes, a scalar."""
    return error.diff(dim=3).square().mean() + error.diff(dim=2).square().mean()


def make_critic(channels: tuple[int, ...]) -> nn.Sequential:
    """Return a patch critic: [B, 3, H, W] -> [B, 1, H', W'], high for real patches."""
    layers: list[nn.Module] = []
    inside = 3
    for number, outside in enumerate(channels):
        stride = 2 if number < 2 else 1
        layers.append(nn.Conv2d(inside, outside, 4 if stride == 2 else 3, stride, padding=1))
        if number:
            layers.append(nn.GroupNorm(8, outside))
        layers.append(nn.LeakyReLU(0.2))
        inside = outside
    return nn.Sequential(*layers, nn.Conv2d(inside, 1, 3, padding=1))


def length(gradient: Tensor) -> Tensor:
    """Return the Euclidean length of each picture's gradient, [B, 1, 1, 1]."""
    squares: Tensor = gradient.square().sum((1, 2, 3), keepdim=True)
    return squares.sqrt()


class AutoencoderLosses:
    """The losses of the autoencoder, and of its critic on the pictures that the former restored last."""

    def __init__(self, vae: Any, critic: nn.Module, network: Lite0, config: AutoencoderConfig) -> None:
        self.vae = vae
        self.critic = critic
        self.network = network
        self.config = config
        self._restored: Tensor | None = None

    def of_vae(self, batch: Batch, rng: KeyedRng) -> Loss:
        """Return reconstruction, KL and, from `critic_from` on, the critic's term."""
        config, pictures = self.config, batch["pictures"]
        restored, kl = reconstruct(self.vae, pictures, rng)
        self._restored = restored.detach()
        error = restored - pictures
        squared = error.square().mean()
        value = squared + config.l1 * error.abs().mean() + config.slopes * slope_error(error)
        scalars = {"mse": squared, "kl": kl}
        if config.perceptual:
            scalars["perceptual"] = perceptual_distance(self.network, restored, pictures)
            value = value + config.perceptual * scalars["perceptual"]
        if rng.step >= config.critic_from and config.critic_share:
            # both gradients are taken at the pictures, so that each network has one backward pass
            (own,) = torch.autograd.grad(value, restored)
            (fooled,) = torch.autograd.grad(-self.critic(restored).float().mean(), restored)
            wanted = own + config.critic_share * fooled * length(own) / (length(fooled) + 1e-12)
            value = value.detach() + (restored * wanted).sum() - (restored * wanted).sum().detach()
        return Loss(value + config.beta * kl, scalars=scalars)

    def of_critic(self, batch: Batch, _: KeyedRng) -> Loss:
        """Return the hinge loss of the critic."""
        assert self._restored is not None
        real, fake = self.critic(batch["pictures"]).float(), self.critic(self._restored).float()
        value = (F.relu(1 - real) + F.relu(1 + fake)).mean()
        return Loss(value, scalars={"real": real.mean(), "fake": fake.mean()})


class AutoencoderMetrics:
    """PSNR of unseen scenes through an autoencoder, and their FD-Lite0 to other scenes beside its floor."""

    def __init__(self, folder: Path | None = None, cache: Path | None = None, count: int = VALIDATION_SCENES) -> None:
        self.pictures = draw_scenes(REFERENCE_SEED, range(count), folder=folder)
        self.features = Features(Lite0Features(), cache, progress=False)
        self.real = self.features(draw_scenes(REFERENCE_SEED, range(count, 3 * count), folder=folder))
        self.distance = FrechetDistance(self.features, Projection.fit(self.real))
        self.floor = self.fd(self.pictures)

    def fd(self, pictures: np.ndarray) -> float:
        """Return the FD-Lite0 of pictures to real scenes."""
        return self.distance.distance(self.features(pictures), self.real)

    def __call__(self, vae: Any) -> dict[str, float]:
        """Return the figures of an autoencoder."""
        restored = restore(vae, self.pictures)
        return {
            "psnr": float(psnr(restored, self.pictures).mean()),
            "fd": self.fd(restored),
            "fd_floor": self.floor,
        }


def train_autoencoder(
    config: AutoencoderConfig, out: Path, accelerator: Accelerator, folder: Path | None = None
) -> Any:
    """Train the autoencoder in the run folder `out`, resuming what is there; return it, its statistics folded in.

    Raises:
        UserError: the sprite sheets cannot be read, or `out` holds another run.
    """
    torch.manual_seed(config.loop.seed)
    vae, critic = make_vae(config), make_critic(config.critic_channels)
    if config.autoencoder:
        copy_weights(load_vae(Path(config.autoencoder)), vae, "autoencoder")
    if config.decoder_only:
        for part in (vae.encoder, vae.quant_conv):
            part.requires_grad_(False)
    trained = {name: weight for name, weight in vae.named_parameters() if weight.requires_grad}
    network = make_lite0(load_weights()).to(accelerator.device)
    for part in (vae, critic):
        speed_up(part)
        part.to(accelerator.device)
    losses = AutoencoderLosses(vae, critic, network, config)
    metrics: AutoencoderMetrics | None = None

    def evaluate(weights: Weights) -> dict[str, float]:
        nonlocal metrics
        metrics = metrics or AutoencoderMetrics(folder, out / "features")
        averaged = make_vae(config)
        averaged.load_state_dict(vae.state_dict() | {name: value.cpu() for name, value in weights["vae"].items()})
        speed_up(averaged)
        return metrics(averaged.eval())

    def fetch(items: np.ndarray, _: KeyedRng) -> Batch:
        return {"pictures": to_tensor(scenes.pictures(items + config.first_scene)).to(accelerator.device)}

    plan = [Update("vae", trained, losses.of_vae, config.optim)]
    if config.critic_share:
        plan.append(Update("critic", dict(critic.named_parameters()), losses.of_critic, config.critic_optim))
    inputs = {"scenes": fingerprint(folder)}
    with SceneWorkers(config.workers, folder=folder) as scenes:
        weights = fit("autoencoder", plan, fetch, ENDLESS, out, config, config.loop, accelerator, inputs, evaluate)
    vae.load_state_dict(vae.state_dict() | weights["vae"])
    vae.cpu().eval()
    if not config.decoder_only:
        fold_statistics(vae, draw_scenes(REFERENCE_SEED, range(500), folder=folder))
    return vae
