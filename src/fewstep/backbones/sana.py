"""SANA: a flow on the latents of a deep autoencoder, told what a language model makes of the prompt."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from fewstep.backbones.base import named
from fewstep.backbones.transformer import TransformerBackbone
from fewstep.diffusion.denoiser import Condition


class Sana(TransformerBackbone):
    """The condition holds "text" [B, tokens, width] and "mask" [B, tokens]."""

    text_classes = ("Gemma2Model",)

    def read(self, pipe: Any, prompts: list[str]) -> Condition:
        """The language model's states of the prompts, behind the instruction that the pipeline puts before them."""
        return self._read(pipe, prompts, self.instruction)

    @property
    def instruction(self) -> list[str]:
        """The lines that the pipeline puts before every prompt."""
        import diffusers

        call = getattr(diffusers, self.folder.pipeline).__call__
        return list(inspect.signature(call).parameters["complex_human_instruction"].default or ())

    def spelled(self, prompts: Sequence[str]) -> list[str]:
        """Prompts behind the instruction."""
        return ["\n".join(self.instruction) + prompt for prompt in prompts]

    def lengths(self) -> list[int]:
        """Tokens of the instruction, and what the pipeline gives the prompt beside it."""
        (most,) = super().lengths()
        ((tokenizer, _),) = self._load_text()
        return [len(tokenizer.encode("\n".join(self.instruction))) + most - 2 if self.instruction else most]

    def _read(self, pipe: Any, prompts: list[str], instruction: list[str] | None) -> Condition:
        text, mask, _, _ = pipe.encode_prompt(
            prompts,
            do_classifier_free_guidance=False,
            device=self.device,
            complex_human_instruction=instruction,
        )
        return {"text": text, "mask": mask}

    def null(self, count: int) -> Condition:
        """The unconditional branch: the empty prompt without the instruction, cut where the pipeline cuts it."""
        with self.reader() as pipe, named("read the empty prompt by", self._placed(*self.folder.family.readers)):
            found = pipe.encode_prompt(
                [""], do_classifier_free_guidance=True, negative_prompt="", device=self.device,
                complex_human_instruction=None,
            )  # fmt: skip
        empty = {"text": found[2].float().cpu(), "mask": found[3].float().cpu()}
        return {name: value.expand(count, *value.shape[1:]) for name, value in empty.items()}

    def _call(
        self, network: nn.Module, x: Tensor, t: Tensor, condition: Condition, residuals: Mapping[str, Any]
    ) -> Tensor:
        """One network call."""
        scale = float(getattr(network.config, "timestep_scale", 1.0))  # type: ignore[arg-type]
        out: Tensor = network(
            x,
            encoder_hidden_states=condition["text"],
            encoder_attention_mask=condition["mask"],
            timestep=self.told_time(x, t) * scale,
            return_dict=False,
            **residuals,
        )[0]
        return out[:, : x.shape[1]]  # what may follow is a variance

    def time_embedding(self, network: nn.Module) -> nn.Module:
        """The part that embeds the time."""
        part: Any = network.time_embed
        embedder: nn.Module = part.emb.timestep_embedder
        return embedder
