"""Chroma: Flux's blocks on packed latents, modulated by one small network of the time; T5's states with a mask."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.backbones.flux import token_positions
from fewstep.backbones.packed import PackedTransformer, pack, unpack
from fewstep.diffusion.denoiser import Condition


class Chroma(PackedTransformer):
    """The condition holds "text" [B, tokens, width] and "mask" [B, tokens]."""

    text_classes = ("T5EncoderModel",)
    time_embedder = "distilled_guidance_layer.in_proj"
    outlets = ("proj_out", "single_transformer_blocks", "transformer_blocks")

    def read(self, pipe: Any, prompts: list[str]) -> Condition:
        """Encode prompts to T5's states, and a mask of those of tokens and of the first padding."""
        text, _, mask, *_ = pipe.encode_prompt(prompts, do_classifier_free_guidance=False, device=self.device)
        return {"text": text, "mask": mask}

    def _call(self, network: nn.Module, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Call the transformer once, on packed latents; unpack its output.

        The mask is of numbers, as in the pipeline: attention adds 1 to the logits of pairs of unmasked tokens.
        """
        height, width = x.shape[-2] // 2, x.shape[-1] // 2
        mask = torch.cat([condition["mask"].to(x.dtype), x.new_ones(len(x), height * width)], 1)
        with masked_recomputation(network, mask):
            out: Tensor = network(
                hidden_states=pack(x),
                timestep=self.timesteps(x, t) / 1000,
                encoder_hidden_states=condition["text"],
                txt_ids=x.new_zeros(condition["text"].shape[1], 3),
                img_ids=token_positions(height, width, x.device, x.dtype),
                attention_mask=mask,
                return_dict=False,
            )[0]
        return unpack(out, height, width)


@contextmanager
def masked_recomputation(network: Any, mask: Tensor) -> Iterator[None]:
    """Give the mask to single blocks under gradient checkpointing, too: diffusers 0.42 leaves it out there."""
    recompute = getattr(network, "_gradient_checkpointing_func", None)
    if recompute is None:
        yield
        return
    singles = set(network.single_transformer_blocks)

    def masked(block: nn.Module, *args: Any) -> Any:
        return recompute(block, *args, *([mask] if block in singles else []))

    network._gradient_checkpointing_func = masked
    try:
        yield
    finally:
        network._gradient_checkpointing_func = recompute
