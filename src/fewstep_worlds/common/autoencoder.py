"""Autoencoders of worlds: pictures as tensors, reconstruction error, folded statistics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fewstep.common.rng import KeyedRng
from fewstep_worlds.common.networks import load_network
from fewstep_worlds.common.settings import AutoencoderShape


def make_vae(shape: AutoencoderShape) -> Any:
    """Return a freshly initialised `AutoencoderKL` for 64x64 RGB pictures."""
    from diffusers import AutoencoderKL

    depth = len(shape.channels)
    return AutoencoderKL(
        block_out_channels=shape.channels,
        layers_per_block=shape.layers,
        latent_channels=shape.latent_channels,
        norm_num_groups=shape.groups,
        sample_size=64,
        down_block_types=("DownEncoderBlock2D",) * depth,
        up_block_types=("UpDecoderBlock2D",) * depth,
        scaling_factor=1.0,
    )


def load_vae(folder: Path) -> Any:
    """Return the `AutoencoderKL` of a folder, fp32, in evaluation mode.

    Raises:
        UserError: the folder holds none.
    """
    from diffusers import AutoencoderKL

    return load_network(AutoencoderKL, folder, "autoencoder")


def to_tensor(pictures: np.ndarray) -> Tensor:
    """Return uint8 [B, H, W, 3] as float32 [B, 3, H, W] in [-1, 1]."""
    return torch.from_numpy(np.array(pictures)).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)


def to_pictures(x: Tensor) -> np.ndarray:
    """Return [B, 3, H, W] in [-1, 1] as uint8 [B, H, W, 3]; values outside are clamped."""
    levels = (x.float().clamp(-1, 1) * 127.5 + 127.5).round().byte()
    pictures: np.ndarray = levels.permute(0, 2, 3, 1).cpu().numpy()
    return pictures


def reconstruct(vae: Any, pictures: Tensor, rng: KeyedRng) -> tuple[Tensor, Tensor]:
    """Return pictures [B, 3, H, W] decoded from a sample of their posterior, and the KL divergence to N(0, I).

    The divergence is the mean over latent numbers, a scalar.
    """
    posterior = vae.encode(pictures).latent_dist
    mean, logvar = posterior.mean.float(), posterior.logvar.float()
    noise = rng.normal("posterior", tuple(mean.shape[1:]))
    restored: Tensor = vae.decode(mean + torch.exp(0.5 * logvar) * noise).sample.float()
    return restored, 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()


@torch.no_grad()
def restore(vae: Any, pictures: np.ndarray, batch: int = 64) -> np.ndarray:
    """Return pictures decoded from their posterior means, uint8 [N, H, W, 3]."""
    parts = []
    for start in range(0, len(pictures), batch):
        part = to_tensor(pictures[start : start + batch]).to(vae.device)
        parts.append(to_pictures(vae.decode(vae.encode(part).latent_dist.mean).sample))
    return np.concatenate(parts)


def psnr(restored: np.ndarray, real: np.ndarray) -> np.ndarray:
    """Return 10 log10(255^2 / MSE) of each picture of 8-bit levels, [N, H, W, 3] -> [N], in dB."""
    mse = np.square(restored.astype(np.float32) - real).mean(axis=(1, 2, 3))
    found: np.ndarray = 10 * np.log10(255.0**2 / np.maximum(mse, 1e-3))
    return found


@torch.no_grad()
def fold_statistics(vae: Any, pictures: np.ndarray, batch: int = 64) -> None:
    """Rescale the latent space, in place, so that each channel has mean 0 and variance 1 over `pictures`.

    Stable Diffusion's pipeline has one scaling factor and no shift, so both are folded into the 1x1
    convolutions around the latent: `quant_conv` (encoder side) and `post_quant_conv` (decoder side).
    Reconstructions do not change.
    """
    channels = vae.config.latent_channels
    total = square = torch.zeros(channels, dtype=torch.float64)
    count = 0
    for start in range(0, len(pictures), batch):
        z = vae.encode(to_tensor(pictures[start : start + batch])).latent_dist.mean.double()
        total = total + z.sum((0, 2, 3))
        square = square + z.square().sum((0, 2, 3))
        count += z.shape[0] * z.shape[2] * z.shape[3]
    mean = total / count
    std = (square / count - mean.square()).sqrt()
    mean, std = mean.float(), std.float()
    quant: nn.Conv2d = vae.quant_conv
    assert quant.bias is not None
    quant.weight[:channels] /= std[:, None, None, None]
    quant.bias[:channels] = (quant.bias[:channels] - mean) / std
    quant.bias[channels:] -= 2 * std.log()
    post: nn.Conv2d = vae.post_quant_conv
    assert post.bias is not None
    post.bias += (post.weight[:, :, 0, 0] * mean).sum(1)
    post.weight *= std[None, :, None, None]
