"""Training of the bundled teacher's autoencoder."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from fewstep.common.cpu_kernels import speed_up
from fewstep.common.distributed import on_main
from fewstep.common.rng import KeyedRng
from fewstep.training.loop import Batch, Trained, Update, train
from fewstep.training.loss import Loss
from fewstep.training.run_folder import RunLog
from fewstep_worlds.emoji8.config import VaeConfig


def make_vae(config: VaeConfig) -> Any:
    """Return a freshly initialised `AutoencoderKL` for 64x64 RGB pictures."""
    from diffusers import AutoencoderKL

    depth = len(config.channels)
    return AutoencoderKL(
        block_out_channels=config.channels,
        layers_per_block=config.layers,
        latent_channels=config.latent_channels,
        norm_num_groups=config.groups,
        sample_size=64,
        down_block_types=("DownEncoderBlock2D",) * depth,
        up_block_types=("UpDecoderBlock2D",) * depth,
        scaling_factor=1.0,
    )


def to_tensor(pictures: np.ndarray) -> Tensor:
    """uint8 [B, H, W, 3] -> float32 [B, 3, H, W] in [-1, 1], channels_last."""
    return torch.from_numpy(np.array(pictures)).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)


def vae_loss(vae: Any, config: VaeConfig, pictures: Tensor, rng: KeyedRng) -> Loss:
    """Squared and absolute error of the reconstruction, and beta times the KL divergence to N(0, I)."""
    posterior = vae.encode(pictures).latent_dist
    mean, logvar = posterior.mean.float(), posterior.logvar.float()
    noise = rng.normal("posterior", tuple(mean.shape[1:]))
    restored = vae.decode(mean + torch.exp(0.5 * logvar) * noise).sample.float()
    error = restored - pictures
    squared = error.square().mean()
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    value = squared + config.l1 * error.abs().mean() + config.beta * kl
    return Loss(value, scalars={"mse": squared, "kl": kl})


def psnr(restored: np.ndarray, real: np.ndarray) -> np.ndarray:
    """10 log10(255^2 / MSE) of each picture of 8-bit levels, [N, H, W, 3] -> [N], in dB."""
    mse = np.square(restored.astype(np.float32) - real).mean(axis=(1, 2, 3))
    found: np.ndarray = 10 * np.log10(255.0**2 / np.maximum(mse, 1e-3))
    return found


@torch.no_grad()
def reconstruction_psnr(vae: Any, pictures: np.ndarray, batch: int = 64) -> float:
    """Mean over pictures of 10 log10(255^2 / MSE) of the decoded posterior mean, pictures as 8-bit, in dB."""
    values = []
    for start in range(0, len(pictures), batch):
        real = pictures[start : start + batch]
        restored = vae.decode(vae.encode(to_tensor(real)).latent_dist.mean).sample
        restored = (restored.clamp(-1, 1) * 127.5 + 127.5).round()
        values.append(psnr(restored.permute(0, 2, 3, 1).numpy(), real))
    return float(np.concatenate(values).mean())


@torch.no_grad()
def fold_statistics(vae: Any, pictures: np.ndarray, batch: int = 64) -> None:
    """Rescale the latent space, in place, so that each channel has mean 0 and variance 1 over `pictures`.

    Stable Diffusion's pipeline knows one scaling factor and no shift, so both are folded into the 1x1
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


def train_vae(
    config: VaeConfig, pictures: np.ndarray, heldout: np.ndarray, folder: Path, accelerator: Accelerator
) -> Any:
    """Train the autoencoder on uint8 [N, 64, 64, 3] pictures; return it with its statistics folded in."""
    torch.manual_seed(config.loop.seed)
    vae = make_vae(config)
    speed_up(vae)
    vae.to(accelerator.device)
    parameters = dict(vae.named_parameters())

    def loss(batch: Batch, rng: KeyedRng) -> Loss:
        return vae_loss(vae, config, batch["pictures"], rng)

    def fetch(items: np.ndarray, _: KeyedRng) -> Batch:
        return {"pictures": to_tensor(pictures[items]).to(accelerator.device)}

    def evaluate_weights(step: int, weights: dict[str, dict[str, Tensor]]) -> dict[str, float]:
        judge = make_vae(config)
        judge.load_state_dict(weights["vae"])
        return {"psnr_heldout": reconstruction_psnr(judge.eval(), heldout[:256])}

    inputs = {"pictures": hashlib.sha256(np.ascontiguousarray(pictures).data).hexdigest()}
    plan = [Update("vae", parameters, loss, config.optim)]
    with RunLog(folder, config, title="autoencoder", inputs=inputs, main=accelerator.is_main_process) as log:
        trained: Trained = train(plan, fetch, len(pictures), config.loop, log, accelerator, on_main(evaluate_weights))
    vae.load_state_dict(trained.weights["vae"])
    vae.cpu().eval()
    fold_statistics(vae, pictures)
    return vae
