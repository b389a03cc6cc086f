"""FID, KID and patch FID on the Inception network of TensorFlow's release of 2015-12-05, in torch-fidelity's class."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from fewstep.common.errors import UserError
from fewstep.common.extras import INCEPTION_PACKAGES, check_installed
from fewstep.common.files import sha256
from fewstep.common.tensors import load_tensors
from fewstep.evaluation.features import Features, SetDistance
from fewstep.evaluation.frechet import frechet, moments
from fewstep.evaluation.kid import KernelDistance
from fewstep.evaluation.limits import FD_FEWEST
from fewstep.evaluation.metric import Array, Figure, Identity, Pictures
from fewstep.evaluation.standard.loader import Loader
from fewstep.evaluation.standard.registry import ModelFiles
from fewstep.scorers.scorer import loading

SIZE = 299
Resize = Literal["clean", "legacy", "patch"]
WORDS = {
    "clean": "clean resize: Pillow's bicubic with antialiasing in floating point, clipped to [0, 255]",
    "legacy": "legacy resize: TensorFlow 1's bilinear without antialiasing",
    "patch": "middle square of 299 pixels at full size, no resize",
}
Models = Mapping[str, ModelFiles]


def backend(module: str) -> ModuleType:
    """Import a module of torch_fidelity without its package, which needs torchvision: the network does not.

    Torchvision's builds do not load beside every build of torch.

    Raises:
        UserError: torch-fidelity is not installed.
    """
    check_installed("FID", INCEPTION_PACKAGES, "fidelity")
    name = "torch_fidelity"
    if name in sys.modules:
        return import_module(f"{name}.{module}")
    spec = find_spec(name)
    assert spec is not None
    package = ModuleType(name)
    package.__path__ = list(spec.submodule_search_locations or ())
    sys.modules[name] = package
    try:
        return import_module(f"{name}.{module}")
    finally:
        del sys.modules[name]


def load_inception(model: ModelFiles, device: torch.device) -> nn.Module:
    """Load the layers up to the last pooling, frozen: [B, 3, 299, 299] in [-1, 1] -> [B, 2048, 1, 1].

    Raises:
        UserError: torch-fidelity is not installed, or the weights are another network's.
    """
    kind = backend("feature_extractor_inceptionv3").FeatureExtractorInceptionV3
    (file,) = model.files.weights
    own = io.BytesIO()  # the class reads a file of torch.save alone
    torch.save(load_tensors(file), own)
    own.seek(0)
    with loading(file):
        network = kind("inception-v3-compat", ["2048"], feature_extractor_weights_path=own)
    layers = [layer for name, layer in network.named_children() if name != "fc"]
    return nn.Sequential(*layers).eval().requires_grad_(False).to(device)


class InceptionFeatures:
    """`features.FeatureNetwork`: the 2,048 means of the last block, as all FIDs use them."""

    licence = "Apache-2.0"

    def __init__(self, layers: nn.Module, model: ModelFiles, device: torch.device, resize: Resize) -> None:
        self.layers, self.device, self.resize = layers, device, resize
        self.name = f"TF Inception 2015-12-05 ({model.model}), 2048 means of the last block"
        self.weights_sha256 = sha256(*model.files.weights)
        self.input = f"{SIZE} x {SIZE}, {WORDS[resize]}; (rgb - 128) / 128"

    @torch.inference_mode()
    def __call__(self, pictures: Pictures) -> Array:
        """Return the features of pictures, float32 [N, 2048].

        Raises:
            UserError: a picture is smaller than a patch.
        """
        x = {"clean": clean, "legacy": legacy, "patch": patch}[self.resize](pictures)
        features: Array = self.layers(((x - 128) / 128).to(self.device)).flatten(1).cpu().numpy()
        return features


def clean(pictures: Pictures) -> Tensor:
    """Resize as clean-fid does, float32 [B, 3, 299, 299] in [0, 255], not rounded."""
    planes = np.moveaxis(pictures, 3, 1).astype(np.float32)
    wide = [
        np.asarray(Image.fromarray(plane).resize((SIZE, SIZE), Image.Resampling.BICUBIC)).clip(0, 255)
        for plane in planes.reshape(-1, *planes.shape[2:])
    ]
    return torch.from_numpy(np.stack(wide).reshape(len(pictures), 3, SIZE, SIZE))


def legacy(pictures: Pictures) -> Tensor:
    """Resize as the network's own graph did, float32 [B, 3, 299, 299] in [0, 255]."""
    resize = backend("interpolate_compat_tensorflow").interpolate_bilinear_2d_like_tensorflow1x
    x = torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2).float()
    found: Tensor = resize(x, size=(SIZE, SIZE), align_corners=False)
    return found


def patch(pictures: Pictures) -> Tensor:
    """Cut the middle of each picture out at full size, as DMD2's program does, float32 [B, 3, 299, 299].

    Raises:
        UserError: a picture is smaller.
    """
    height, width = pictures.shape[1:3]
    if min(height, width) < SIZE:
        raise UserError(f"patch FID needs pictures of {SIZE} pixels a side, not {width} x {height}; use FID")
    top, left = (round((side - SIZE) / 2) for side in (height, width))
    cut = pictures[:, top : top + SIZE, left : left + SIZE]
    return torch.from_numpy(np.ascontiguousarray(cut)).permute(0, 3, 1, 2).float()


class InceptionFrechet(SetDistance):
    """FID: the Frechet distance on all 2,048 features, without an interval, whose 200 resamples would take minutes."""

    def __init__(self, features: Features, name: str) -> None:
        identity = Identity(
            name=name,
            group="quality",
            against="real",
            measures="Frechet distance between the Inception features of two picture sets",
            better="lower",
            unit="",
            reduction="squared Frechet distance of Gaussians with unbiased covariances, float64",
            **features.identity_fields,
        )
        super().__init__(features, identity, FD_FEWEST)

    def reduce(self, features: Array, against: Array | None, seed: int) -> Figure:
        """Return the distance."""
        both = (features, self.checked(features, against))
        ours, theirs = (moments(rows.astype(np.float64)) for rows in both)
        return Figure(frechet(*ours, *theirs), None, None, len(features))


def _features(resize: Resize) -> Callable[[Loader, Models], Features]:
    def load(loader: Loader, models: Models) -> Features:
        model = models["inception"]
        layers = loader.once(("inception", model.files.folder), lambda: load_inception(model, loader.device))
        return loader.once(
            ("inception features", model.files.folder, resize),
            lambda: Features(InceptionFeatures(layers, model, loader.device, resize), loader.cache),
        )

    return load


def _distance(kind: Any, name: str, resize: Resize) -> Callable[[Loader, Models], SetDistance]:
    def load(loader: Loader, models: Models) -> SetDistance:
        distance: SetDistance = kind(_features(resize)(loader, models), name)
        return distance

    return load


fid = _distance(InceptionFrechet, "FID", "clean")
fid_legacy = _distance(InceptionFrechet, "FID, legacy resize", "legacy")
patch_fid = _distance(InceptionFrechet, "patch FID", "patch")
kid = _distance(KernelDistance, "KID", "clean")
kid_legacy = _distance(KernelDistance, "KID, legacy resize", "legacy")
features = _features("clean")
