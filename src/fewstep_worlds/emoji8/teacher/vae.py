"""Training of the bundled teacher's autoencoder."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from fewstep.common.cpu_kernels import speed_up
from fewstep.common.rng import KeyedRng
from fewstep.training.loss import Loss
from fewstep.training.update import Batch, Update
from fewstep_worlds.common.autoencoder import fold_statistics, make_vae, reconstruct, reconstruction_psnr, to_tensor
from fewstep_worlds.common.training import Weights, fit
from fewstep_worlds.emoji8.config import VaeConfig


def vae_loss(vae: Any, config: VaeConfig, pictures: Tensor, rng: KeyedRng) -> Loss:
    """Return the squared and absolute error of the reconstruction, and beta times the KL divergence to N(0, I)."""
    restored, kl = reconstruct(vae, pictures, rng)
    error = restored - pictures
    squared = error.square().mean()
    value = squared + config.l1 * error.abs().mean() + config.beta * kl
    return Loss(value, scalars={"mse": squared, "kl": kl})


def train_vae(
    config: VaeConfig, pictures: np.ndarray, heldout: np.ndarray, folder: Path, accelerator: Accelerator
) -> Any:
    """Train the autoencoder on uint8 [N, 64, 64, 3] pictures; return it with its statistics folded in."""
    torch.manual_seed(config.loop.seed)
    vae = make_vae(config)
    speed_up(vae)
    vae.to(accelerator.device)

    def loss(batch: Batch, rng: KeyedRng) -> Loss:
        return vae_loss(vae, config, batch["pictures"], rng)

    def fetch(items: np.ndarray, _: KeyedRng) -> Batch:
        return {"pictures": to_tensor(pictures[items]).to(accelerator.device)}

    def evaluate(weights: Weights) -> dict[str, float]:
        averaged = make_vae(config)
        averaged.load_state_dict(weights["vae"])
        return {"psnr_heldout": reconstruction_psnr(averaged.eval(), heldout[:256])}

    inputs = {"pictures": hashlib.sha256(np.ascontiguousarray(pictures).data).hexdigest()}
    plan = [Update("vae", dict(vae.named_parameters()), loss, config.optim)]
    weights = fit("autoencoder", plan, fetch, len(pictures), folder, config, config.loop, accelerator, inputs, evaluate)
    vae.load_state_dict(weights["vae"])
    vae.cpu().eval()
    fold_statistics(vae, pictures)
    return vae
