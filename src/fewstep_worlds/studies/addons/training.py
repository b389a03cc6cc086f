"""Add-ons trained on the base with diffusers' own classes and the noise-prediction loss.

Each is written in the format of its own loader. Students are not involved.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fewstep.backbones.base import Backbone
from fewstep.common.accelerator import make_accelerator
from fewstep.common.cpu_kernels import speed_up
from fewstep.common.files import atomic_folder
from fewstep.common.rng import KeyedRng
from fewstep.diffusion.schedule import add_noise
from fewstep.evaluation.metric import Pictures
from fewstep.training.loss import Loss
from fewstep.training.update import Batch, Update
from fewstep_worlds.common.training import ENDLESS, fit
from fewstep_worlds.studies.addons.pipelines import pipeline
from fewstep_worlds.studies.settings import AddOnConfig

Predict = Callable[[Tensor, Tensor, Tensor, Tensor, KeyedRng], Tensor]
"""(x_t, t int64 [B], text states, condition, random numbers) -> predicted noise."""


Examples = tuple[Pictures, list[str], Tensor]
"""Pictures, prompts, conditions: control maps [B, 3, H, W] in [0, 1], features [B, width], or [B, 0] for none."""


@dataclass(frozen=True)
class AddOnTraining:
    """The training of an add-on on an endless stream of examples.

    Attributes:
        base: the pipeline that it is for.
        examples: indices -> examples.
        run: run folder.
        inputs: fingerprints of base and examples.
        empty: share of empty prompts.
    """

    base: Backbone
    config: AddOnConfig
    examples: Callable[[np.ndarray], Examples]
    run: Path
    inputs: Mapping[str, str]
    empty: float


def train_weights(spec: AddOnTraining, weights: Mapping[str, nn.Parameter], predict: Predict) -> None:
    """Train the named weights in place by the noise-prediction loss; a stopped run is resumed."""
    base, config = spec.base, spec.config
    total = int(base.path.noisiest) + 1

    def fetch(items: np.ndarray, rng: KeyedRng) -> Batch:
        pictures, prompts, condition = spec.examples(items)
        dropped = rng.chance("empty prompt", spec.empty).tolist()
        states = base.encode(["" if empty else prompt for empty, prompt in zip(dropped, prompts, strict=True)])["text"]
        batch = {"latents": base.to_latents(pictures), "states": states, "condition": condition}
        return {name: tensor.to(base.device) for name, tensor in batch.items()}

    def loss(batch: Batch, rng: KeyedRng) -> Loss:
        x_0 = batch["latents"]
        eps, t = rng.normal("noise", tuple(x_0.shape[1:])), rng.integers("t", 0, total)
        x_t = add_noise(base.path, x_0, eps, t)
        output = predict(x_t, t.to(x_t.device), batch["states"], batch["condition"], rng).float()
        per_sample = (output - eps).square().mean((1, 2, 3))
        return Loss(per_sample.mean(), per_sample.detach(), (t + 1) / total)

    plan = [Update("weights", dict(weights), loss, config.optim)]
    accelerator = make_accelerator(config.loop.precision, base.device)
    fitted = fit(spec.run.name, plan, fetch, ENDLESS, spec.run, config, config.loop, accelerator, spec.inputs)[
        "weights"
    ]
    with torch.no_grad():
        for name, parameter in weights.items():
            parameter.copy_(fitted[name])


def frozen_network(base: Backbone) -> Any:
    """Return a fresh copy of the base's UNet whose weights are not trained."""
    unet: Any = base.fresh_network()
    speed_up(unet)
    return unet.requires_grad_(False)


def plain_prediction(unet: Any) -> Predict:
    """Return the prediction of a UNet without further inputs."""
    return lambda x, t, states, condition, rng: unet(x, t, states, return_dict=False)[0]


def train_checkpoint(spec: AddOnTraining, place: Path) -> None:
    """Train a community checkpoint (every weight of the UNet) and write it as a pipeline."""
    unet = frozen_network(spec.base).requires_grad_(True)
    train_weights(spec, dict(unet.named_parameters()), plain_prediction(unet))
    unet.to(memory_format=torch.contiguous_format)
    with atomic_folder(place) as part:
        pipeline("StableDiffusionPipeline", spec.base.folder.path, None, unet=unet).save_pretrained(part)


def train_controlnet(spec: AddOnTraining, place: Path) -> None:
    """Train a ControlNet that starts from the UNet's encoder; conditions are control maps."""
    from diffusers import ControlNetModel

    unet = frozen_network(spec.base)
    depth = spec.base.folder.scale.bit_length()  # each of its channels but the first halves a map, to a latent's size
    with torch.random.fork_rng():
        torch.manual_seed(spec.config.seed)
        controlnet: Any = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(16, 32, 96, 256)[:depth])
    speed_up(controlnet.requires_grad_(True).to(spec.base.device))

    def predict(x: Tensor, t: Tensor, states: Tensor, maps: Tensor, rng: KeyedRng) -> Tensor:
        down, middle = controlnet(x, t, states, controlnet_cond=maps, return_dict=False)
        output: Tensor = unet(
            x, t, states, down_block_additional_residuals=down, mid_block_additional_residual=middle, return_dict=False
        )[0]
        return output

    train_weights(spec, dict(controlnet.named_parameters()), predict)
    with atomic_folder(place) as part:
        controlnet.to(memory_format=torch.contiguous_format).save_pretrained(part)
