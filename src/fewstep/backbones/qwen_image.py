"""Qwen-Image: a flow on packed latents, conditioned on a Qwen2.5-VL's states of the prompt in the pipeline's chat."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from fewstep.backbones.packed import PackedTransformer, pack, unpack
from fewstep.backbones.transformer import padded
from fewstep.diffusion.denoiser import Condition


class QwenImage(PackedTransformer):
    """The condition holds "text" [B, tokens, width] and "mask" [B, tokens]."""

    text_classes = ("Qwen2_5_VLForConditionalGeneration",)
    time_embedder = "time_text_embed.timestep_embedder"
    prompts_at_once = 2  # the encoder computes 151,936 numbers for each of 1,058 tokens of each

    def read(self, pipe: Any, prompts: list[str]) -> Condition:
        """Encode prompts to the language model's last states, behind the pipeline's system message."""
        text, mask = pipe.encode_prompt(prompts, device=self.device, max_sequence_length=self.tokens)
        counts = [text.shape[1]] * len(text) if mask is None else mask.sum(1).tolist()
        return padded([row[:count] for row, count in zip(text, counts, strict=True)], self.tokens)

    @property
    def tokens(self) -> int:
        """Tokens of a prompt that its pipeline reads by default."""
        import diffusers

        return int(inspect.signature(diffusers.QwenImagePipeline.__call__).parameters["max_sequence_length"].default)

    def tokenizer_input(self, prompts: Sequence[str]) -> list[str]:
        """Return prompts behind the system message."""
        with self.reader() as pipe:
            return [pipe.prompt_template_encode.partition("{}")[0] + prompt for prompt in prompts]

    def lengths(self) -> list[int]:
        """Return the tokens that are read, those of the system message included."""
        with self.reader() as pipe:
            return [self.tokens + int(pipe.prompt_template_encode_start_idx)]

    def null_row(self) -> Condition:
        """Encode a space: what the pipeline's authors give for the unconditional branch."""
        return self.encode([" "])

    def _call(self, network: nn.Module, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Call the transformer once, on packed latents; the length of the longest text is read from the device."""
        height, width = x.shape[-2] // 2, x.shape[-1] // 2
        mask = condition["mask"] > 0
        longest = int(mask.sum(1).max())
        out: Tensor = network(
            hidden_states=pack(x),
            timestep=self.timesteps(x, t) / 1000,
            encoder_hidden_states=condition["text"][:, :longest],
            encoder_hidden_states_mask=mask[:, :longest].to(x.device),
            img_shapes=[[(1, height, width)]] * len(x),
            return_dict=False,
        )[0]
        return unpack(out, height, width)
