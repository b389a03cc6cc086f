"""Training of the autoencoder's decoder alone, on latents as a denoiser leaves them: a little noisy.

The encoder stays as it is, and so does everything that was trained on its latents. An autoencoder trained on clean
latents paints what is left of the noise into flat colours and edges; drawings show that at once.
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

from fewstep.backbones.base import encode_pictures
from fewstep.common.cpu_kernels import speed_up
from fewstep.common.distributed import on_main
from fewstep.common.rng import KeyedRng
from fewstep.training.loop import Batch, Trained, Update, train
from fewstep.training.loss import Loss
from fewstep.training.run_folder import RunLog
from fewstep_worlds.emoji8.config import DecoderConfig
from fewstep_worlds.emoji8.teacher.vae import reconstruction_psnr, to_tensor


def slopes(pictures: Tensor) -> tuple[Tensor, Tensor]:
    """Differences of neighbouring pixels of [B, C, H, W], down and across."""
    return pictures[:, :, 1:] - pictures[:, :, :-1], pictures[:, :, :, 1:] - pictures[:, :, :, :-1]


def decoder_loss(vae: Any, config: DecoderConfig, latents: Tensor, pictures: Tensor, rng: KeyedRng) -> Loss:
    """Absolute error of the picture and of its slopes, from latents with noise of a drawn level.

    The absolute error of slopes asks for edges where there are edges and for none in flat colours.
    """
    noise = rng.normal("latent noise", tuple(latents.shape[1:]))
    level = (config.noise * rng.uniform("level")).to(latents)
    restored = vae.decode(latents + level[:, None, None, None] * noise).sample.float()
    flat = (restored - pictures).abs().mean()
    (down, across), (down_real, across_real) = slopes(restored), slopes(pictures)
    edges = (down - down_real).abs().mean() + (across - across_real).abs().mean()
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
    judge = copy.deepcopy(vae)

    def loss(batch: Batch, rng: KeyedRng) -> Loss:
        return decoder_loss(vae, config, batch["latents"], batch["pictures"], rng)

    def fetch(items: np.ndarray, _: KeyedRng) -> Batch:
        rows = torch.from_numpy(items)
        return {"latents": latents[rows].to(device), "pictures": to_tensor(pictures[items]).to(device)}

    def evaluate_weights(step: int, weights: dict[str, dict[str, Tensor]]) -> dict[str, float]:
        judge.load_state_dict({**vae.state_dict(), **weights["decoder"]})
        return {"psnr_heldout": reconstruction_psnr(judge.cpu().eval(), heldout[:256])}

    plan = [Update("decoder", parameters, loss, config.optim)]
    with RunLog(folder, config, title="decoder", inputs=inputs, main=accelerator.is_main_process) as log:
        trained: Trained = train(plan, fetch, len(pictures), config.loop, log, accelerator, on_main(evaluate_weights))
    vae.load_state_dict({**vae.state_dict(), **trained.weights["decoder"]})
    return vae.requires_grad_(False).cpu().eval()
