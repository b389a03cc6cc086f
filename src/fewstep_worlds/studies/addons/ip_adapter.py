"""IP-Adapter: a projection of a picture's features to tokens, and keys and values of these in all cross-attentions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.common.files import atomic_folder
from fewstep.common.rng import KeyedRng
from fewstep.common.tensors import load_tensors, save_tensors
from fewstep_worlds.studies.addons.training import AddOnTraining, frozen_network, train_weights

FILE = "ip_adapter.safetensors"
TOKENS = 4
"""Tokens of a picture; diffusers' loader expects this number."""
NOISE = 0.3
"""Noise on features in training, relative to their deviation; unseen pictures differ by as much."""
EMPTY = 0.1
"""Share of pictures without features in training, for guidance."""


def initial_projection(features: Tensor, states: Tensor, ridge: float = 30.0) -> dict[str, Tensor]:
    """Return the projection that training starts from: a ridge regression of captions' first tokens on features.

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


def cross_attentions(unet: Any) -> list[str]:
    """Return the names of the cross-attentions, in the order of an IP-Adapter's file."""
    names = (name.removesuffix(".processor") for name in unet.attn_processors)
    return [name for name in names if not name.endswith("attn1")]


def read_ip_adapter(place: Path) -> dict[str, dict[str, Tensor]]:
    """Read an IP-Adapter's file as diffusers' `load_ip_adapter` takes it."""
    held: dict[str, dict[str, Tensor]] = {"image_proj": {}, "ip_adapter": {}}
    for key, value in load_tensors(place / FILE).items():
        part, _, name = key.partition(".")
        held[part][name] = value
    return held


def train_ip_adapter(spec: AddOnTraining, place: Path, projection: dict[str, Tensor]) -> None:
    """Train an IP-Adapter whose conditions are features [B, width]; keys and values start as those of the text.

    Args:
        projection: what the projection starts from.
    """
    unet = frozen_network(spec.base)
    names = {f"{2 * number + 1}": name for number, name in enumerate(cross_attentions(unet))}
    texts = {
        f"{number}.to_{kind}_ip.weight": getattr(unet.get_submodule(name), f"to_{kind}").weight.clone()
        for number, name in names.items()
        for kind in "kv"
    }
    unet._load_ip_adapter_weights([{"image_proj": projection, "ip_adapter": texts}], low_cpu_mem_usage=False)
    unet.to(spec.base.device).requires_grad_(False)
    weights: dict[str, nn.Parameter] = {}
    for name, parameter in unet.encoder_hid_proj.image_projection_layers[0].named_parameters():
        weights[f"image_proj.{name.replace('image_embeds', 'proj')}"] = parameter
    for number, name in names.items():
        for kind in "kv":
            own = getattr(unet.get_submodule(name).processor, f"to_{kind}_ip")[0].weight
            weights[f"ip_adapter.{number}.to_{kind}_ip.weight"] = own
    for parameter in weights.values():
        parameter.requires_grad_(True)

    def predict(x: Tensor, t: Tensor, states: Tensor, features: Tensor, rng: KeyedRng) -> Tensor:
        noisy = features + NOISE * rng.normal("features", tuple(features.shape[1:]))
        seen = noisy * (1 - rng.chance("no picture", EMPTY).to(noisy))[:, None]
        output: Tensor = unet(x, t, states, added_cond_kwargs={"image_embeds": [seen[:, None]]}, return_dict=False)[0]
        return output

    train_weights(spec, weights, predict)
    with atomic_folder(place) as part:
        save_tensors(part / FILE, {name: value.detach().cpu().contiguous() for name, value in weights.items()})
