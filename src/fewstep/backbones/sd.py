"""Stable Diffusion 1.x and 2.x shaped pipelines: UNet2DConditionModel, one text encoder, AutoencoderKL."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.backbones.unet import UNetBackbone, guidance_input, padded_tokens
from fewstep.diffusion.denoiser import Condition


class StableDiffusion(UNetBackbone):
    """A UNet conditioned on "text" [B, tokens, width] of one encoder: CLIP's, or BERT's as the bundled teacher has."""

    text_classes = ("CLIPTextModel", "BertModel")
    tokenizer_classes = (
        "CLIPTokenizer",
        "CLIPTokenizerFast",
        "BertTokenizer",
        "BertTokenizerFast",
        "PreTrainedTokenizerFast",
    )

    def _encode(self, prompts: Sequence[str], batch: int) -> Condition:
        """Encode prompts to the text encoder's states."""
        ((tokenizer, encoder),) = self.readers
        return {"text": encode_text(tokenizer, encoder, prompts, self.device, batch)}

    def _call(self, network: nn.Module, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Call the UNet once."""
        w = guidance_input(network, x, condition)
        out: Tensor = network(x, self.timesteps(x, t), condition["text"], timestep_cond=w, return_dict=False)[0]
        return out


@torch.no_grad()
def encode_text(tokenizer: Any, encoder: Any, prompts: Sequence[str], device: torch.device, batch: int = 256) -> Tensor:
    """Encode prompts to text states as the diffusers pipeline does, fp32 [N, tokens, width] on the CPU."""
    masked = getattr(encoder.config, "use_attention_mask", False)
    parts = []
    for start in range(0, len(prompts), batch):
        tokens = padded_tokens(tokenizer, prompts[start : start + batch], device)
        states = encoder(tokens.input_ids, attention_mask=tokens.attention_mask if masked else None)[0]
        parts.append(states.float().cpu())  # the states of all captions would not fit beside the networks
    return torch.cat(parts)
