"""Stable Diffusion XL: a UNet that is told two encoders' states, a pooled one, and the picture's sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.backbones.guidance import guidance_input
from fewstep.backbones.unet import UNetBackbone
from fewstep.common.files import read_mapping
from fewstep.diffusion.denoiser import Condition


class StableDiffusionXL(UNetBackbone):
    """The condition holds "text" [B, tokens, both widths] and "pooled" [B, width]; sizes follow from the latent's."""

    text_classes = ("CLIPTextModel", "CLIPTextModelWithProjection")
    tokenizer_classes = ("CLIPTokenizer", "CLIPTokenizerFast")

    @torch.no_grad()
    def _encode(self, prompts: Sequence[str], batch: int) -> Condition:
        """The last states but one of both encoders, side by side, and the second one's projected summary."""
        readers = self._load_text()
        parts = []
        for start in range(0, len(prompts), batch):
            said = list(prompts[start : start + batch])
            found = []
            for tokenizer, encoder in readers:
                tokens = tokenizer(
                    said,
                    padding="max_length",
                    max_length=tokenizer.model_max_length,
                    truncation=True,
                    return_tensors="pt",
                ).to(self.device)
                found.append(encoder(tokens.input_ids, output_hidden_states=True))
            text = torch.cat([each.hidden_states[-2] for each in found], dim=-1)
            parts.append((text.float().cpu(), found[-1][0].float().cpu()))
        text, pooled = (torch.cat(each) for each in zip(*parts, strict=True))
        return {"text": text, "pooled": pooled}

    def null(self, count: int) -> Condition:
        """The unconditional branch: zeros, unless the pipeline says that it is the encoded empty prompt."""
        empty = self.encode([""])
        if read_mapping(self.folder.path / "model_index.json").get("force_zeros_for_empty_prompt", True):
            empty = {name: torch.zeros_like(value) for name, value in empty.items()}
        return {name: value.expand(count, *value.shape[1:]) for name, value in empty.items()}

    def _call(
        self, network: nn.Module, x: Tensor, t: Tensor, condition: Condition, residuals: Mapping[str, Any]
    ) -> Tensor:
        """One network call; the picture is told to be whole, of the latent's own size and not cropped."""
        height, width = (side * self.folder.scale for side in x.shape[-2:])
        sizes = x.new_zeros(len(x), 6)  # made where it is needed: a copy of the CPU's numbers would wait for the device
        sizes[:, 0::4].fill_(height)
        sizes[:, 1::4].fill_(width)
        added = {"text_embeds": condition["pooled"], "time_ids": sizes}
        told = self.told_time(x, t)
        more = {"timestep_cond": guidance_input(network, x, condition), **residuals}
        out: Tensor = network(x, told, condition["text"], added_cond_kwargs=added, return_dict=False, **more)[0]
        return out
