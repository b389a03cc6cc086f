"""Training of the autoencoder's decoder alone, on latents as a denoiser leaves them: a little noisy.

The encoder is frozen, so everything that was trained on its latents stays valid. A decoder trained on clean latents
turns remaining noise into texture, which is visible in drawings.
"""

from __future__ import annotations

import copy
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from fewstep.backbones.autoencoder import encode_pictures
from fewstep.common.cpu_kernels import speed_up
from fewstep.common.rng import KeyedRng
from fewstep.training.loss import Loss
from fewstep.training.update import Batch, Update
from fewstep_worlds.common.autoencoder import reconstruction_psnr, to_tensor
from fewstep_worlds.common.training import Weights, fit
from fewstep_worlds.emoji8.config import DecoderConfig


def decoder_loss(vae: Any, config: DecoderConfig, latents: Tensor, pictures: Tensor, rng: KeyedRng) -> Loss:
    """Return the absolute error of the picture and of its slopes, from latents with noise of a drawn level.

    The absolute error of slopes is lowest for sharp edges and flat colours.
    """
    noise = rng.normal("latent noise", tuple(latents.shape[1:]))
    level = (config.noise * rng.uniform("level")).to(latents)
    restored = vae.decode(latents + level[:, None, None, None] * noise).sample.float()
    flat = (restored - pictures).abs().mean()
    down, across = ((restored.diff(dim=dim) - pictures.diff(dim=dim)).abs().mean() for dim in (2, 3))
    edges = down + across
    return Loss(flat + config.slopes * edges, scalars={"l1": flat, "slopes": edges})


def train_decoder(
    config: DecoderConfig, vae: Any, pictures: np.ndarray, heldout: np.ndarray, folder: Path, accelerator: Accelerator
) -> Any:
    """Train `vae`'s decoder on uint8 [N, 64, 64, 3] pictures; return the autoencoder with averaged decoder weights."""
    speed_up(vae)
    latents = encode_pictures(vae.cpu().eval(), pictures, torch.device("cpu"))
    device = accelerator.device
    vae.to(device).requires_grad_(False)
    parameters = {
        name: parameter.requires_grad_()
        for name, parameter in vae.named_parameters()
        if name.startswith(("decoder.", "post_quant_conv."))
    }
    inputs = {
        "pictures": hashlib.sha256(np.ascontiguousarray(pictures).data).hexdigest(),
        "latents": hashlib.sha256(latents.numpy().tobytes()).hexdigest(),
    }
    averaged = copy.deepcopy(vae)

    def loss(batch: Batch, rng: KeyedRng) -> Loss:
        return decoder_loss(vae, config, batch["latents"], batch["pictures"], rng)

    def fetch(items: np.ndarray, _: KeyedRng) -> Batch:
        rows = torch.from_numpy(items)
        return {"latents": latents[rows].to(device), "pictures": to_tensor(pictures[items]).to(device)}

    def evaluate(weights: Weights) -> dict[str, float]:
        averaged.load_state_dict({**vae.state_dict(), **weights["decoder"]})
        return {"psnr_heldout": reconstruction_psnr(averaged.cpu().eval(), heldout[:256])}

    plan = [Update("decoder", parameters, loss, config.optim)]
    weights = fit("decoder", plan, fetch, len(pictures), folder, config, config.loop, accelerator, inputs, evaluate)
    vae.load_state_dict({**vae.state_dict(), **weights["decoder"]})
    return vae.requires_grad_(False).cpu().eval()
