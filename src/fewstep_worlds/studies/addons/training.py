"""Add-ons trained on the base with diffusers' and PEFT's own classes and the noise-prediction loss.

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

from fewstep.common.accelerator import make_accelerator
from fewstep.common.cpu_kernels import speed_up
from fewstep.common.files import atomic_folder
from fewstep.common.rng import KeyedRng
from fewstep.common.tensors import load_tensors, save_tensors
from fewstep.data.latents import LatentSet
from fewstep.diffusion.schedule import VariancePreserving, add_noise, scaled_linear
from fewstep.training.config import LoopConfig, OptimConfig
from fewstep.training.loss import Loss
from fewstep.training.update import Batch, Update
from fewstep_worlds.common.training import fit
from fewstep_worlds.studies.settings import AddOnConfig

Predict = Callable[[Tensor, Tensor, Tensor, Tensor, KeyedRng], Tensor]
"""(x_t, t int64 [B], text states, numbers of the samples, draws) -> predicted noise."""
EMPTY = 0.1
"""Share of empty prompts, and of empty image inputs of an IP-Adapter, for guidance."""
ALONE = 0.9
"""Share of empty prompts where the picture is the condition."""
BLUR = 0.3
"""Noise on a picture's features in training, relative to their deviation; unseen pictures differ by as much."""
IP_FILE = "ip_adapter.safetensors"
TOKENS = 4
"""Tokens of a picture in an IP-Adapter."""


@dataclass(frozen=True)
class AddOnTraining:
    """The training of an add-on.

    Attributes:
        name: of its run.
        data: latents and text states.
        config: length and rate.
        inputs: fingerprints of further inputs.
        empty: share of empty prompts.
    """

    name: str
    data: LatentSet
    config: AddOnConfig
    inputs: Mapping[str, str]
    empty: float = EMPTY


def train_weights(spec: AddOnTraining, weights: Mapping[str, nn.Parameter], predict: Predict, out: Path) -> None:
    """Train the named weights in place by the noise-prediction loss; a stopped run is resumed."""
    path: VariancePreserving = scaled_linear()
    total = int(path.noisiest) + 1
    data, config = spec.data, spec.config

    def loss(batch: Batch, rng: KeyedRng) -> Loss:
        items = batch["items"]
        x_0 = data.latents[items]
        states = data.condition(items, rng, spec.empty, x_0.device)["text"]
        eps = rng.normal("noise", tuple(x_0.shape[1:]))
        t = rng.integers("t", 0, total)
        output = predict(add_noise(path, x_0, eps, t), t, states, items, rng).float()
        per_sample = (output - eps).square().mean((1, 2, 3))
        return Loss(per_sample.mean(), per_sample.detach(), (t + 1) / total)

    def fetch(items: np.ndarray, _: KeyedRng) -> Batch:
        return {"items": torch.from_numpy(items)}

    plan = [Update("weights", dict(weights), loss, OptimConfig(lr=config.lr, warmup=20, decay="cosine"))]
    loop = LoopConfig(steps=config.steps, batch=config.batch, seed=config.seed, save_every=100, log_every=20)
    accelerator, inputs = make_accelerator("fp32", torch.device("cpu")), {**data.inputs, **spec.inputs}
    trained = fit(spec.name, plan, fetch, len(data), out, config, loop, accelerator, inputs)["weights"]
    with torch.no_grad():
        for name, parameter in weights.items():
            parameter.copy_(trained[name])


def plain_prediction(unet: Any) -> Predict:
    """Return the prediction of a UNet without further inputs."""
    return lambda x, t, states, items, rng: unet(x, t, states, return_dict=False)[0]


def fine_tune(spec: AddOnTraining, unet: Any, pipe: Any, out: Path, place: Path) -> None:
    """Train a community checkpoint (every weight of the UNet) and write it as a pipeline."""
    unet.requires_grad_(True)
    speed_up(unet)

    train_weights(spec, dict(unet.named_parameters()), plain_prediction(unet), out)
    with atomic_folder(place) as part:
        pipe.unet = unet.to(memory_format=torch.contiguous_format)
        pipe.save_pretrained(part)


def train_style(spec: AddOnTraining, unet: Any, out: Path, place: Path) -> None:
    """Train a style LoRA by PEFT and write it as `save_lora_weights` does."""
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    unet.requires_grad_(False)
    with torch.random.fork_rng():
        torch.manual_seed(spec.config.seed)
        unet.add_adapter(LoraConfig(r=16, lora_alpha=16, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    speed_up(unet)

    train_weights(
        spec, {name: p for name, p in unet.named_parameters() if p.requires_grad}, plain_prediction(unet), out
    )
    with atomic_folder(place) as part:
        layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))
        StableDiffusionPipeline.save_lora_weights(part, unet_lora_layers=layers)


def train_controlnet(spec: AddOnTraining, unet: Any, shown: Tensor, out: Path, place: Path) -> None:
    """Train a ControlNet that starts from the UNet's encoder.

    Args:
        shown: control map of each sample, [N, 3, H, W] in [0, 1].
    """
    from diffusers import ControlNetModel

    with torch.random.fork_rng():
        torch.manual_seed(spec.config.seed)
        controlnet: Any = ControlNetModel.from_unet(unet)
    unet.requires_grad_(False)
    speed_up(unet)
    speed_up(controlnet)

    def predict(x: Tensor, t: Tensor, states: Tensor, items: Tensor, rng: KeyedRng) -> Tensor:
        down, middle = controlnet(x, t, states, controlnet_cond=shown[items].float(), return_dict=False)
        output: Tensor = unet(
            x, t, states, down_block_additional_residuals=down, mid_block_additional_residual=middle, return_dict=False
        )[0]
        return output

    train_weights(spec, dict(controlnet.named_parameters()), predict, out)
    with atomic_folder(place) as part:
        controlnet.to(memory_format=torch.contiguous_format).save_pretrained(part)


def initial_projection(features: Tensor, states: Tensor, ridge: float = 30.0) -> dict[str, Tensor]:
    """Return the projection that an IP-Adapter starts from: a ridge regression of captions' first tokens on features.

    A random start takes longer and generalises less to unseen pictures.

    Args:
        features: features of pictures, [N, width].
        states: text states of their captions, [N, tokens, states].
    """
    wanted = states[:, :TOKENS]
    mean, spread = wanted.mean((0, 1)), wanted.std((0, 1)).clamp(min=1e-6)  # the projection ends in a layer norm
    y = ((wanted - mean) / spread).flatten(1).double()
    x = torch.cat([features, torch.ones(len(features), 1)], 1).double()
    found = torch.linalg.solve(x.T @ x + ridge * torch.eye(x.shape[1]).double(), x.T @ y).float()
    return {
        "proj.weight": found[:-1].T.contiguous(),
        "proj.bias": found[-1].clone(),
        "norm.weight": spread,
        "norm.bias": mean,
    }


def fresh_ip_adapter(unet: Any, project: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Return an untrained IP-Adapter in its file format; keys and values start as those of the text."""
    attends = {}
    cross = [name for name in unet.attn_processors if not name.endswith("attn1.processor")]
    modules = dict(unet.named_modules())
    for number, name in enumerate(cross):
        attention: Any = modules[name.removesuffix(".processor")]
        attends[f"{2 * number + 1}.to_k_ip.weight"] = attention.to_k.weight.detach().clone()
        attends[f"{2 * number + 1}.to_v_ip.weight"] = attention.to_v.weight.detach().clone()
    return {"image_proj": project, "ip_adapter": attends}


def read_ip_adapter(place: Path) -> dict[str, dict[str, Tensor]]:
    """Read an IP-Adapter's file as diffusers' `load_ip_adapter` takes it."""
    held: dict[str, dict[str, Tensor]] = {"image_proj": {}, "ip_adapter": {}}
    for key, value in load_tensors(place / IP_FILE).items():
        part, _, name = key.partition(".")
        held[part][name] = value
    return held


def train_ip_adapter(
    spec: AddOnTraining, unet: Any, features: Tensor, project: dict[str, Tensor], out: Path, place: Path
) -> None:
    """Train an IP-Adapter: the projection of features, and the keys and values of its tokens in all cross-attentions.

    Args:
        features: features of each sample, [N, width].
        project: what the projection starts from.
    """
    fresh = fresh_ip_adapter(unet, project)
    unet._load_ip_adapter_weights([fresh], low_cpu_mem_usage=False)
    unet.requires_grad_(False)
    projection: Any = unet.encoder_hid_proj.image_projection_layers[0]
    weights: dict[str, nn.Parameter] = {}
    for name, parameter in projection.named_parameters():
        weights[f"image_proj.{name.replace('image_embeds', 'proj')}"] = parameter
    cross = [name for name in unet.attn_processors if not name.endswith("attn1.processor")]
    for number, name in enumerate(cross):
        processor: Any = unet.attn_processors[name]
        for kind in ("k", "v"):
            own = getattr(processor, f"to_{kind}_ip")[0].weight
            weights[f"ip_adapter.{2 * number + 1}.to_{kind}_ip.weight"] = own
    for parameter in weights.values():
        parameter.requires_grad_(True)

    def predict(x: Tensor, t: Tensor, states: Tensor, items: Tensor, rng: KeyedRng) -> Tensor:
        blurred = features[items] + BLUR * rng.normal("features", tuple(features.shape[1:]))
        shown = blurred * (1 - rng.chance("no picture", EMPTY).float())[:, None]
        embeddings = {"image_embeds": [shown[:, None]]}
        output: Tensor = unet(x, t, states, added_cond_kwargs=embeddings, return_dict=False)[0]
        return output

    train_weights(spec, weights, predict, out)
    with atomic_folder(place) as part:
        save_tensors(part / IP_FILE, {name: value.detach() for name, value in weights.items()})
