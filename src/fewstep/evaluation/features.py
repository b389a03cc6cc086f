"""Features of pictures, computed once, in batches, and kept in memory and, if asked, on disk.

On disk they are safetensors files named by the pixels and the backbone.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from tqdm import tqdm

from fewstep.common.errors import UserError
from fewstep.common.files import atomic_write
from fewstep.common.tensors import load_tensors, save_tensors
from fewstep.evaluation.metric import Array, Pictures, check_pictures

BATCH = 32
KEPT = 16
"""Picture sets whose features stay in memory."""
BAR_FROM = 512
"""Fewest pictures worth a progress bar."""


class Backbone(Protocol):
    """A network that turns one batch of pictures into features, and what identifies it."""

    @property
    def name(self) -> str:
        """The network and the layer."""
        ...

    @property
    def weights_sha256(self) -> str:
        """Of its weights file."""
        ...

    @property
    def licence(self) -> str:
        """Of its weights."""
        ...

    @property
    def input(self) -> str:
        """Size and resizing of what it sees."""
        ...

    def __call__(self, pictures: Pictures) -> Array:
        """Return float32 [N, D]; a picture's features depend on that picture alone."""
        ...


class Features:
    """Features of picture sets through one backbone, each set computed once.

    Metrics that share one `Features` share the work. Sets are known by the SHA-256 of their pixels.

    Args:
        folder: where features also stay between processes, as safetensors; None for memory alone.
        progress: show a bar for large sets.
    """

    def __init__(self, backbone: Backbone, folder: Path | None = None, *, progress: bool = True) -> None:
        self.backbone = backbone
        self.folder = folder
        self.progress = progress
        self._memory: OrderedDict[str, Array] = OrderedDict()

    def __call__(self, pictures: Pictures) -> Array:
        """Return float32 [N, D], not to be written to.

        Raises:
            UserError: not a set of pictures.
        """
        check_pictures(pictures)
        key = self._key(pictures)
        found = self._memory.get(key)
        if found is None:
            found = self._read(key)
        if found is None or len(found) != len(pictures):
            found = self._compute(pictures)
            self._write(key, found)
        found.flags.writeable = False
        self._memory[key] = found
        self._memory.move_to_end(key)
        while len(self._memory) > KEPT:
            self._memory.popitem(last=False)
        return found

    def _key(self, pictures: Pictures) -> str:
        backbone = self.backbone
        digest = hashlib.sha256()
        for part in (backbone.name, backbone.weights_sha256, backbone.input, str(pictures.shape)):
            digest.update(part.encode() + b"\0")
        digest.update(np.ascontiguousarray(pictures).data)
        return digest.hexdigest()

    def _compute(self, pictures: Pictures) -> Array:
        starts = range(0, len(pictures), BATCH)
        hidden = not self.progress or len(pictures) < BAR_FROM
        with tqdm(total=len(pictures), desc="features", unit="picture", disable=hidden, leave=False) as bar:
            parts = []
            for start in starts:
                parts.append(self.backbone(pictures[start : start + BATCH]))
                bar.update(len(parts[-1]))
        return np.concatenate(parts)

    def _read(self, key: str) -> Array | None:
        if self.folder is None:
            return None
        try:
            features: Array = load_tensors(self.folder / f"{key}.safetensors")["features"].numpy()
        except (UserError, KeyError):
            return None  # absent or damaged: it is computed again and replaced
        return features

    def _write(self, key: str, features: Array) -> None:
        if self.folder is not None:
            with atomic_write(self.folder / f"{key}.safetensors") as part:
                save_tensors(part, {"features": torch.from_numpy(np.ascontiguousarray(features))})


def normalise(features: Array) -> Array:
    """Scale features [..., D] to length 1, float64; a row of zeros stays zero."""
    wide = features.astype(np.float64)
    length = np.linalg.norm(wide, axis=-1, keepdims=True)
    unit: Array = wide / np.maximum(length, 1e-12)
    return unit
