"""Krea 2: a flow on packed latents, conditioned on states of many layers of a Qwen3-VL, with a mask."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from fewstep.backbones.flux import token_positions
from fewstep.backbones.packed import PackedTransformer, pack, unpack
from fewstep.diffusion.denoiser import Condition


class Krea2(PackedTransformer):
    """The condition holds "text" [B, tokens, layers, width] and "mask" [B, tokens]."""

    text_classes = ("Qwen3VLModel",)
    time_embedder = "time_embed"
    outlets = ("final_layer.linear", "transformer_blocks")
    prompts_at_once = 2

    def read(self, pipe: Any, prompts: list[str]) -> Condition:
        """Encode prompts to the states of the layers that the pipeline's index names."""
        text, mask = pipe.encode_prompt(prompts, device=self.device)
        return {"text": text, "mask": mask.to(text.dtype)}

    def tokenizer_input(self, prompts: Sequence[str]) -> list[str]:
        """Return prompts behind the system message."""
        with self.reader() as pipe:
            return [pipe.prompt_template_encode_prefix + prompt for prompt in prompts]

    def lengths(self) -> list[int]:
        """Return the tokens that are read of system message and prompt together."""
        (most,) = super().lengths()
        with self.reader() as pipe:
            behind = int(pipe.prompt_template_encode_num_suffix_tokens)
            return [most + int(pipe.prompt_template_encode_start_idx) - behind]

    def _call(self, network: nn.Module, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Call the transformer once, on packed latents; texts are at position 0."""
        height, width = x.shape[-2] // 2, x.shape[-1] // 2
        count = condition["text"].shape[1]
        out: Tensor = network(
            hidden_states=pack(x),
            timestep=self.timesteps(x, t) / 1000,
            encoder_hidden_states=condition["text"],
            position_ids=nn.functional.pad(token_positions(height, width, x.device, x.dtype), (0, 0, count, 0)),
            encoder_attention_mask=condition["mask"] > 0,
            return_dict=False,
        )[0]
        return unpack(out, height, width)
