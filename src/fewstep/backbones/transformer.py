"""The base of families with a diffusion transformer: prompts encoded by the pipeline's own code, features."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.backbones import config_keys
from fewstep.backbones.base import Backbone, outputs_of
from fewstep.backbones.pipeline_folder import index_file
from fewstep.common.files import read_mapping
from fewstep.diffusion.denoiser import Condition

FEATURE_BLOCKS = 4
"""Blocks whose outputs are `features`, evenly spread."""


class TransformerBackbone(Backbone):
    """A pipeline around a diffusion transformer of diffusers."""

    outlets: Sequence[str] = ("proj_out", "transformer_blocks")
    picture_first = False
    """Whether the picture's tokens stand before those of the text, or of padding."""
    prompts_at_once = 8  # T5-XXL's attention over 512 tokens of each is 64 MiB a prompt and product, in fp32

    @contextmanager
    def reader(self) -> Iterator[Any]:
        """Yield the pipeline with its tokenizers and text encoders alone, so that it encodes prompts as it does."""
        import diffusers

        family = self.folder.family
        kind = getattr(diffusers, self.folder.pipeline)
        wanted = [p for p in inspect.signature(kind.__init__).parameters.values() if p.name != "self"]
        parts: dict[str, Any] = {p.name: None for p in wanted if p.default is inspect.Parameter.empty}
        index = read_mapping(index_file(self.folder.path))
        settings = [key for key in config_keys.PIPELINES[self.folder.pipeline].read if index.get(key) is not None]
        parts |= {key: index[key] for key in settings}
        for names, loaded in zip(zip(family.tokenizers, family.encoders, strict=True), self.readers, strict=True):
            parts |= dict(zip(names, loaded, strict=True))
        level = diffusers.utils.logging.get_verbosity()
        diffusers.utils.logging.set_verbosity_error()  # each prompt that an encoder cuts; `lost_words` counts them
        try:
            with torch.no_grad():
                yield kind(**parts)
        finally:
            diffusers.utils.logging.set_verbosity(level)

    def lengths(self) -> list[int]:
        """Return how many tokens each text encoder reads: CLIP's own number, else the pipeline's default."""
        import diffusers

        given = inspect.signature(getattr(diffusers, self.folder.pipeline).encode_prompt).parameters
        most = int(given["max_sequence_length"].default)
        readers = [tokenizer for tokenizer, _ in self.readers]
        return [int(each.model_max_length) if "CLIP" in type(each).__name__ else most for each in readers]

    def _encode(self, prompts: Sequence[str], batch: int) -> Condition:
        """Encode prompts by the pipeline's own `encode_prompt`, fp32 on the CPU."""
        parts: list[Condition] = []
        with self.reader() as pipe:
            for start in range(0, len(prompts), batch):
                found = self.read(pipe, list(prompts[start : start + batch]))
                parts.append({name: value.float().cpu() for name, value in found.items()})
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def read(self, pipe: Any, prompts: list[str]) -> Condition:
        """Encode some prompts by the pipeline that holds the text encoders."""
        raise NotImplementedError

    def blocks(self, network: nn.Module) -> list[nn.Module]:
        """Return the blocks whose outputs are `features`, in order."""
        return self.spread(network.transformer_blocks)

    def spread(self, every: Any) -> list[nn.Module]:
        """Return `FEATURE_BLOCKS` of a list of blocks, evenly spread, the last one included."""
        count = min(FEATURE_BLOCKS, len(every))
        return [every[(i + 1) * len(every) // count - 1] for i in range(count)]

    def features(self, network: nn.Module, x: Tensor, t: Tensor, condition: Condition) -> list[Tensor]:
        """Return the image tokens after some blocks as maps [B, width, h, w]; later blocks are not evaluated."""
        height, width = (side // self.folder.patch for side in x.shape[-2:])
        count = height * width

        def as_map(output: Any) -> Tensor:
            tokens: Tensor = output[-1] if isinstance(output, tuple) else output  # text tokens are apart, or beside
            own = tokens[:, :count] if self.picture_first else tokens[:, -count:]
            return own.transpose(1, 2).reshape(len(tokens), -1, height, width)

        return [as_map(each) for each in outputs_of(self.blocks(network), lambda: self.call(network, x, t, condition))]

    @property
    def feature_channels(self) -> list[int]:
        """Channels of each of its `features`."""
        config: Any = self.network.config
        width = int(config.num_attention_heads) * int(config.attention_head_dim)
        return [width] * len(self.blocks(self.network))


def padded(rows: Sequence[Tensor], length: int) -> Condition:
    """Return states [tokens, width] of some texts as one tensor of `length` tokens each, with their mask."""
    text = torch.stack([nn.functional.pad(row, (0, 0, 0, length - len(row))) for row in rows])
    counts = torch.tensor([len(row) for row in rows], device=text.device)
    return {"text": text, "mask": (torch.arange(length, device=text.device) < counts[:, None]).to(text.dtype)}


def up_to_prompt(tokenizer: Any, prompt: str, **settings: bool) -> str:
    """Return a prompt as the message of a chat, up to its end: what follows it is no word of the prompt.

    Args:
        settings: of the chat's template.
    """
    chat: str = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True, **settings
    )
    return chat[: chat.rindex(prompt) + len(prompt)] if prompt in chat else chat
