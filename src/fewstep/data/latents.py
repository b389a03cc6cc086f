"""Latents and text states of a training set, encoded once and read from disk by item number."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from fewstep.common.device import copy_async
from fewstep.common.files import short_digest
from fewstep.common.mapped_tensors import MappedRows, Rows
from fewstep.common.rng import KeyedRng
from fewstep.common.run_inputs import PARTS, items
from fewstep.common.tensors import check_finite
from fewstep.data.buckets import BucketedFiles, BucketedLatents
from fewstep.data.images import Captioned, PictureSet
from fewstep.data.row_store import Batches, fill, lacking, read_rows

CHUNK = 512
"""Pictures read and encoded at a time."""
CAPTION_CHUNK = 4096
"""Captions encoded at a time: 1.3 GB of SDXL's states in half precision."""


OnEncoded = Callable[[Sequence[str]], None]


class Encoders(Protocol):
    """The encoders of a backbone."""

    def encode(self, prompts: Sequence[str]) -> Mapping[str, Tensor]:
        """Return the conditions of prompts, one row each."""

    def null(self, count: int) -> Mapping[str, Tensor]:
        """Return the condition of the unconditional branch, `count` rows."""

    def to_latents(self, pictures: np.ndarray) -> Tensor:
        """Return the latents of uint8 pictures."""

    def pictures_at_once(self, pixels: int) -> int:
        """Return the most pictures of so many pixels that `to_latents` encodes in one network call."""

    prompts_at_once: int
    """The most prompts that `encode` encodes in one network call."""


class Wanted(NamedTuple):
    """The numbers of the pictures and of the distinct captions of a set that are used; None for all."""

    pictures: np.ndarray | None = None
    captions: np.ndarray | None = None


ALL = Wanted()


@dataclass(frozen=True)
class LatentSet:
    """An encoded training set.

    Attributes:
        latents: fp32 [N, C, h, w], read from disk when they are used; in buckets if there are several shapes; one zero,
            expanded, if there are prompts alone.
        table: the conditions of the K distinct captions and, last, the unconditional one, [K + 1, ...] each.
        rows: rows of the table that belong to each latent, int64 [N, c].
        key: fingerprint of encoders, pictures and captions.
        prompts: the distinct captions.
        parts: as `DataIdentity.parts`.
    """

    latents: Rows
    table: Mapping[str, Rows]
    rows: Tensor
    key: str
    prompts: tuple[str, ...] = ()
    parts: Mapping[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.latents)

    @property
    def inputs(self) -> dict[str, Any]:
        """Its fingerprints among the inputs of a run."""
        return {"data": self.key, **({PARTS: dict(self.parts)} if self.parts else {})}

    @property
    def captions(self) -> int:
        """K, the number of distinct captions."""
        return len(next(iter(self.table.values()))) - 1

    def drawn(self, items: Tensor, rng: KeyedRng, empty: float) -> Tensor:
        """Draw a caption of each item, for a share `empty` the unconditional one: rows of the table, int64 [B]."""
        return drawn_captions(self.rows, self.captions, items, rng, empty)

    def condition(self, items: Tensor, rng: KeyedRng, empty: float, device: torch.device) -> dict[str, Tensor]:
        """Return the conditions in the `drawn` rows."""
        return self.states(self.drawn(items, rng, empty), device)

    def null(self, count: int, device: torch.device) -> dict[str, Tensor]:
        """Return the unconditional condition, one row expanded to `count`."""
        one = self.states(torch.tensor([-1]), device)
        return {name: row.expand(count, *row.shape[1:]) for name, row in one.items()}

    def states(self, rows: Tensor, device: torch.device) -> dict[str, Tensor]:
        """Return the conditions in rows of the table, fp32 on the device."""
        # widened on the device: half the bytes are copied
        return {name: copy_async(states[rows], device).float() for name, states in self.table.items()}


def drawn_captions(rows: Tensor, captions: int, items: Tensor, rng: KeyedRng, empty: float) -> Tensor:
    """Draw as `LatentSet.drawn`, from a set's rows and its number of distinct captions."""
    chosen = rng.integers("caption", 0, rows.shape[1])
    drawn = rows[items, chosen]
    return torch.where(rng.chance("empty prompt", empty), captions, drawn) if empty > 0 else drawn


def every(count: int, wanted: np.ndarray | None) -> np.ndarray:
    """Return the wanted rows in rising order, each once; all of them for None."""
    return np.arange(count) if wanted is None else np.unique(wanted)


def _picture_groups(pictures: PictureSet) -> Sequence[Sequence[int]]:
    """Return the pictures of each shape, in the order of storage."""
    return pictures.groups() if isinstance(pictures, BucketedFiles) else [range(len(pictures))]


def _batches(pictures: PictureSet, rows: Sequence[int], encoders: Encoders) -> Batches:
    """Return the batches that the pictures of one shape are encoded in."""
    width, height = pictures.size, pictures.size
    if isinstance(pictures, BucketedFiles):
        width, height = pictures.shapes[pictures.of[rows[0]]]
    return Batches(len(rows), encoders.pictures_at_once(width * height), CHUNK)


def encode_pictures(
    pictures: PictureSet, encoders: Encoders, cache: Path, key: str, wanted: np.ndarray | None = None
) -> Rows:
    """Encode the wanted pictures into fp32 latents on disk; a chunk of pictures at a time is in memory."""
    chosen, parts = every(len(pictures), wanted), list[Rows]()
    groups = _picture_groups(pictures)
    read = pictures.read_shaped if isinstance(pictures, BucketedFiles) else pictures.read
    for number, rows in enumerate(groups):
        place, own = cache / f"{key}-{number}", np.asarray(rows)

        def encode(some: Sequence[int], own: np.ndarray = own) -> dict[str, Tensor]:
            return {"latents": encoders.to_latents(read(own[some])).cpu()}

        mine = np.flatnonzero(np.isin(own, chosen))
        fill(place, mine, _batches(pictures, rows, encoders), encode, "encoding pictures", "picture", number)
        parts.append(read_rows(place, len(own)).get("latents") or MappedRows([], [], len(own)))
    return BucketedLatents(parts, groups) if isinstance(pictures, BucketedFiles) else parts[0]


def encode_captions(
    captions: Sequence[str],
    encoders: Encoders,
    cache: Path,
    key: str,
    wanted: np.ndarray | None = None,
    on_encoded: OnEncoded | None = None,
) -> dict[str, Rows]:
    """Encode the wanted captions and, last, the unconditional one into fp16 conditions on disk."""
    place, count = cache / key, len(captions)

    def half(states: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found = {name: state.half().cpu() for name, state in states.items()}
        check_finite(found, "captions cannot be kept in fp16: the text encoder's states are too large or not finite")
        return found

    def encode(some: Sequence[int]) -> dict[str, Tensor]:
        read = [captions[row] for row in some]
        if on_encoded is not None:
            on_encoded(read)
        return half(encoders.encode(read))

    def null(_: Sequence[int]) -> dict[str, Tensor]:
        return half(encoders.null(1))

    batches = Batches(count, encoders.prompts_at_once, CAPTION_CHUNK)
    fill(place, every(count, wanted), batches, encode, "encoding captions", "caption")
    fill(place, np.array([count]), Batches(count + 1, 1, 1), null, "", "caption")
    return dict(read_rows(place, count + 1))


@dataclass(frozen=True)
class DataIdentity:
    """The identity of a training set, known before anything of it is encoded.

    Attributes:
        pictures, captions: names of their stores; of prompts alone the first is "no-pictures".
        prompts: the distinct captions.
        rows: those of each item, int64 [N, c].
        parts: fingerprints of its parts by name (`common.run_inputs.PARTS`).
    """

    pictures: str
    captions: str
    prompts: tuple[str, ...]
    rows: Tensor
    parts: Mapping[str, str]

    @property
    def key(self) -> str:
        """Fingerprint of all of it."""
        return f"{self.pictures} {self.captions}"


def identify(data: Captioned, fingerprint: str) -> DataIdentity:
    """Identify a training set by its pictures, captions and the `fingerprint` of what encodes them."""
    pictures, parts = data.pictures, {"encoders": fingerprint}
    store = "no-pictures"
    if pictures is not None:
        store = f"latents-{short_digest(f'{fingerprint} {pictures.fingerprint()}')}"
        parts["size"] = f"{pictures.size}"
        parts["pictures"] = items(identity.hex() for identity in pictures.identities())
        if isinstance(pictures, BucketedFiles):
            shapes = [pictures.shapes[number] for number in pictures.of]
            parts["crops"] = items(f"{width:08x}{height:08x}" for width, height in shapes)
    captions = (json.dumps(list(row)).encode() for row in data.captions)
    parts["captions"] = items(hashlib.sha256(row).hexdigest() for row in captions)
    distinct = sorted({caption for row in data.captions for caption in row})
    number = {caption: i for i, caption in enumerate(distinct)}
    most = max(len(row) for row in data.captions)
    rows = torch.tensor([[number[row[i % len(row)]] for i in range(most)] for row in data.captions])
    return DataIdentity(
        store, f"captions-{short_digest(fingerprint + json.dumps(distinct))}", tuple(distinct), rows, parts
    )


def used(
    identity: DataIdentity, visits: Callable[[int, int], np.ndarray], steps: range, batch: int, seed: int, empty: float
) -> Wanted:
    """Return the pictures and captions that some steps use, or all if that saves little.

    Args:
        visits: (start, stop) -> the items at these positions of the order of visits.
        batch: samples a step, over all processes.
        empty: share of samples that are trained with the empty prompt.
    """
    samples, count = len(steps) * batch, len(identity.prompts)
    if samples >= 2 * max(len(identity.rows), count):
        return Wanted()
    pictures, captions = [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=np.int64)]
    for step in steps:
        items = visits(step * batch, (step + 1) * batch)
        rng = KeyedRng(seed, step, tuple(range(step * batch, (step + 1) * batch)))
        pictures.append(items)
        captions.append(drawn_captions(identity.rows, count, torch.from_numpy(items), rng, empty).numpy())
    used_captions = np.unique(np.concatenate(captions))
    return Wanted(np.unique(np.concatenate(pictures)), used_captions[used_captions < count])


def lacking_pictures(data: Captioned, identity: DataIdentity, cache: Path, wanted: np.ndarray | None) -> int:
    """Count the wanted pictures that are not encoded yet."""
    if data.pictures is None:
        return 0
    chosen, groups = every(len(data), wanted), _picture_groups(data.pictures)
    own = [np.flatnonzero(np.isin(np.asarray(rows), chosen)) for rows in groups]
    return sum(lacking(cache / f"{identity.pictures}-{number}", rows) for number, rows in enumerate(own))


def lacking_captions(identity: DataIdentity, cache: Path, wanted: np.ndarray | None) -> int:
    """Count the wanted captions that are not encoded yet."""
    return lacking(cache / identity.captions, every(len(identity.prompts), wanted))


def latent_set(
    data: Captioned,
    encoders: Encoders,
    fingerprint: str,
    cache: Path,
    shape: tuple[int, ...] = (),
    *,
    identity: DataIdentity | None = None,
    wanted: Wanted = ALL,
    on_encoded: OnEncoded | None = None,
) -> LatentSet:
    """Encode pictures and captions, once for each (encoder weights, pictures, captions); of prompts alone no picture.

    Text states are kept in fp16, latents in fp32. All processes of a launch must call it: each encodes its share.

    Args:
        cache: folder that runs share.
        shape: of a latent, for prompts alone.
        identity: of the set, if it is known already.
        wanted: the pictures and captions that are used.
        on_encoded: called with captions when they are encoded, not with those that the cache holds.
    """
    identity = identity or identify(data, fingerprint)
    latents: Rows
    if data.pictures is None:
        latents = torch.zeros(()).expand(len(data), *shape)
    else:
        latents = encode_pictures(data.pictures, encoders, cache, identity.pictures, wanted.pictures)
    table = encode_captions(identity.prompts, encoders, cache, identity.captions, wanted.captions, on_encoded)
    return LatentSet(latents, table, identity.rows, identity.key, identity.prompts, identity.parts)
