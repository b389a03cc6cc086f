"""Stable Diffusion 1.x and 2.x shaped pipelines: UNet2DConditionModel, one text encoder, AutoencoderKL."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.backbones.guidance import guidance_input
from fewstep.backbones.unet import UNetBackbone
from fewstep.diffusion.denoiser import Condition


class StableDiffusion(UNetBackbone):
    """A UNet that is told the states of one text encoder; CLIP's, or BERT's as the bundled teacher has it."""

    text_classes = ("CLIPTextModel", "BertModel")
    tokenizer_classes = (
        "CLIPTokenizer",
        "CLIPTokenizerFast",
        "BertTokenizer",
        "BertTokenizerFast",
        "PreTrainedTokenizerFast",
    )

    @torch.no_grad()
    def _encode(self, prompts: Sequence[str], batch: int) -> Condition:
        """Prompts -> {"text": float32 [N, tokens, width] on the CPU}, as the diffusers pipeline encodes them."""
        ((tokenizer, encoder),) = self._load_text()
        return {"text": encode_text(tokenizer, encoder, prompts, self.device, batch)}

    def null(self, count: int) -> Condition:
        """The unconditional branch: the encoded empty prompt (SDXL, unlike this family, uses zeros)."""
        text = self.encode([""])["text"]
        return {"text": text.expand(count, *text.shape[1:])}

    def _call(
        self, network: nn.Module, x: Tensor, t: Tensor, condition: Condition, residuals: Mapping[str, Any]
    ) -> Tensor:
        """One network call: x [B, C, H, W], t float64 [B] in training indices -> output like x."""
        told = self.told_time(x, t)
        more = {"timestep_cond": guidance_input(network, x, condition), **residuals}
        out: Tensor = network(x, told, condition["text"], return_dict=False, **more)[0]
        return out


@torch.no_grad()
def encode_text(tokenizer: Any, encoder: Any, prompts: Sequence[str], device: torch.device, batch: int = 256) -> Tensor:
    """Prompts -> text states, float32 [N, tokens, width] on the CPU, as the diffusers pipeline makes them."""
    masked = getattr(encoder.config, "use_attention_mask", False)
    parts = []
    for start in range(0, len(prompts), batch):
        tokens = tokenizer(
            list(prompts[start : start + batch]),
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).to(device)
        states = encoder(tokens.input_ids, attention_mask=tokens.attention_mask if masked else None)[0]
        parts.append(states.float().cpu())  # the states of all captions would not fit beside the networks
    return torch.cat(parts)
