"""Flux: a flow on latents packed two by two. Dev networks take guidance as an input: no unconditional branch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fewstep.backbones.packed import PackedTransformer, pack, unpack
from fewstep.diffusion.denoiser import Condition

GUIDANCE = 3.5
"""The guidance that Flux's pipeline passes to its network by default; students get it too."""


class Flux(PackedTransformer):
    """The condition holds "text" [B, tokens, width], "pooled" [B, width], and may hold "guidance" [B]."""

    text_classes = ("CLIPTextModel", "T5EncoderModel")
    time_embedder = "time_text_embed.timestep_embedder"
    outlets = ("proj_out", "single_transformer_blocks", "transformer_blocks")

    @property
    def default_guidance(self) -> float:
        """The guidance of dev networks where none is set; schnell's take none as an input."""
        return GUIDANCE if self.embedded_guidance else 1.0

    def read(self, pipe: Any, prompts: list[str]) -> Condition:
        """Encode prompts to T5's states and CLIP's summary."""
        text, pooled, _ = pipe.encode_prompt(prompts, prompt_2=None, device=self.device)
        return {"text": text, "pooled": pooled}

    def _call(self, network: nn.Module, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Call the transformer once, on packed latents; unpack its output."""
        height, width = x.shape[-2] // 2, x.shape[-1] // 2
        guidance = None
        if network.config.guidance_embeds:  # type: ignore[union-attr]
            given = condition.get("guidance")
            if given is None:
                guidance = torch.full((len(x),), GUIDANCE, device=x.device)
            else:
                guidance = given.float().to(x.device, non_blocking=True)
        out: Tensor = network(
            hidden_states=pack(x),
            timestep=self.timesteps(x, t) / 1000,
            guidance=guidance,
            pooled_projections=condition["pooled"],
            encoder_hidden_states=condition["text"],
            txt_ids=x.new_zeros(condition["text"].shape[1], 3),
            img_ids=token_positions(height, width, x.device, x.dtype),
            return_dict=False,
        )[0]
        return unpack(out, height, width)


def token_positions(height: int, width: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return each token's position, [h w, 3]: (0, row, column)."""
    rows = torch.arange(height, device=device, dtype=dtype)[:, None].expand(height, width)
    columns = torch.arange(width, device=device, dtype=dtype)[None].expand(height, width)
    return torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3)
