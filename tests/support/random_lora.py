"""LoRAs with random weights."""

from __future__ import annotations

from pathlib import Path

import torch

from fewstep.backbones.families import FAMILIES
from fewstep.backbones.pipeline_folder import read_folder
from fewstep.diffusion.config import Sampling
from fewstep.students.lora import save_lora

TARGETS = list(FAMILIES["StableDiffusionPipeline"].targets)


def random_lora(pipeline: Path, out: Path) -> Path:
    """A LoRA of every adapted layer with weights large enough to change the picture."""
    from fewstep.backbones.base import load_backbone

    network = load_backbone(pipeline).network
    generator = torch.Generator().manual_seed(3)
    weights = {}
    for name, module in network.named_modules():
        weight = getattr(module, "weight", None)
        if weight is None or not any(name == t or name.endswith(f".{t}") for t in TARGETS):
            continue
        kernel = tuple(weight.shape[2:])
        weights[f"{name}.lora_A.weight"] = torch.randn((4, weight.shape[1], *kernel), generator=generator) * 0.1
        one = (1,) * len(kernel)
        weights[f"{name}.lora_B.weight"] = torch.randn((weight.shape[0], 4, *one), generator=generator) * 0.1
    sampling = Sampling(sampler="sss", steps=4, gamma=0.3, end="index0")
    base = read_folder(pipeline).fingerprint("unet")
    return save_lora(out, weights, rank=4, alpha=4.0, targets=TARGETS, base=base, sampling=sampling, notes={})
