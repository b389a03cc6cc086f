"""Formats of frozen weights: fp32, bf16, or 8 or 4 bits by bitsandbytes. Trained weights stay in fp32."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import nn

from fewstep.common.choices import BaseFormat

CODE = "nf4"
"""The 16 values of a 4-bit weight: quantiles of a normal distribution (QLoRA, arXiv 2305.14314)."""


def quantize(
    network: nn.Module,
    kept: BaseFormat,
    compute: torch.dtype,
    apart: Collection[nn.Module],
    device: torch.device | None = None,
    stay: bool = True,
) -> None:
    """Convert a frozen network's weights in place.

    Args:
        kept: fp32 for no change; bf16 for all weights; 8bit and 4bit for the matrices of linear layers.
        compute: dtype that layers in 4 bits compute in.
        apart: modules that are not quantized to 8 and 4 bits: time embedding and output layers.
        device: where matrices are quantized, one after another; by default where they are.
        stay: whether they stay there; else they return to where they were.
    """
    if kept == "bf16":
        network.to(torch.bfloat16)
    if kept in ("8bit", "4bit"):
        spared = {id(module) for part in apart for module in part.modules()}
        for parent in list(network.modules()):
            for name, child in list(parent.named_children()):
                if type(child) is nn.Linear and id(child) not in spared:
                    narrow = _narrow(child, kept, compute, device)
                    setattr(parent, name, narrow if stay else narrow.to(child.weight.device))
        setattr(network, f"is_loaded_in_{kept}", True)  # PEFT chooses its layers by this


def _narrow(layer: nn.Linear, kept: BaseFormat, compute: torch.dtype, device: torch.device | None) -> nn.Module:
    """Return a linear layer with its matrix in 8 or 4 bits."""
    import bitsandbytes as bnb

    shape, bias = (layer.in_features, layer.out_features), layer.bias is not None
    narrow: nn.Module
    if kept == "8bit":
        narrow = bnb.nn.Linear8bitLt(*shape, bias=bias, has_fp16_weights=False)
        narrow.weight = bnb.nn.Int8Params(layer.weight.data, requires_grad=False, has_fp16_weights=False)
    else:
        narrow = bnb.nn.Linear4bit(*shape, bias=bias, compute_dtype=compute, quant_type=CODE)
        narrow.weight = bnb.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type=CODE)
        # else some CPUs repack the matrix at the first call without gradient, into a layout that others cannot read
        narrow.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
    if bias:
        narrow.bias = layer.bias
    return narrow.to(device or layer.weight.device).train(layer.training)


def quantized_parts(parameter: nn.Parameter) -> Iterator[tuple[Any, str]]:
    """Yield (owner, attribute) of the tensors beside a matrix in 4 bits: scales, their own scales, and codes."""
    state = getattr(parameter, "quant_state", None)
    if state is None:
        return
    yield from ((state, name) for name in ("absmax", "code"))
    if state.nested:
        yield from ((state, "offset"), (state.state2, "absmax"), (state.state2, "code"))
