"""EfficientNet-Lite0 as a feature extractor: 1280 numbers per picture.

Layout, names and constants are those of the weights in `lite0_weights.py`: inverted residuals with ReLU6, no
squeeze-excite, batch norm with eps 1e-3, and TensorFlow's "same" padding, which at stride 2 adds more at the
bottom and right. Every batch norm is folded into its convolution: only convolutions and ReLU6 remain.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewstep.evaluation.lite0_weights import CONVERTED_SHA256, LICENCE, load_weights
from fewstep.evaluation.metric import Array, Pictures

SIZE = 128
"""Edge of the network's input in pixels."""
WIDTH = 1280
EPS = 1e-3
STAGES = (
    # repeats, kernel, stride, expansion, in, out
    (1, 3, 1, 1, 32, 16),
    (2, 3, 2, 6, 16, 24),
    (2, 5, 2, 6, 24, 40),
    (3, 3, 2, 6, 40, 80),
    (3, 5, 1, 6, 80, 112),
    (4, 5, 2, 6, 112, 192),
    (1, 3, 1, 6, 192, 320),
)


@dataclass(frozen=True)
class Layer:
    """A convolution, the batch norm after it, and whether ReLU6 follows."""

    conv: str
    norm: str
    inside: int
    outside: int
    kernel: int
    stride: int = 1
    depthwise: bool = False
    relu: bool = True


@dataclass(frozen=True)
class Block:
    """A sequence of layers; `residual` adds the block's input to its output."""

    layers: tuple[Layer, ...]
    residual: bool


def layout() -> list[Block]:
    """Return the network's blocks in order."""
    blocks = [Block((Layer("_conv_stem", "_bn0", 3, 32, 3, 2),), False)]
    number = 0
    for repeats, kernel, first_stride, expansion, first_in, out in STAGES:
        for repeat in range(repeats):
            inside = first_in if repeat == 0 else out
            stride = first_stride if repeat == 0 else 1
            middle = inside * expansion
            at = f"_blocks.{number}."
            layers = [
                Layer(at + "_depthwise_conv", at + "_bn1", middle, middle, kernel, stride, depthwise=True),
                Layer(at + "_project_conv", at + "_bn2", middle, out, 1, relu=False),
            ]
            if expansion > 1:
                layers.insert(0, Layer(at + "_expand_conv", at + "_bn0", inside, middle, 1))
            blocks.append(Block(tuple(layers), stride == 1 and inside == out))
            number += 1
    blocks.append(Block((Layer("_conv_head", "_bn1", 320, WIDTH, 1),), False))
    return blocks


class Lite0(nn.Module):
    """The folded network. Input float [B, 3, H, W] = (rgb255 - 127) / 128, output float [B, 1280]."""

    def __init__(self) -> None:
        super().__init__()
        self.plan = layout()
        convs = {}
        for layer in (layer for block in self.plan for layer in block.layers):
            convs[key(layer.conv)] = nn.Conv2d(
                layer.inside,
                layer.outside,
                layer.kernel,
                layer.stride,
                padding=layer.kernel // 2 if layer.stride == 1 else 0,
                groups=layer.inside if layer.depthwise else 1,
            )
        self.convs = nn.ModuleDict(convs)

    def forward(self, x: Tensor) -> Tensor:
        """Return features [B, 1280] of pictures [B, 3, H, W]."""
        (last,) = deque(self.blocks(x), maxlen=1)
        return last.float().mean((2, 3))

    def blocks(self, x: Tensor) -> Iterator[Tensor]:
        """Yield each block's output for [B, 3, H, W]; later blocks are not computed until they are needed."""
        for block in self.plan:
            start = x
            for layer in block.layers:
                x = same_padding(x, layer.kernel, layer.stride) if layer.stride > 1 else x
                x = self.convs[key(layer.conv)](x)
                x = F.relu6(x, inplace=True) if layer.relu else x
            if block.residual:
                x = x + start
            yield x


def key(name: str) -> str:
    """Return a layer's name without the dots that torch forbids in a module's name."""
    return name.replace(".", "/")


def same_padding(x: Tensor, kernel: int, stride: int) -> Tensor:
    """Pad with zeros to an output of ceil(size / stride); the larger half at the bottom and right."""
    height, width = (max((-(-size // stride) - 1) * stride + kernel - size, 0) for size in (x.shape[2], x.shape[3]))
    return F.pad(x, (width // 2, width - width // 2, height // 2, height - height // 2))


def fold(layer: Layer, weights: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the weight and bias of a convolution with its batch norm folded in."""
    norm = {
        name: weights[f"{layer.norm}.{name}"].double() for name in ("weight", "bias", "running_mean", "running_var")
    }
    scale = norm["weight"] / (norm["running_var"] + EPS).sqrt()
    weight = weights[f"{layer.conv}.weight"].double() * scale[:, None, None, None]
    return weight.float(), (norm["bias"] - norm["running_mean"] * scale).float()


@torch.no_grad()
def make_lite0(weights: Mapping[str, Tensor]) -> Lite0:
    """Build the network from `weights`, named as in the package."""
    network = Lite0()
    for layer in (layer for block in network.plan for layer in block.layers):
        weight, bias = fold(layer, weights)
        network.convs[key(layer.conv)].load_state_dict({"weight": weight, "bias": bias})
    network.eval().requires_grad_(False)
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
