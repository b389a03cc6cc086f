"""SANA: a flow on the latents of a deep autoencoder, conditioned on a language model's states of the prompt."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from fewstep.backbones.loading import named
from fewstep.backbones.transformer import TransformerBackbone
from fewstep.diffusion.denoiser import Condition


class Sana(TransformerBackbone):
    """The condition holds "text" [B, tokens, width] and "mask" [B, tokens]."""

    text_classes = ("Gemma2Model",)
    time_embedder = "time_embed.emb.timestep_embedder"

    def read(self, pipe: Any, prompts: list[str]) -> Condition:
        """Encode prompts, behind the pipeline's instruction, to the language model's states and their mask."""
        text, mask, _, _ = pipe.encode_prompt(
            prompts,
            do_classifier_free_guidance=False,
            device=self.device,
            complex_human_instruction=self.instruction,
        )
        return {"text": text, "mask": mask}

    @property
    def instruction(self) -> list[str]:
        """The lines of text that the pipeline puts before every prompt."""
        import diffusers

        call = getattr(diffusers, self.folder.pipeline).__call__
        return list(inspect.signature(call).parameters["complex_human_instruction"].default or ())

    def tokenizer_input(self, prompts: Sequence[str]) -> list[str]:
        """Return prompts behind the instruction."""
        return ["\n".join(self.instruction) + prompt for prompt in prompts]

    def lengths(self) -> list[int]:
        """Return the number of tokens of the instruction and of the prompt together."""
        (most,) = super().lengths()
        ((tokenizer, _),) = self.readers
        return [len(tokenizer.encode("\n".join(self.instruction))) + most - 2 if self.instruction else most]

    def null_row(self) -> Condition:
        """Encode the empty prompt without the instruction, cut where the pipeline cuts it."""
        with self.reader() as pipe, named("read the empty prompt by", self._parts(*self.folder.family.readers)):
            found = pipe.encode_prompt(
                [""], do_classifier_free_guidance=True, negative_prompt="", device=self.device,
                complex_human_instruction=None,
            )  # fmt: skip
        return {"text": found[2].float().cpu(), "mask": found[3].float().cpu()}

    def _call(self, network: nn.Module, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Call the transformer once."""
        scale = float(getattr(network.config, "timestep_scale", 1.0))  # type: ignore[arg-type]
        out: Tensor = network(
            x,
            encoder_hidden_states=condition["text"],
            encoder_attention_mask=condition["mask"],
            timestep=self.timesteps(x, t) * scale,
            return_dict=False,
        )[0]
        return out[:, : x.shape[1]]  # a variance may follow
