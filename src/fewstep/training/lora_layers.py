"""LoRA layers that add their product to the base layer's output by one `addmm`.

PEFT's layers run `result + B(A(x)) * scaling`: two more passes over an output of full width, and over its gradient in
training. Here `B A(x)`, its scale and the sum are one `addmm`, in place where no gradient is kept. Names, weights and
the function are PEFT's, to rounding; PEFT makes, saves and merges the adapters.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import Conv2d, Linear
from torch import Tensor, nn


def fuse_lora_layers(network: nn.Module) -> None:
    """Replace the class of a network's plain LoRA layers by the fused one, in place.

    Layers on matrices in 8 or 4 bits, on grouped convolutions, with a bias or dropout, or of a variant (DoRA) stay
    unchanged. Adapters that are added later must be plain, too.
    """
    layers: list[Any] = list(network.modules())
    for layer in layers:
        if type(layer) is Linear and _plain(layer):
            layer.__class__ = FusedLinear
        elif type(layer) is Conv2d and _plain(layer) and layer.get_base_layer().groups == 1:
            layer.__class__ = FusedConv2d


def _plain(layer: Any) -> bool:
    """Return whether all adapters of a layer are scaled products B A without bias, dropout or variant."""
    ups, drops = layer.lora_B.values(), layer.lora_dropout.values()
    bare = all(up.bias is None for up in ups) and all(isinstance(drop, nn.Identity) for drop in drops)
    return bare and not layer.lora_variant and not getattr(layer, "fan_in_fan_out", False)


def _role(layer: Any, x: Tensor) -> str | None:
    """Return the active adapter if there is one alone and its dtype fits x, or autocast makes it fit."""
    active = layer.active_adapters
    if layer.disable_adapters or layer.merged or len(active) != 1 or active[0] not in layer.lora_A:
        return None
    role: str = active[0]
    same = x.dtype == layer.lora_A[role].weight.dtype == layer.get_base_layer().weight.dtype
    return role if same or torch.is_autocast_enabled(x.device.type) else None


def _add(out: Tensor, low: Tensor, up: Tensor, scaling: float) -> Tensor:
    """Return out + scaling low up^T, all matrices."""
    up = up.to(low.dtype).t()  # autocast casts for `addmm`, not for `addmm_`
    return torch.addmm(out, low, up, alpha=scaling) if torch.is_grad_enabled() else out.addmm_(low, up, alpha=scaling)


class FusedLinear(Linear):  # type: ignore[misc]
    """A linear layer with LoRA."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Map [..., in] to [..., out]."""
        role = None if args or kwargs or x.dim() < 2 else _role(self, x)
        if role is None:
            result: Tensor = super().forward(x, *args, **kwargs)
            return result
        out, low = self.base_layer(x), self.lora_A[role](x)
        rows = _add(out.flatten(0, -2), low.flatten(0, -2), self.lora_B[role].weight, self.scaling[role])
        return rows.view(out.shape)


class FusedConv2d(Conv2d):  # type: ignore[misc]
    """A convolution with LoRA, whose B is 1x1: a product over pixels, which lie row by row in channels_last memory."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Map [B, in, H, W] to [B, out, H', W']."""
        role = None if args or kwargs else _role(self, x)
        if role is None:
            result: Tensor = super().forward(x, *args, **kwargs)
            return result
        out, low = self.base_layer(x), self.lora_A[role](x)
        if not out.is_contiguous(memory_format=torch.channels_last):
            added: Tensor = out + self.lora_B[role](low) * self.scaling[role]
            return added
        out, low = out.permute(0, 2, 3, 1), low.permute(0, 2, 3, 1)
        up = self.lora_B[role].weight.flatten(1)
        rows = _add(out.flatten(0, -2), low.flatten(0, -2), up, self.scaling[role])
        return rows.view(out.shape).permute(0, 3, 1, 2)
