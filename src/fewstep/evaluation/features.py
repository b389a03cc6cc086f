"""Features of picture sets, computed once, in batches, and cached in memory and optionally on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from fewstep.common.errors import UserError
from fewstep.common.messages import Bar
from fewstep.common.tensor_cache import keep, kept
from fewstep.common.tensors import load_tensors
from fewstep.evaluation.metric import Array, Identity, Pictures, check_pictures

BATCH = 32
KEPT = 16
"""Picture sets whose features stay in memory."""
BAR_FROM = 512
"""Fewest pictures that a progress bar is shown for."""


class NetworkIdentity(Protocol):
    """Identity of a frozen network that computes features.

    Attributes:
        name: the network and the layers that are read.
        weights_sha256: SHA-256 of its weights file.
        licence: licence of its weights.
        input: size, resizing and normalisation of its input.
    """

    name: str
    weights_sha256: str
    licence: str
    input: str


class FeatureNetwork(NetworkIdentity, Protocol):
    """A network that maps a batch of pictures to features."""

    def __call__(self, pictures: Pictures) -> Array:
        """Return float32 [N, D]; a picture's features depend on that picture alone."""


class Features:
    """Features of picture sets through one network, each set computed once.

    Metrics that share one `Features` share the work. Sets are identified by the SHA-256 of their pixels.

    Args:
        folder: where features are also stored between processes, as safetensors; None for memory alone.
        progress: show a bar for large sets.
    """

    def __init__(self, network: FeatureNetwork, folder: Path | None = None, *, progress: bool = True) -> None:
        self.network = network
        self.folder = folder
        self.progress = progress
        self._memory: dict[str, Array] = {}

    @property
    def identity_fields(self) -> dict[str, Any]:
        """The fields of an `Identity` that describe the network."""
        network = self.network
        return {
            "backbone": network.name,
            "weights_sha256": network.weights_sha256,
            "licence": network.licence,
            "input": network.input,
        }

    def __call__(self, pictures: Pictures) -> Array:
        """Return read-only float32 [N, D].

        Raises:
            UserError: not a set of pictures.
        """
        check_pictures(pictures)
        key = self._key(pictures)
        found = self._memory.pop(key, None)
        if found is None and self.folder:
            stored = kept(self.folder, key, load_tensors) or {}
            found = stored["features"].numpy() if "features" in stored else None
        if found is None or len(found) != len(pictures):
            found = self._compute(pictures)
            if self.folder:
                keep(self.folder, key, {"features": torch.from_numpy(np.ascontiguousarray(found))})
        found.flags.writeable = False
        self._memory[key] = found  # the newest last
        while len(self._memory) > KEPT:
            self._memory.pop(next(iter(self._memory)))
        return found

    def _key(self, pictures: Pictures) -> str:
        network = self.network
        digest = hashlib.sha256()
        for part in (network.name, network.weights_sha256, network.input, str(pictures.shape)):
            digest.update(part.encode() + b"\0")
        digest.update(np.ascontiguousarray(pictures).data)
        return digest.hexdigest()

    def _compute(self, pictures: Pictures) -> Array:
        hidden = not self.progress or len(pictures) < BAR_FROM
        with Bar(total=len(pictures), desc="features", unit="picture", disable=hidden, leave=False) as bar:
            parts = []
            for start in range(0, len(pictures), BATCH):
                parts.append(self.network(pictures[start : start + BATCH]))
                bar.update(len(parts[-1]))
        return np.concatenate(parts)


class SetDistance:
    """The base of distances between the features of two picture sets.

    Args:
        identity: with against = "real".
        fewest: least number of pictures on either side; a distance of fewer raises UserError.
    """

    def __init__(self, features: Features, identity: Identity, fewest: int) -> None:
        self._features = features
        self.identity = identity
        self.fewest = fewest

    def features(self, pictures: Pictures, prompts: Sequence[str]) -> Array:
        """Return the network's features, [N, D]."""
        return self._features(pictures)

    def checked(self, features: Array, against: Array | None) -> Array:
        """Return `against` if both sets are large enough.

        Raises:
            UserError: fewer than `fewest` pictures on either side.
        """
        for what, rows in (("pictures", features), ("pictures to measure against", against)):
            count = 0 if rows is None else len(rows)
            if count < self.fewest:
                raise UserError(
                    f"{self.identity.name} of {count} {what} would be mostly noise; give at least {self.fewest}"
                )
        assert against is not None
        return against


def normalise(features: Array) -> Array:
    """Scale features [..., D] to length 1, float64; a row of zeros stays zero."""
    wide = features.astype(np.float64)
    length = np.linalg.norm(wide, axis=-1, keepdims=True)
    unit: Array = wide / np.maximum(length, 1e-12)
    return unit
