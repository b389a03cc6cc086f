"""Networks of published sizes, called through their backbones on tensors without data."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.backbones.families import FAMILIES
from fewstep.diffusion.schedule import FlowMatching


@dataclass(frozen=True)
class Published:
    """A network of a published size.

    Attributes:
        pipeline: its pipeline's class.
        text: shape of a caption's states.
        config: of the network, beside the class's defaults, as the published configs have it.
        latent: shape of a latent at 1024 x 1024 pixels.
        on_host: whether the lengths of texts are read in each call.
    """

    pipeline: str
    text: tuple[int, ...]
    config: dict[str, Any] = field(default_factory=dict)
    latent: tuple[int, int, int] = (16, 128, 128)
    on_host: bool = False

    def network(self) -> nn.Module:
        """Make the network."""
        import diffusers

        made: nn.Module = getattr(diffusers, FAMILIES[self.pipeline].classes[0])(**self.config)
        return made

    def backbone(self) -> Any:
        """Return its backbone, without a folder."""
        module, _, kind = FAMILIES[self.pipeline].backbone.partition(":")
        backbone = object.__new__(getattr(importlib.import_module(module), kind))
        backbone.path = FlowMatching(3.0)
        backbone.folder = SimpleNamespace(family=FAMILIES[self.pipeline])
        if self.pipeline == "AnimaModularPipeline":
            importlib.import_module(module).resize_without_torchvision()
        return backbone

    def call(self, network: nn.Module, batch: int) -> Tensor:
        """Call the network on a batch; texts are as long as can be."""
        x = torch.empty(batch, *self.latent, device="meta")
        mask = torch.ones(batch, self.text[0], device="cpu" if self.on_host else "meta")
        condition = {"text": torch.empty(batch, *self.text, device="meta"), "mask": mask}
        out: Tensor = self.backbone()._call(network, x, torch.full((batch,), 0.5, dtype=torch.float64), condition)
        return out


PUBLISHED = {
    "z_image": Published("ZImagePipeline", (512, 2560), {"axes_lens": [1536, 512, 512]}, on_host=True),
    "qwen_image": Published("QwenImagePipeline", (512, 3584), on_host=True),
    "flux2": Published(
        "Flux2KleinPipeline",
        (512, 7680),
        {
            "num_layers": 5,
            "num_single_layers": 20,
            "num_attention_heads": 24,
            "joint_attention_dim": 7680,
            "guidance_embeds": False,
        },
        (128, 64, 64),
    ),
    "chroma": Published("ChromaPipeline", (512, 4096)),
    "krea2": Published("Krea2Pipeline", (512, 12, 2560)),
    "anima": Published(
        "AnimaModularPipeline",
        (512, 1024),
        {
            "num_attention_heads": 16,
            "num_layers": 28,
            "rope_scale": (1.0, 4.0, 4.0),
            "extra_pos_embed_type": None,
        },
    ),
}
"""Family -> its network: Z-Image, Qwen-Image, FLUX.2 klein base 4B, Chroma1, Krea 2 Raw, Anima."""
