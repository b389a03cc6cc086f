"""Image complexity by the network of IC9600 (Feng et al. 2023), whose weights have no licence: the user brings them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from fewstep.common.files import sha256
from fewstep.evaluation.metric import Array, Identity, Pictures
from fewstep.evaluation.per_picture import PerPictureMetric
from fewstep.evaluation.standard.loader import Loader
from fewstep.evaluation.standard.pixels import BATCH, normalised, resized, unit_pixels
from fewstep.evaluation.standard.registry import ModelFiles
from fewstep.scorers.scorer import load_frozen

SIZE = 512
"""Side of the detailed branch's input; the other branch sees half of it."""
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
WIDTHS = (64, 128, 256, 512)
"""Channels of the four stages of a ResNet-18."""


class Block(nn.Module):
    """Residual block of a ResNet-18."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outside)
        changed = stride > 1 or inside != outside
        self.downsample = (
            nn.Sequential(nn.Conv2d(inside, outside, 1, stride, bias=False), nn.BatchNorm2d(outside))
            if changed
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return [B, outside, H / stride, W / stride]."""
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


def stage(inside: int, outside: int, stride: int = 2) -> nn.Sequential:
    """Return a stage of two blocks."""
    return nn.Sequential(Block(inside, outside, stride), Block(outside, outside, 1))


def stem(width: int) -> nn.Sequential:
    """Return the first convolution and the first stage of a ResNet-18, a quarter of the input's size."""
    first = nn.Conv2d(3, width, 7, 2, 3, bias=False)
    return nn.Sequential(first, nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(3, 2, 1), stage(width, width, 1))


class ChannelGate(nn.Module):
    """Factor in (0, 1) of each channel, from its map at `side` x `side`."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side = side
        self.linear = nn.Sequential(nn.Linear(side**2, 512), nn.ReLU(), nn.Linear(512, 1), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        """Return x, each channel times its factor."""
        size = (self.side, self.side)
        small = x if x.shape[2] == self.side else F.interpolate(x, size, mode="bilinear", align_corners=True)
        factors: Tensor = self.linear(small.flatten(2))[..., None]
        return x * factors


class Merge(nn.Module):
    """Convolution and batch norm with ReLU, after resizing to `side` x `side` where that is given."""

    def __init__(self, inside: int, outside: int, kernel: int, side: int | None = None) -> None:
        super().__init__()
        self.side = side
        self.conv = nn.Conv2d(inside, outside, kernel, padding=kernel // 2)
        self.bn = nn.BatchNorm2d(outside)

    def forward(self, x: Tensor) -> Tensor:
        """Return [B, outside, H, W]."""
        if self.side:
            x = F.interpolate(x, (self.side, self.side), mode="bilinear", align_corners=True)
        return F.relu(self.bn(self.conv(x)))


class ICNet(nn.Module):
    """The score of ICNet: two branches of a ResNet-18 that see the picture at two sizes. Names are the checkpoint's.

    Its second head, a map of complexity, does not enter the score and is left out.
    """

    def __init__(self) -> None:
        super().__init__()
        first, second, third, fourth = WIDTHS
        self.b1_1, self.b1_1_slam = stem(first), ChannelGate(32)
        self.b1_2, self.b1_2_slam = stage(first, second), ChannelGate(32)
        self.b2_1, self.b2_1_slam = stem(first), ChannelGate(32)
        self.b2_2, self.b2_2_slam = stage(first, second), ChannelGate(32)
        self.b2_3, self.b2_3_slam = stage(second, third), ChannelGate(16)
        self.b2_4, self.b2_4_slam = stage(third, fourth), ChannelGate(8)
        self.up1 = Merge(second, 256, 1, SIZE // 8)
        self.up2 = Merge(fourth, 256, 1, SIZE // 8)
        self.to_score_f, self.to_score_f_slam = Merge(512, 512, 3), ChannelGate(32)
        self.head = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 1), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        """Return the complexity of pictures [B, 3, 512, 512], [B] in (0, 1)."""
        context = F.interpolate(x, (SIZE // 2, SIZE // 2), mode="bilinear", align_corners=True)
        detail = self._through(x, "b1_1", "b1_2", "up1")
        context = self._through(context, "b2_1", "b2_2", "b2_3", "b2_4", "up2")
        both = self.to_score_f_slam(self.to_score_f(torch.cat([detail, context], 1)))
        scores: Tensor = self.head(both.mean((2, 3)))[:, 0]
        return scores

    def _through(self, x: Tensor, *names: str) -> Tensor:
        for name in names:
            x = getattr(self, name)(x)
            x = getattr(self, f"{name}_slam")(x) if hasattr(self, f"{name}_slam") else x
        return x


class ImageComplexity(PerPictureMetric):
    """Mean complexity in (0, 1)."""

    def __init__(self, network: nn.Module, model: ModelFiles) -> None:
        self._network = network
        self.identity = Identity(
            name="image complexity",
            group="detail",
            measures="complexity of a picture as people rate it, 0 to 1",
            better="neither",
            unit="",
            reduction="mean over pictures of the network's score",
            backbone=f"ICNet ({model.model})",
            weights_sha256=sha256(*model.files.weights),
            licence="none published",
            input=f"{SIZE} x {SIZE}, Pillow's bilinear on 8-bit pixels, both sides alike; ImageNet's mean and std",
        )

    @torch.inference_mode()
    def features(self, pictures: Pictures, prompts: Sequence[str]) -> Array:
        """Return each picture's complexity, float64 [N]."""
        device, scores = next(self._network.parameters()).device, []
        for start in range(0, len(pictures), BATCH):
            batch = [resized(one, SIZE, SIZE, Image.Resampling.BILINEAR) for one in pictures[start : start + BATCH]]
            x = normalised(unit_pixels(np.stack(batch)), MEAN, STD)
            scores.append(self._network(x.to(device)).double().cpu().numpy())
        found: Array = np.concatenate(scores)
        return found


def complexity(loader: Loader, models: Mapping[str, ModelFiles]) -> ImageComplexity:
    """Load IC9600's network."""
    model = models["ic9600"]
    unused = r"^to_map|num_batches_tracked$"
    network = load_frozen(ICNet, model.files, torch.float32, loader.device, unused=unused)
    return ImageComplexity(network, model)
