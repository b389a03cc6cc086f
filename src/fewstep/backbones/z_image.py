"""Z-Image: a flow, conditioned on a Qwen3's states of the prompt as a chat; one sequence of picture and text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.backbones.transformer import TransformerBackbone, padded, up_to_prompt
from fewstep.diffusion.denoiser import Condition


class ZImage(TransformerBackbone):
    """The condition holds "text" [B, tokens, width] and "mask" [B, tokens]."""

    text_classes = ("Qwen3Model",)
    time_embedder = "t_embedder"
    outlets = ("all_final_layer.2-1.linear", "layers")
    picture_first = True

    def read(self, pipe: Any, prompts: list[str]) -> Condition:
        """Encode prompts to the language model's last states but one."""
        text, _ = pipe.encode_prompt(prompts, do_classifier_free_guidance=False, device=self.device)
        return padded(text, *self.lengths())

    def tokenizer_input(self, prompts: Sequence[str]) -> list[str]:
        """Return prompts behind the beginning of a chat."""
        ((tokenizer, _),) = self.readers
        return [up_to_prompt(tokenizer, prompt, enable_thinking=True) for prompt in prompts]

    def blocks(self, network: nn.Module) -> list[nn.Module]:
        """Return the blocks whose outputs are features."""
        return self.spread(network.layers)

    @property
    def feature_channels(self) -> list[int]:
        """Channels of each of its `features`."""
        network: Any = self.network
        return [int(network.config.dim)] * len(self.blocks(network))

    def _call(self, network: nn.Module, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Call the transformer once, on a list of pictures and texts; it takes 1 - t and returns the negative flow.

        The lengths of the texts are read from the device.
        """
        lengths = (condition["mask"] > 0).sum(1).tolist()
        text = [states[:length] for states, length in zip(condition["text"], lengths, strict=True)]
        out: list[Tensor] = network(list(x[:, :, None]), 1 - self.timesteps(x, t) / 1000, text, return_dict=False)[0]
        return -torch.stack(out)[:, :, 0]
