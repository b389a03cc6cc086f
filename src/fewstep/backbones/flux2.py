"""FLUX.2 klein base: a flow on latents of 128 channels, conditioned on three layers' states of a Qwen3."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.backbones.autoencoder import to_network_scale
from fewstep.backbones.flux import token_positions
from fewstep.backbones.transformer import TransformerBackbone, up_to_prompt
from fewstep.diffusion.denoiser import Condition


class Flux2(TransformerBackbone):
    """The condition holds "text" [B, tokens, 3 x width]; padding is read as text."""

    text_classes = ("Qwen3ForCausalLM",)
    time_embedder = "time_guidance_embed.timestep_embedder"
    outlets = ("proj_out", "single_transformer_blocks", "transformer_blocks")

    def read(self, pipe: Any, prompts: list[str]) -> Condition:
        """Encode prompts to the language model's states, three layers beside each other."""
        return {"text": pipe.encode_prompt(prompts, device=self.device)[0]}

    def tokenizer_input(self, prompts: Sequence[str]) -> list[str]:
        """Return prompts behind the beginning of a chat."""
        ((tokenizer, _),) = self.readers
        return [up_to_prompt(tokenizer, prompt, enable_thinking=False) for prompt in prompts]

    def _call(self, network: nn.Module, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Call the transformer once; positions are (0, row, column, 0), those of the text (0, 0, 0, number)."""
        height, width = x.shape[-2:]
        count = condition["text"].shape[1]
        numbers = torch.arange(count, device=x.device, dtype=x.dtype)[:, None]
        out: Tensor = network(
            hidden_states=x.flatten(2).transpose(1, 2),
            timestep=self.timesteps(x, t) / 1000,
            encoder_hidden_states=condition["text"],
            txt_ids=nn.functional.pad(numbers, (3, 0)),
            img_ids=nn.functional.pad(token_positions(height, width, x.device, x.dtype), (0, 1)),
            return_dict=False,
        )[0]
        return out.transpose(1, 2).reshape(x.shape)

    def arranged(self, noise: Tensor) -> Tensor:
        """Transpose noise: its pipeline steps on tokens [B, h w, C]."""
        b, c, height, width = noise.shape
        return noise.reshape(b, height * width, c).transpose(1, 2).reshape(noise.shape)

    def from_pipeline(self, latents: Tensor, height: int, width: int) -> Tensor:
        """Return the autoencoder's latents at the network's scale."""
        return to_network_scale(self.vae, latents)
