"""The adapter's transformer: vectors of a prompt's pieces to a teacher's condition."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewstep.diffusion.denoiser import Condition
from fewstep.inference.multilingual.settings import HEADS, AdapterConfig

MASK = "mask"
"""The entry of a condition that is 1 for the tokens that the denoiser attends to, [B, tokens]; others are states."""
LEAST = 1e-4
"""Smallest standard deviation of a channel that is not taken for a constant."""


class StateMap(nn.Module):
    """Transformer with a learned query for each token of a condition, and one for an entry without tokens.

    Args:
        vectors: width of a sentence vector.
        shapes: shape of each entry of the condition for one prompt: [tokens, width], [width], or [tokens] of a mask.
    """

    def __init__(self, config: AdapterConfig, vectors: int, shapes: Mapping[str, tuple[int, ...]]) -> None:
        super().__init__()
        width = config.width
        self.shapes = dict(shapes)
        self.rows = [shape[0] if len(shape) == 2 or name == MASK else 1 for name, shape in shapes.items()]
        options: dict[str, Any] = {"dropout": 0.0, "activation": "gelu", "batch_first": True, "norm_first": True}
        encoder = nn.TransformerEncoderLayer(width, HEADS, 2 * width, **options)
        decoder = nn.TransformerDecoderLayer(width, HEADS, 2 * width, **options)
        self.enter = nn.Linear(config.window * vectors, width)
        self.encoder = nn.TransformerEncoder(encoder, config.layers, enable_nested_tensor=False)
        self.decoder = nn.TransformerDecoder(decoder, config.layers, nn.LayerNorm(width))
        self.queries = nn.Parameter(torch.randn(sum(self.rows), width))
        widths = {name: 1 if name == MASK else shape[-1] for name, shape in shapes.items()}
        self.leave = nn.ModuleDict({name: nn.Linear(width, count) for name, count in widths.items()})
        for name, shape in shapes.items():
            self.register_buffer(f"mean_{name}", torch.zeros(shape))
            self.register_buffer(f"scale_{name}", torch.ones(widths[name]))

    def fit_units(self, english: Condition) -> None:
        """Set the units of the outputs: mean by token and channel, standard deviation by channel, of some prompts."""
        for name, states in english.items():
            if name != MASK:
                mean = states.mean(0)
                scale = (states - mean).square().flatten(0, -2).mean(0).sqrt()
                self.get_buffer(f"mean_{name}").copy_(mean)
                self.get_buffer(f"scale_{name}").copy_(scale.clamp(min=LEAST))

    def forward(self, vectors: Tensor, padding: Tensor) -> Condition:
        """Map unit vectors [B, pieces, windows, width] to a condition, its mask as logits.

        Args:
            padding: True behind the last piece of a prompt, bool [B, pieces].
        """
        pieces, width = vectors.shape[1], self.queries.shape[1]
        unit = vectors.flatten(2) * math.sqrt(vectors.shape[3])  # entries of about 1
        entered = self.enter(unit) + positions(pieces, width).to(vectors)
        memory = self.encoder(entered, src_key_padding_mask=padding)
        queries = self.queries.expand(len(vectors), -1, -1)
        found = self.decoder(queries, memory, memory_key_padding_mask=padding).split(self.rows, dim=1)
        outputs = {}
        for (name, shape), part in zip(self.shapes.items(), found, strict=True):
            output = self.leave[name](part).float() * self.get_buffer(f"scale_{name}")
            outputs[name] = output.reshape(-1, *shape) + self.get_buffer(f"mean_{name}")
        return outputs

    def error(self, outputs: Condition, english: Condition) -> Tensor:
        """Return the mean over entries of their squared error, as a share of the variance of the English states.

        Tokens that the mask leaves out do not count. The mask's own error is its cross-entropy.
        """
        errors = []
        for name, states in english.items():
            if name == MASK:
                errors.append(F.binary_cross_entropy_with_logits(outputs[name], states))
                continue
            error = (outputs[name] - states).square().mean(-1)
            counted = english[MASK] if MASK in english and error.dim() == 2 else torch.ones_like(error)
            variance = self.get_buffer(f"scale_{name}").square().mean()
            errors.append((error * counted).sum() / counted.sum() / variance)
        return torch.stack(errors).mean()


def positions(length: int, width: int) -> Tensor:
    """Return sinusoidal positions (arXiv 1706.03762, section 3.5), float32 [length, width]."""
    rates = torch.exp(-math.log(1e4) * torch.arange(0, width, 2) / width)
    angles = torch.arange(length)[:, None] * rates
    return torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1)
