"""An autoencoder's latents: their scale, batches that fit into memory, pictures as bytes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fewstep.common.tensors import check_finite

MOST_PIXELS = 2**20
"""Pixels that the autoencoder takes at once: 4 pictures of 512 x 512, 1 GiB for each of its widest activations."""


def to_bytes(decoded: Tensor) -> np.ndarray:
    """Convert pictures [N, 3, H, W] in [-1, 1] to uint8 [N, H, W, 3], rounded as diffusers rounds."""
    scaled = (decoded * 0.5 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).float().cpu().numpy()
    return (scaled * 255).round().astype(np.uint8)


def of_video(vae: Any) -> bool:
    """Return whether an autoencoder is of video, [N, C, frames, h, w]: a picture is one frame."""
    return hasattr(vae.config, "z_dim")


def _scale_of(vae: Any, latents: Tensor) -> tuple[Any, Any]:
    """Return (mean, factor) of an autoencoder's latents: numbers, or [C, 1, 1] where each channel has its own."""
    config = vae.config
    if hasattr(vae, "bn"):  # FLUX.2's statistics, of each point of a patch
        deviation = (vae.bn.running_var + vae.bn.eps).sqrt()
        return vae.bn.running_mean.reshape(-1, 1, 1), 1 / deviation.reshape(-1, 1, 1)
    mean, deviation = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
    scale = getattr(config, "scaling_factor", 1.0)
    if mean is None or deviation is None:
        return getattr(config, "shift_factor", None) or 0.0, scale
    each = [latents.new_tensor(values).reshape(-1, 1, 1) for values in (mean, deviation)]
    return each[0], scale / each[1]


def to_network_scale(vae: Any, latents: Tensor) -> Tensor:
    """Scale an autoencoder's latents [N, C, h, w] to the network's: (z - mean) factor.

    The mean is latents_mean, the factor scaling_factor / latents_std (SDXL's pipelines); or shift_factor and
    scaling_factor where the autoencoder's config names no mean and deviation of each channel. FLUX.2's latents become
    channels, patch by patch, before.
    """
    patch = getattr(vae.config, "patch_size", None) or [1]
    latents = nn.functional.pixel_unshuffle(latents, patch[0])
    mean, factor = _scale_of(vae, latents)
    scaled: Tensor = (latents - mean) * factor
    return scaled


def from_network_scale(vae: Any, latents: Tensor) -> Tensor:
    """Scale the network's latents to the autoencoder's, the inverse of `to_network_scale`."""
    patch = getattr(vae.config, "patch_size", None) or [1]
    mean, factor = _scale_of(vae, latents)
    return nn.functional.pixel_shuffle(latents / factor + mean, patch[0])


def decode(vae: Any, latents: Tensor) -> Tensor:
    """Decode latents at the network's scale to pictures [N, 3, H, W] in about [-1, 1]."""
    z = from_network_scale(vae, latents)
    decoded: Tensor = vae.decode(z[:, :, None] if of_video(vae) else z, return_dict=False)[0]
    return decoded[:, :, 0] if of_video(vae) else decoded


def at_once(pixels: int) -> int:
    """Return how many pictures of so many pixels the autoencoder takes at once."""
    return min(128, max(1, MOST_PIXELS // pixels))


@torch.no_grad()
def encode_pictures(vae: Any, pictures: np.ndarray, device: torch.device, name: str = "the autoencoder") -> Tensor:
    """Encode uint8 [N, H, W, 3] to posterior means, fp32 [N, C, h, w] on the CPU, at the network's scale.

    Args:
        name: of the autoencoder, for errors.

    Raises:
        UserError: a latent is not finite.
    """
    parts = []
    batch = at_once(pictures.shape[1] * pictures.shape[2])
    for start in range(0, len(pictures), batch):
        part = torch.from_numpy(np.array(pictures[start : start + batch])).to(device)
        part = part.permute(0, 3, 1, 2).float() / 127.5 - 1
        found = vae.encode(part[:, :, None] if of_video(vae) else part)
        # AutoencoderTiny and AutoencoderDC are deterministic
        means = found.latent_dist.mean if hasattr(found, "latent_dist") else found[0]
        means = means[:, :, 0] if of_video(vae) else means
        parts.append(to_network_scale(vae, means).cpu())
        check_finite({"a latent": parts[-1]}, f"{name} cannot encode the pictures")
    return torch.cat(parts)
