"""EfficientNet-Lite0 as a feature extractor: 1280 numbers per picture.

Layout, names and constants are those of the weights in `lite0_weights.py`: inverted residuals with ReLU6, no
squeeze-excite, batch norm with eps 1e-3, and TensorFlow's "same" padding, which at stride 2 adds more at the
bottom and right. Every batch norm is folded into its convolution: only convolutions and ReLU6 remain.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewstep.evaluation.lite0_weights import CONVERTED_SHA256, LICENCE, load_weights
from fewstep.evaluation.metric import Array, Pictures

SIZE = 128
"""Edge of the network's input in pixels."""
EPS = 1e-3
STAGES = ((1, 1), (2, 2), (2, 2), (3, 2), (3, 1), (4, 2), (1, 1))
"""Number of blocks of each stage, and the stride of its first block."""


class Layer(NamedTuple):
    """A convolution and the batch norm after it, by their names in the package, and whether ReLU6 follows."""

    conv: str
    norm: str
    stride: int = 1
    relu: bool = True


def layout() -> list[list[Layer]]:
    """Return the layers of each block, in order: the stem, the inverted residuals and the head."""
    blocks = [[Layer("_conv_stem", "_bn0", 2)]]
    strides = [stride if first else 1 for count, stride in STAGES for first in (True, *[False] * (count - 1))]
    for number, stride in enumerate(strides):
        at = f"_blocks.{number}."
        expand = [Layer(f"{at}_expand_conv", f"{at}_bn0")] if number else []
        depthwise = Layer(f"{at}_depthwise_conv", f"{at}_bn1", stride)
        blocks.append([*expand, depthwise, Layer(f"{at}_project_conv", f"{at}_bn2", relu=False)])
    return [*blocks, [Layer("_conv_head", "_bn1")]]


class Lite0(nn.Module):
    """The folded network. Input float [B, 3, H, W] = (rgb255 - 127) / 128, output float [B, 1280].

    Args:
        weights: named as in the package.
    """

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.plan = layout()
        self.convs = nn.ModuleList(nn.ModuleList(folded(layer, weights) for layer in block) for block in self.plan)

    def forward(self, x: Tensor) -> Tensor:
        """Return features [B, 1280] of pictures [B, 3, H, W]."""
        (last,) = deque(self.blocks(x), maxlen=1)
        return last.float().mean((2, 3))

    def blocks(self, x: Tensor) -> Iterator[Tensor]:
        """Yield each block's output for [B, 3, H, W]; later blocks are not computed until they are needed."""
        stages: Any = self.convs
        for block, convs in zip(self.plan, stages, strict=True):
            start = x
            for layer, conv in zip(block, convs, strict=True):
                x = same_padding(x, conv.kernel_size[0], layer.stride) if layer.stride > 1 else x
                x = conv(x)
                x = F.relu6(x, inplace=True) if layer.relu else x
            if x.shape == start.shape:  # all blocks but the first of each stage
                x = x + start
            yield x


def same_padding(x: Tensor, kernel: int, stride: int) -> Tensor:
    """Pad with zeros to an output of ceil(size / stride); the larger half at the bottom and right."""
    height, width = (max((-(-size // stride) - 1) * stride + kernel - size, 0) for size in (x.shape[2], x.shape[3]))
    return F.pad(x, (width // 2, width - width // 2, height // 2, height - height // 2))


def folded(layer: Layer, weights: Mapping[str, Tensor]) -> nn.Conv2d:
    """Return a convolution with its batch norm folded in; a depthwise one has matrices of one channel."""
    norm = {
        name: weights[f"{layer.norm}.{name}"].double() for name in ("weight", "bias", "running_mean", "running_var")
    }
    scale = norm["weight"] / (norm["running_var"] + EPS).sqrt()
    weight = weights[f"{layer.conv}.weight"].double() * scale[:, None, None, None]
    outside, inside, kernel, _ = weight.shape
    groups = outside if inside == 1 else 1
    padding = kernel // 2 if layer.stride == 1 else 0
    conv = nn.Conv2d(inside * groups, outside, kernel, layer.stride, padding, groups=groups)
    bias = norm["bias"] - norm["running_mean"] * scale
    conv.load_state_dict({"weight": weight.float(), "bias": bias.float()})
    return conv


def make_lite0(weights: Mapping[str, Tensor]) -> Lite0:
    """Build the network from `weights`, named as in the package, frozen and in eval mode."""
    network = Lite0(weights).eval().requires_grad_(False)
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return network


class Lite0Features:
    """`features.FeatureNetwork` of EfficientNet-Lite0: 1280 numbers in [0, 6] per picture.

    In fp32: bf16 is twice as fast but moves the features by 4 %.

    Raises:
        UserError: the weights can be neither read nor converted.
    """

    name = "EfficientNet-Lite0 (ImageNet), 1280 means after the last ReLU6"
    weights_sha256 = CONVERTED_SHA256
    licence = LICENCE
    input = f"{SIZE}x{SIZE}, bicubic with antialiasing (Pillow's), (rgb - 127) / 128"

    def __init__(self) -> None:
        self.network = make_lite0(load_weights())

    @torch.inference_mode()
    def __call__(self, pictures: Pictures) -> Array:
        """Return the features of one batch of pictures of any size, float32 [N, 1280]."""
        x = torch.from_numpy(np.array(pictures)).permute(0, 3, 1, 2)
        x = F.interpolate(x, (SIZE, SIZE), mode="bicubic", antialias=True)
        features: Array = self.network(x.float().sub_(127).div_(128)).numpy()
        return features
