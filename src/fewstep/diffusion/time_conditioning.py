"""Extra conditioning: the landing s (TCD's S+, arXiv 2402.19159; CTM, 2310.02279) and guidance w (LCM, 2310.04378).

An extra embedding is added to the network's time embedding: a sinusoid, a hidden layer, and a last layer that starts at
zero. Its weights are kept beside a LoRA or a full network, one set a role; the frozen teacher has none. A fully trained
UNet takes w by an input of its own instead, diffusers' `time_cond_proj` (`backbones.unet`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.common.choices import ExtraCondition

WIDTH = 256
"""Width of the sinusoid, as in LCM's embedding of w."""
SCALES: dict[ExtraCondition, float] = {"s": 1.0, "w": 1000.0}
"""Factors before the sinusoid: s is in training indices, as t is; w has LCM's factor."""

EXTRA_PREFIX = "extra_conditioning."
"""Prefix of these weights' names beside a network's, in files and checkpoints."""
OLD_EXTRA_PREFIX = "told."
"""The same prefix in files and checkpoints of earlier versions."""


def current_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors of a file with `OLD_EXTRA_PREFIX` replaced by `EXTRA_PREFIX`."""
    return {
        EXTRA_PREFIX + name.removeprefix(OLD_EXTRA_PREFIX) if name.startswith(OLD_EXTRA_PREFIX) else name: tensor
        for name, tensor in tensors.items()
    }


def split_extra(condition: Mapping[str, Tensor], names: Iterable[str]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Split a condition into the inputs of an extra embedding, by their names, and the rest."""
    extra: dict[str, Tensor] = {name: value for name, value in condition.items() if name in set(names)}
    return extra, {name: value for name, value in condition.items() if name not in extra}


def sinusoid(value: Tensor, width: int = WIDTH) -> Tensor:
    """Return cos and sin of value times frequencies from 1 down to 1e-4, fp32 [B, width]; value float64 [B]."""
    steps = torch.arange(width // 2, dtype=torch.float64, device=value.device) / (width // 2)
    angles = value.double()[:, None] * torch.exp(-math.log(10_000) * steps)
    return torch.cat([angles.cos(), angles.sin()], dim=1).float()


class ExtraEmbedding(nn.Module):
    """Embedding of [B] numbers by name that is added to a time embedding, [B, width]; zero at first."""

    def __init__(self, names: Sequence[ExtraCondition], width: int, seed: int = 0) -> None:
        super().__init__()
        self.parts = nn.ModuleDict()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            for name in names:
                last = nn.Linear(width, width)
                nn.init.zeros_(last.weight)
                nn.init.zeros_(last.bias)
                self.parts[name] = nn.Sequential(nn.Linear(WIDTH, width), nn.SiLU(), last)

    def forward(self, values: Mapping[str, Tensor]) -> Tensor:
        """Return the sum of the embeddings.

        Raises:
            KeyError: other names than those that the embedding was made for.
        """
        if values.keys() != self.parts.keys():
            raise KeyError(f"the network takes {sorted(self.parts)}, not {sorted(values)}")
        device = next(self.parameters()).device
        parts = []
        for name, part in self.parts.items():
            value = (values[name].double() * SCALES[name]).to(device, non_blocking=True)  # type: ignore[index]
            parts.append(part(sinusoid(value)))
        return torch.stack(parts).sum(0)


def embedding_width(time_embedding: nn.Module) -> int:
    """Return the width of a time embedding's output: that of `linear_2`, or of its last linear layer."""
    layers = [layer for layer in time_embedding.modules() if isinstance(layer, nn.Linear)]
    last: Any = getattr(time_embedding, "linear_2", layers[-1])
    return int(last.out_features)


class ExtraEmbeddingHook:
    """Forward hook that adds `addition` [B, width], where it is set, to the output of a network's time embedding."""

    def __init__(self, time_embedding: nn.Module) -> None:
        self.addition: Tensor | None = None
        self._handle = time_embedding.register_forward_hook(self._add)

    def _add(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        if self.addition is None:
            return output
        # some time embeddings have tokens, or one axis of them, between batch and width
        return output + self.addition.to(output).reshape(len(output), *[1] * (output.dim() - 2), -1)

    @contextmanager
    def adding(self, addition: Tensor | None) -> Iterator[None]:
        """Set `addition` until the block ends."""
        before = self.addition
        self.addition = addition
        try:
            yield
        finally:
            self.addition = before

    def close(self) -> None:
        """Remove the hook."""
        self._handle.remove()
