"""The denoisers of worlds' teachers: UNets of Stable Diffusion's kind, and their loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.diffusion.schedule import VariancePreserving, add_noise
from fewstep.training.loss import Loss
from fewstep_worlds.common.networks import load_network
from fewstep_worlds.common.settings import UnetShape


def make_unet(shape: UnetShape, latent_channels: int, side: int, text_width: int, plain: int = 0) -> Any:
    """Return a freshly initialised `UNet2DConditionModel`.

    Args:
        side: edge of a latent.
        text_width: width of the text states.
        plain: highest resolutions without cross-attention.
    """
    from diffusers import UNet2DConditionModel

    lower = len(shape.channels) - plain
    return UNet2DConditionModel(
        sample_size=side,
        in_channels=latent_channels,
        out_channels=latent_channels,
        block_out_channels=shape.channels,
        layers_per_block=shape.layers,
        down_block_types=("DownBlock2D",) * plain + ("CrossAttnDownBlock2D",) * lower,
        up_block_types=("CrossAttnUpBlock2D",) * lower + ("UpBlock2D",) * plain,
        cross_attention_dim=text_width,
        attention_head_dim=shape.heads,
        norm_num_groups=shape.groups,
    )


def load_unet(folder: Path) -> Any:
    """Return the `UNet2DConditionModel` of a folder, fp32, in evaluation mode.

    Raises:
        UserError: the folder holds none.
    """
    from diffusers import UNet2DConditionModel

    return load_network(UNet2DConditionModel, folder, "unet")


def eps_loss(
    unet: Any, path: VariancePreserving, latents: Tensor, states: Tensor, t: Tensor, eps: Tensor, snr_power: float
) -> Loss:
    """Return the squared error of the predicted noise, weighted by SNR(t)^-snr_power; t int64 [B].

    A power of 1/2 is the debiased loss (arXiv 2310.08442): next to a constant weight it raises high noise,
    where counts and places are decided.
    """
    x_t = add_noise(path, latents, eps, t)
    predicted = unet(x_t, t.to(x_t.device, non_blocking=True), states, return_dict=False)[0].float()
    per_sample = (predicted - eps).square().mean((1, 2, 3))
    weight = torch.exp(-2 * snr_power * path.log_snr(t)).to(per_sample)
    return Loss((weight * per_sample).mean(), per_sample, (t + 1) / (path.noisiest + 1))
