"""Training of the bundled teacher's denoiser on cached latents and cached text states."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from fewstep.backbones.pipeline_folder import read_folder, weight_files
from fewstep.common.cpu_kernels import speed_up
from fewstep.common.distributed import on_main
from fewstep.common.errors import UserError
from fewstep.common.rng import KeyedRng
from fewstep.common.tensors import load_tensors
from fewstep.data.latents import Encoders, latent_set
from fewstep.diffusion.schedule import VariancePreserving, add_noise, scaled_linear
from fewstep.training.loop import Batch, Trained, Update, train
from fewstep.training.loss import Loss
from fewstep.training.run_folder import RunLog
from fewstep_worlds.emoji8 import dataset as emoji8
from fewstep_worlds.emoji8.config import UnetConfig


def make_unet(config: UnetConfig) -> Any:
    """Return a freshly initialised `UNet2DConditionModel`."""
    from diffusers import UNet2DConditionModel

    depth = len(config.channels)
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=config.latent_channels,
        out_channels=config.latent_channels,
        block_out_channels=config.channels,
        layers_per_block=config.layers,
        down_block_types=("CrossAttnDownBlock2D",) * depth,
        up_block_types=("CrossAttnUpBlock2D",) * depth,
        cross_attention_dim=config.text_width,
        attention_head_dim=config.heads,
        norm_num_groups=config.groups,
    )


def started(pipeline: Path, unet: Any) -> dict[str, Tensor]:
    """The weights of a pipeline folder's denoiser, fp32.

    Raises:
        UserError: no pipeline folder, or a denoiser of another shape than `unet`.
    """
    weights: dict[str, Tensor] = {}
    for file in weight_files(read_folder(pipeline, "unet.start").path / "unet"):
        weights |= {name: tensor.float() for name, tensor in load_tensors(file).items()}
    mine = {name: tuple(tensor.shape) for name, tensor in unet.state_dict().items()}
    theirs = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    if mine != theirs:
        name = next(name for name in {**mine, **theirs} if mine.get(name) != theirs.get(name))
        raise UserError(
            f"unet.start = {str(pipeline)!r} is a denoiser of another shape: "
            f"{name} is {theirs.get(name)}, not {mine.get(name)}"
        )
    return weights


def eps_loss(
    unet: Any,
    path: VariancePreserving,
    latents: Tensor,
    states: Tensor,
    t: Tensor,
    eps: Tensor,
    min_snr: float,
) -> Loss:
    """Min-SNR-weighted squared error of the predicted noise (arXiv 2303.09556); t int64 [B]."""
    x_t = add_noise(path, latents, eps, t)
    predicted = unet(x_t, t.to(x_t.device, non_blocking=True), states, return_dict=False)[0].float()
    per_sample = (predicted - eps).square().mean((1, 2, 3))
    snr = torch.exp(2 * path.log_snr(t))
    weight = (snr.clamp(max=min_snr) / snr).to(per_sample)
    return Loss((weight * per_sample).mean(), per_sample, (t + 1) / (path.noisiest + 1))


def train_unet(config: UnetConfig, encoders: Encoders, fingerprint: str, folder: Path, accelerator: Accelerator) -> Any:
    """Train the denoiser on Emoji-8's training split; return it with averaged weights.

    Latents and text states are computed once and kept in `folder`/cache, known by the encoders' `fingerprint`.
    """
    heldout = emoji8.load("heldout-pair")
    seed = config.loop.seed
    data = latent_set(emoji8.captioned(config.captions, seed), encoders, fingerprint, folder / "cache")
    judged = encoders.to_latents(heldout.pictures)
    judged_states = encoders.encode([emoji8.name_with_style(record) for record in heldout.records])["text"]
    torch.manual_seed(seed)
    unet = make_unet(config)
    inputs = data.inputs
    if config.start:
        unet.load_state_dict(started(Path(config.start), unet))
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

    judge = make_unet(config)
    speed_up(judge)

    @torch.no_grad()
    def evaluate_weights(step: int, weights: dict[str, dict[str, Tensor]]) -> dict[str, float]:
        judge.load_state_dict({name: value.cpu() for name, value in weights["unet"].items()})
        rng = KeyedRng(seed, 0, tuple(range(len(judged))))
        eps = rng.normal("watch noise", tuple(judged.shape[1:]))
        t = torch.arange(len(judged)) * total // len(judged)
        parts = []
        for i in range(0, len(judged), 128):
            part = slice(i, i + 128)
            value = eps_loss(judge, path, judged[part], judged_states[part], t[part], eps[part], config.min_snr)
            assert value.per_sample is not None
            parts.append(value.per_sample)
        return {"eps_mse_heldout_pairs": float(torch.cat(parts).mean())}

    plan = [Update("unet", dict(unet.named_parameters()), loss, config.optim)]
    with RunLog(folder, config, title="denoiser", inputs=inputs, main=accelerator.is_main_process) as log:
        trained: Trained = train(plan, fetch, len(data), config.loop, log, accelerator, on_main(evaluate_weights))
    unet.load_state_dict(trained.weights["unet"])
    return unet.eval()
