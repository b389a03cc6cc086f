"""References for the standard metrics: random weights under the published names, and the published formulas in plain
torch and numpy. Nothing here imports the modules under test, except to find torch-fidelity's class."""

from __future__ import annotations

import importlib.machinery
import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from support.scorer_references import Random, State

AESTHETIC_WIDTHS = (1024, 128, 64, 16, 1)


def anything(name: str) -> type:
    """A class for each public name of a missing module."""
    if name.startswith("__"):
        raise AttributeError(name)
    return type(name, (), {})


@contextmanager
def without_torchvision() -> Iterator[None]:
    """Let torch_fidelity be imported where torchvision is missing or does not load beside this build of torch."""
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError):
        names = [
            "torchvision",
            *(f"torchvision.{part}" for part in ("datasets", "transforms", "transforms.functional")),
        ]
        fakes = {name: ModuleType(name) for name in names}
        for name, fake in fakes.items():
            fake.__spec__ = importlib.machinery.ModuleSpec(name, None)
            fake.__getattr__ = anything  # type: ignore[method-assign]
        for name in names[1:]:
            parent, _, child = name.rpartition(".")
            setattr(fakes[parent], child, fakes[name])
        sys.modules.update(fakes)
        try:
            yield
        finally:
            for name in names:
                del sys.modules[name]
    else:
        yield


def inception_state(kind: Any, seed: int = 0) -> State:
    """Random weights of torch-fidelity's class, large enough for signals to get through."""

    class Unloaded(kind):  # type: ignore[misc]
        def load_state_dict(self, *_: Any, **__: Any) -> None:  # type: ignore[override]
            return None

    empty = io.BytesIO()
    torch.save({}, empty)
    empty.seek(0)
    network = Unloaded("random", ["2048"], feature_extractor_weights_path=empty)
    draw = torch.Generator().manual_seed(seed)
    state = {}
    for key, value in network.state_dict().items():
        if key.endswith("num_batches_tracked"):
            continue
        if value.ndim == 4:
            state[key] = torch.randn(value.shape, generator=draw) * (2 / value[0].numel()) ** 0.5
        else:
            state[key] = value + 0.1 * torch.rand(value.shape, generator=draw)
    return state


def clean_resize(picture: np.ndarray, size: int) -> np.ndarray:
    """Pillow's antialiased bicubic of a plane [H, W]: Keys' kernel with a = -1/2, stretched by the scale."""

    def kernel(x: np.ndarray) -> np.ndarray:
        x = np.abs(x)
        near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
        return np.where(x < 1, near, np.where(x < 2, far, 0))

    def matrix(before: int) -> np.ndarray:
        scale = before / size
        stretch = max(scale, 1.0)
        rows = []
        for place in range(size):
            centre = (place + 0.5) * scale
            first, last = int(max(centre - 2 * stretch + 0.5, 0)), int(min(centre + 2 * stretch + 0.5, before))
            row = np.zeros(before)
            row[first:last] = kernel((np.arange(first, last) - centre + 0.5) / stretch)
            rows.append(row / row.sum())
        return np.array(rows)

    height, width = picture.shape
    return (matrix(height) @ (picture @ matrix(width).T)).clip(0, 255)


def aesthetic_state(width: int, seed: int = 0) -> State:
    draw, inside = Random(seed), width
    for place, outside in zip((0, 2, 4, 6, 7), AESTHETIC_WIDTHS):
        draw.linear(f"layers.{place}", outside, inside)
        inside = outside
    return draw.state


def aesthetic(state: State, embeddings: Tensor) -> Tensor:
    """The predictor of the published program: five linear layers, three dropouts, on embeddings of length 1."""
    sizes = [state[f"layers.{place}.weight"].shape for place in (0, 2, 4, 6, 7)]
    first, second, third, fourth, fifth = (nn.Linear(inside, outside) for outside, inside in sizes)
    drops = (nn.Dropout(0.2), nn.Dropout(0.2), nn.Dropout(0.1))
    model = nn.Sequential(first, drops[0], second, drops[1], third, drops[2], fourth, fifth).double().eval()
    model.load_state_dict({key.removeprefix("layers."): value for key, value in state.items()})
    with torch.no_grad():
        found: Tensor = model(embeddings / embeddings.norm(dim=-1, keepdim=True))
    return found[:, 0]


def icnet_state(seed: int = 0) -> State:
    """Random weights of ICNet, under the names of its checkpoint; its second head too, which the score does not use."""
    draw = Random(seed)

    def norm(key: str, width: int) -> None:
        draw.norm(key, width)
        draw.add(f"{key}.running_mean", width, size=0.1)
        draw.state[f"{key}.running_var"] = 0.5 + torch.rand(width, generator=draw.generator)
        draw.state[f"{key}.num_batches_tracked"] = torch.tensor(3)

    def stage(key: str, inside: int, outside: int) -> None:
        for number in range(2):
            block, first = f"{key}.{number}", outside if number else inside
            draw.add(f"{block}.conv1.weight", outside, first, 3, 3)
            norm(f"{block}.bn1", outside)
            draw.add(f"{block}.conv2.weight", outside, outside, 3, 3)
            norm(f"{block}.bn2", outside)
            if number == 0 and inside != outside:
                draw.add(f"{block}.downsample.0.weight", outside, inside, 1, 1)
                norm(f"{block}.downsample.1", outside)

    def gate(key: str, side: int) -> None:
        draw.linear(f"{key}.linear.0", 512, side * side)
        draw.linear(f"{key}.linear.2", 1, 512)

    for branch, stages in (("b1", (64, 128)), ("b2", (64, 128, 256, 512))):
        draw.add(f"{branch}_1.0.weight", 64, 3, 7, 7)
        norm(f"{branch}_1.1", 64)
        stage(f"{branch}_1.4", 64, 64)
        for number, (inside, outside) in enumerate(pairwise(stages), 2):
            stage(f"{branch}_{number}", inside, outside)
    sides = {"b1_1": 32, "b1_2": 32, "b2_1": 32, "b2_2": 32, "b2_3": 16, "b2_4": 8}
    for name, side in (sides | {"to_map_f": 32, "to_score_f": 32}).items():
        gate(f"{name}_slam", side)
    for name, outside, inside, kernel in (
        ("up1", 256, 128, 1),
        ("up2", 256, 512, 1),
        ("to_map_f", 512, 512, 3),
        ("to_score_f", 512, 512, 3),
    ):
        draw.add(f"{name}.conv.weight", outside, inside, kernel, kernel)
        draw.add(f"{name}.conv.bias", outside, size=0.1)
        norm(f"{name}.bn", outside)
    draw.add("to_map.to_map.0.weight", 1, 512, 1, 1)
    draw.add("to_map.to_map.0.bias", 1, size=0.1)
    draw.linear("head.0", 512, 512)
    draw.linear("head.2", 1, 512)
    return draw.state


def icnet(state: State, x: Tensor) -> Tensor:
    """The score of ICNet as its paper and published program define it, step by step, of [B, 3, 512, 512]."""
    state = {key: value.double() for key, value in state.items()}

    def norm(key: str, x: Tensor) -> Tensor:
        mean, var, weight, bias = (
            state[f"{key}.{part}"][:, None, None] for part in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (var + 1e-5).sqrt() * weight + bias

    def residual(key: str, x: Tensor, stride: int) -> Tensor:
        y = norm(f"{key}.bn1", F.conv2d(x, state[f"{key}.conv1.weight"], stride=stride, padding=1)).relu()
        y = norm(f"{key}.bn2", F.conv2d(y, state[f"{key}.conv2.weight"], padding=1))
        if f"{key}.downsample.0.weight" in state:
            x = norm(f"{key}.downsample.1", F.conv2d(x, state[f"{key}.downsample.0.weight"], stride=stride))
        return (x + y).relu()

    def gated(key: str, side: int, x: Tensor) -> Tensor:
        small = F.interpolate(x, (side, side), mode="bilinear", align_corners=True).flatten(2)
        hidden = (small @ state[f"{key}_slam.linear.0.weight"].T + state[f"{key}_slam.linear.0.bias"]).relu()
        factor = (hidden @ state[f"{key}_slam.linear.2.weight"].T + state[f"{key}_slam.linear.2.bias"]).sigmoid()
        return x * factor[..., None]

    def convolved(key: str, x: Tensor, padding: int) -> Tensor:
        return norm(
            f"{key}.bn", F.conv2d(x, state[f"{key}.conv.weight"], state[f"{key}.conv.bias"], padding=padding)
        ).relu()

    def branch(name: str, x: Tensor, sides: tuple[int, ...]) -> Tensor:
        x = norm(f"{name}_1.1", F.conv2d(x, state[f"{name}_1.0.weight"], stride=2, padding=3)).relu()
        x = F.max_pool2d(x, 3, 2, 1)
        for number in range(2):
            x = residual(f"{name}_1.4.{number}", x, 1)
        x = gated(f"{name}_1", 32, x)
        for stage, side in enumerate(sides, 2):
            x = residual(f"{name}_{stage}.0", x, 2)
            x = gated(f"{name}_{stage}", side, residual(f"{name}_{stage}.1", x, 1))
        return F.interpolate(x, (64, 64), mode="bilinear", align_corners=True)

    half = F.interpolate(x.double(), (256, 256), mode="bilinear", align_corners=True)
    parts = (branch("b1", x.double(), (32,)), branch("b2", half, (32, 16, 8)))
    both = torch.cat([convolved(f"up{number}", part, 0) for number, part in enumerate(parts, 1)], 1)
    pooled = gated("to_score_f", 32, convolved("to_score_f", both, 1)).mean((2, 3))
    hidden = (pooled @ state["head.0.weight"].T + state["head.0.bias"]).relu()
    return (hidden @ state["head.2.weight"].T + state["head.2.bias"]).sigmoid()[:, 0]


def write(folder: Path, state: State, converted_from: str = "") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    metadata = {"converted_from": converted_from} if converted_from else None
    save_file({key: value.contiguous() for key, value in state.items()}, folder / "weights.safetensors", metadata)


class Numbered:
    """A network whose features are given: each picture holds its row's number."""

    name, weights_sha256, licence, input = "given", "none", "none", "none"

    def __init__(self, rows: np.ndarray) -> None:
        self.rows = rows.astype(np.float32)

    def __call__(self, pictures: np.ndarray) -> np.ndarray:
        return self.rows[pictures[:, 0, 0, 0].astype(int) * 256 + pictures[:, 0, 0, 1]]
