"""Training of the bundled teacher's denoiser on cached latents and cached text states."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from fewstep.backbones.pipeline_folder import read_folder
from fewstep.backbones.weight_files import weight_files
from fewstep.common.cpu_kernels import speed_up
from fewstep.common.errors import UserError
from fewstep.common.rng import KeyedRng
from fewstep.common.tensors import load_tensors
from fewstep.data.latents import Encoders, latent_set
from fewstep.diffusion.schedule import scaled_linear
from fewstep.training.loss import Loss
from fewstep.training.update import Batch, Update
from fewstep_worlds.common import denoiser
from fewstep_worlds.common.denoiser import eps_loss
from fewstep_worlds.common.training import Weights, fit
from fewstep_worlds.emoji8 import dataset as emoji8
from fewstep_worlds.emoji8.config import UnetConfig


def make_unet(config: UnetConfig) -> Any:
    """Return a freshly initialised denoiser of 8x8 latents."""
    return denoiser.make_unet(config, config.latent_channels, 8, config.text_width)


def load_start(pipeline: Path, unet: Any) -> dict[str, Tensor]:
    """Return the weights of a pipeline folder's denoiser, fp32.

    Raises:
        UserError: no pipeline folder, or a denoiser of another shape than `unet`.
    """
    weights: dict[str, Tensor] = {}
    for file in weight_files(read_folder(pipeline, "unet.start").path / "unet"):
        weights |= {name: tensor.float() for name, tensor in load_tensors(file).items()}
    ours, theirs = ({name: tuple(x.shape) for name, x in of.items()} for of in (unet.state_dict(), weights))
    if ours != theirs:
        name = next(name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name))
        raise UserError(
            f"unet.start = {str(pipeline)!r} is a denoiser of another shape: "
            f"{name} is {theirs.get(name)}, not {ours.get(name)}"
        )
    return weights


def train_unet(config: UnetConfig, encoders: Encoders, fingerprint: str, folder: Path, accelerator: Accelerator) -> Any:
    """Train the denoiser on Emoji-8's training split; return it with averaged weights.

    Latents and text states are computed once and kept in `folder`/cache, keyed by the encoders' `fingerprint`.
    """
    heldout = emoji8.load("heldout-pair")
    seed = config.loop.seed
    data = latent_set(emoji8.captioned(config.captions, seed), encoders, fingerprint, folder / "cache")
    heldout_latents = encoders.to_latents(heldout.pictures)
    heldout_states = encoders.encode([emoji8.name_with_style(record) for record in heldout.records])["text"]
    torch.manual_seed(seed)
    unet = make_unet(config)
    inputs = data.inputs
    if config.start:
        unet.load_state_dict(load_start(Path(config.start), unet))
        inputs["start"] = read_folder(config.start).fingerprint("unet")
    speed_up(unet)
    unet.to(accelerator.device)
    path = scaled_linear()
    total = int(path.noisiest) + 1
    device = accelerator.device

    def loss(batch: Batch, rng: KeyedRng) -> Loss:
        items = batch["items"]
        x_0 = data.latents[items].to(device, non_blocking=True)
        states = data.condition(items, rng, config.prompt_dropout, device)["text"]
        eps = rng.normal("noise", tuple(x_0.shape[1:]))
        t = rng.integers("t", 0, total)
        return eps_loss(unet, path, x_0, states, t, eps, config.min_snr)

    def fetch(items: np.ndarray, _: KeyedRng) -> Batch:
        return {"items": torch.from_numpy(items)}

    averaged = make_unet(config)
    speed_up(averaged)

    @torch.no_grad()
    def evaluate(weights: Weights) -> dict[str, float]:
        averaged.load_state_dict({name: value.cpu() for name, value in weights["unet"].items()})
        rng = KeyedRng(seed, 0, tuple(range(len(heldout_latents))))
        eps = rng.normal("watch noise", tuple(heldout_latents.shape[1:]))
        t = torch.arange(len(heldout_latents)) * total // len(heldout_latents)
        parts = []
        for i in range(0, len(heldout_latents), 128):
            part = slice(i, i + 128)
            value = eps_loss(
                averaged, path, heldout_latents[part], heldout_states[part], t[part], eps[part], config.min_snr
            )
            assert value.per_sample is not None
            parts.append(value.per_sample)
        return {"eps_mse_heldout_pairs": float(torch.cat(parts).mean())}

    plan = [Update("unet", dict(unet.named_parameters()), loss, config.optim)]
    weights = fit("denoiser", plan, fetch, len(data), folder, config, config.loop, accelerator, inputs, evaluate)
    unet.load_state_dict(weights["unet"])
    return unet.eval()
