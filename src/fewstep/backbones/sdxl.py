"""Stable Diffusion XL: a UNet conditioned on two encoders' states, a pooled one, and the picture's sizes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fewstep.backbones.unet import UNetBackbone, guidance_input, padded_tokens
from fewstep.common.files import read_mapping
from fewstep.diffusion.denoiser import Condition


class StableDiffusionXL(UNetBackbone):
    """The condition holds "text" [B, tokens, both widths] and "pooled" [B, width]; sizes follow from the latent's."""

    text_classes = ("CLIPTextModel", "CLIPTextModelWithProjection")
    tokenizer_classes = ("CLIPTokenizer", "CLIPTokenizerFast")
    prompts_at_once = 32  # 256 take 4.3 GiB in the second encoder, fp32

    @torch.no_grad()
    def _encode(self, prompts: Sequence[str], batch: int) -> Condition:
        """Encode prompts to both encoders' penultimate states, side by side, and the second's projected summary."""
        readers, parts = self.readers, []
        for start in range(0, len(prompts), batch):
            some = prompts[start : start + batch]
            found = [
                encoder(padded_tokens(tokenizer, some, self.device).input_ids, output_hidden_states=True)
                for tokenizer, encoder in readers
            ]
            text = torch.cat([each.hidden_states[-2] for each in found], dim=-1)
            parts.append((text.float().cpu(), found[-1][0].float().cpu()))
        text, pooled = (torch.cat(each) for each in zip(*parts, strict=True))
        return {"text": text, "pooled": pooled}

    def null_row(self) -> Condition:
        """Return zeros, or the encoded empty prompt where model_index.json has force_zeros_for_empty_prompt false."""
        empty = self.encode([""])
        if read_mapping(self.folder.path / "model_index.json").get("force_zeros_for_empty_prompt", True):
            return {name: torch.zeros_like(value) for name, value in empty.items()}
        return empty

    def _call(self, network: nn.Module, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Call the UNet once, with the latent's own size as original and target size, and no crop."""
        height, width = (side * self.folder.scale for side in x.shape[-2:])
        sizes = x.new_zeros(len(x), 6)  # made on the device: a copy of the CPU's numbers would wait for it
        sizes[:, 0::4].fill_(height)
        sizes[:, 1::4].fill_(width)
        added = {"text_embeds": condition["pooled"], "time_ids": sizes}
        w = guidance_input(network, x, condition)
        out: Tensor = network(
            x, self.timesteps(x, t), condition["text"], added_cond_kwargs=added, timestep_cond=w, return_dict=False
        )[0]
        return out
