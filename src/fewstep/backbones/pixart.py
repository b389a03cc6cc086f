"""PixArt-alpha and PixArt-Sigma: T5 states with a mask; a predicted variance is not used."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fewstep.backbones.transformer import TransformerBackbone
from fewstep.diffusion.denoiser import Condition


class PixArt(TransformerBackbone):
    """The condition holds "text" [B, tokens, width] and "mask" [B, tokens]."""

    text_classes = ("T5EncoderModel",)
    time_embedder = "adaln_single.emb.timestep_embedder"

    def read(self, pipe: Any, prompts: list[str]) -> Condition:
        """Encode prompts to T5's states, and a mask of those that belong to a token."""
        text, mask, _, _ = pipe.encode_prompt(prompts, do_classifier_free_guidance=False, device=self.device)
        return {"text": text, "mask": mask}

    def _call(self, network: nn.Module, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Call the transformer once; large alpha networks take the picture's size too."""
        sizes: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
        if getattr(network, "use_additional_conditions", False):
            height, width = (side * self.folder.scale for side in x.shape[-2:])
            sizes = {
                # made on the device: a copy of the CPU's numbers would wait for it
                "resolution": torch.cat([x.new_full((len(x), 1), side) for side in (height, width)], 1),
                "aspect_ratio": x.new_full((len(x), 1), height / width),
            }
        out: Tensor = network(
            x,
            encoder_hidden_states=condition["text"],
            encoder_attention_mask=condition["mask"],
            timestep=self.timesteps(x, t),
            added_cond_kwargs=sizes,
            return_dict=False,
        )[0]
        return out[:, : x.shape[1]]
