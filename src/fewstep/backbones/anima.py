"""Anima: a flow by a Cosmos transformer, conditioned on a Qwen3's states that a small network maps to T5's tokens.

diffusers offers it as a modular pipeline alone: blocks that share components, which are taken from the folder.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.backbones.pipeline_folder import PipelineFolder
from fewstep.backbones.transformer import TransformerBackbone
from fewstep.diffusion.denoiser import Condition

TOKENS = 512
"""Tokens that the pipeline reads by default, of each tokenizer."""


def resize_without_torchvision() -> None:
    """Give diffusers' Cosmos network the one function of torchvision that it calls, where that is not installed.

    It resizes the padding mask to the latent's size; the mask of a whole picture is zero at any size.
    """
    from diffusers.models.transformers import transformer_cosmos

    def resize(mask: Tensor, size: list[int], interpolation: str) -> Tensor:
        return nn.functional.interpolate(mask, size, mode=interpolation)

    if not hasattr(transformer_cosmos, "transforms"):
        own = SimpleNamespace(
            functional=SimpleNamespace(resize=resize), InterpolationMode=SimpleNamespace(NEAREST="nearest")
        )
        transformer_cosmos.transforms = own


class Anima(TransformerBackbone):
    """The condition holds "text" [B, tokens, width], zeros behind the prompt."""

    text_classes = ("Qwen3Model", "AnimaTextConditioner")
    time_embedder = "time_embed.t_embedder"

    def __init__(
        self, folder: PipelineFolder, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> None:
        resize_without_torchvision()
        super().__init__(folder, device, dtype)

    @contextmanager
    def reader(self) -> Iterator[Any]:
        """Yield the components that the pipeline's block of prompts works with."""
        (tokenizer, encoder), (t5_tokenizer, conditioner) = self.readers
        with torch.no_grad():
            yield SimpleNamespace(
                tokenizer=tokenizer, text_encoder=encoder, t5_tokenizer=t5_tokenizer, text_conditioner=conditioner
            )

    def read(self, pipe: Any, prompts: list[str]) -> Condition:
        """Encode prompts by the pipeline's own block, and map them as its next one does."""
        from diffusers.modular_pipelines.anima.encoders import AnimaTextEncoderStep

        found = AnimaTextEncoderStep.encode_prompt(
            pipe, prompts, prepare_unconditional_embeds=False, max_sequence_length=TOKENS, device=self.device
        )
        text = pipe.text_conditioner(
            source_hidden_states=found["qwen_prompt_embeds"],
            source_attention_mask=found["qwen_attention_mask"],
            target_input_ids=found["t5_input_ids"],
            target_attention_mask=found["t5_attention_mask"],
        )
        return {"text": text}

    def lengths(self) -> list[int]:
        """Return how many tokens each tokenizer reads."""
        return [TOKENS, TOKENS]

    def _call(self, network: nn.Module, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Call the transformer once, on one frame without padding."""
        out: Tensor = network(
            hidden_states=x[:, :, None],
            timestep=self.timesteps(x, t) / 1000,
            encoder_hidden_states=condition["text"],
            padding_mask=x.new_zeros(1, 1, *x.shape[-2:]),
            return_dict=False,
        )[0]
        return out[:, :, 0]

    def from_pipeline(self, latents: Tensor, height: int, width: int) -> Tensor:
        """Return the one frame."""
        return latents[:, :, 0]
