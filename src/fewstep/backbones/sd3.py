"""Stable Diffusion 3 and 3.5: a flow, conditioned on three encoders' states and a pooled one."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fewstep.backbones.transformer import TransformerBackbone
from fewstep.diffusion.denoiser import Condition


class StableDiffusion3(TransformerBackbone):
    """The condition holds "text" [B, tokens, width] and "pooled" [B, width]."""

    text_classes = ("CLIPTextModelWithProjection", "T5EncoderModel")
    time_embedder = "time_text_embed.timestep_embedder"

    def read(self, pipe: Any, prompts: list[str]) -> Condition:
        """Encode prompts to the states of both CLIP encoders and T5, one after another, and CLIP's summaries."""
        text, _, pooled, _ = pipe.encode_prompt(
            prompts, prompt_2=None, prompt_3=None, do_classifier_free_guidance=False, device=self.device
        )
        return {"text": text, "pooled": pooled}

    def _call(self, network: nn.Module, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Call the transformer once."""
        out: Tensor = network(
            hidden_states=x,
            timestep=self.timesteps(x, t),
            encoder_hidden_states=condition["text"],
            pooled_projections=condition["pooled"],
            return_dict=False,
        )[0]
        return out
