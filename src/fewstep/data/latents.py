"""Latents and text states computed once, kept on disk, and served by item number."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from fewstep.common.device import copy_async
from fewstep.common.errors import UserError
from fewstep.common.files import atomic_write
from fewstep.common.mapped_tensors import MappedTensor, Rows, open_tensors
from fewstep.common.rng import KeyedRng
from fewstep.common.run_inputs import PARTS, items
from fewstep.common.safetensors_header import read_safetensors_header
from fewstep.common.tensors import load_tensors, save_tensors
from fewstep.data.buckets import BucketedFiles, BucketedLatents
from fewstep.data.images import Captioned, PictureSet
from fewstep.data.row_store import Batches, StoredRows, fill, lacking, read_rows

CHUNK = 512
"""Pictures read and encoded at a time."""
SAID = 4096
"""Captions encoded at a time: 1.3 GB of SDXL's states in half precision."""


OnEncoded = Callable[[Sequence[str]], None]


class Encoders(Protocol):
    """What a backbone offers to the cache."""

    def encode(self, prompts: Sequence[str]) -> Mapping[str, Tensor]:
        """Prompts -> conditions, one row each."""
        ...

    def null(self, count: int) -> Mapping[str, Tensor]:
        """The condition of the unconditional branch, `count` rows."""
        ...

    def to_latents(self, pictures: np.ndarray) -> Tensor:
        """uint8 pictures -> latents."""
        ...

    def pictures_at_once(self, pixels: int) -> int:
        """Most pictures of so many pixels that `to_latents` hands to its network in one call."""
        ...

    prompts_at_once: int
    """The same of `encode` and its prompts."""


class Wanted(NamedTuple):
    """Which pictures and which distinct captions of a set will be asked for, by number; None for all."""

    pictures: np.ndarray | None = None
    captions: np.ndarray | None = None


ALL = Wanted()


@dataclass(frozen=True)
class LatentSet:
    """A training set without encoders.

    Attributes:
        latents: fp32 [N, C, h, w], read from disk as they are asked for; of several shapes, where pictures keep their
            aspect; of prompts alone, one zero seen N times, which takes no room.
        table: the conditions of the K distinct captions and, last, the unconditional one, [K + 1, ...] each; likewise.
        rows: int64 [N, c]: which conditions belong to which latent.
        key: fingerprint of encoders, pictures and captions.
        said: the distinct captions.
        parts: as `Known.parts`.
    """

    latents: Rows
    table: Mapping[str, Rows]
    rows: Tensor
    key: str
    said: tuple[str, ...] = ()
    parts: Mapping[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.latents)

    @property
    def inputs(self) -> dict[str, Any]:
        """What a run on it notes as its inputs."""
        return {"data": self.key, **({PARTS: dict(self.parts)} if self.parts else {})}

    @property
    def captions(self) -> int:
        """K, the distinct captions: the rows of the table before the unconditional one."""
        return len(next(iter(self.table.values()))) - 1

    def drawn(self, items: Tensor, rng: KeyedRng, empty: float) -> Tensor:
        """Rows of the table, int64 [B]: one of the captions of each item, drawn; the unconditional one instead for a
        share `empty` of them."""
        return drawn_captions(self.rows, self.captions, items, rng, empty)

    def condition(self, items: Tensor, rng: KeyedRng, empty: float, device: torch.device) -> dict[str, Tensor]:
        """The conditions in the `drawn` rows."""
        return self.states(self.drawn(items, rng, empty), device)

    def null(self, count: int, device: torch.device) -> dict[str, Tensor]:
        """The unconditional condition, one row that is seen `count` times."""
        one = self.states(torch.tensor([-1]), device)
        return {name: row.expand(count, *row.shape[1:]) for name, row in one.items()}

    def states(self, rows: Tensor, device: torch.device) -> dict[str, Tensor]:
        """The conditions in the given rows of the table."""
        # widened there: half the bytes go over
        return {name: copy_async(states[rows], device).float() for name, states in self.table.items()}


def drawn_captions(rows: Tensor, captions: int, items: Tensor, rng: KeyedRng, empty: float) -> Tensor:
    """As `LatentSet.drawn`, from the set's rows and its number of distinct captions alone."""
    chosen = rng.integers("caption", 0, rows.shape[1])
    drawn = rows[items, chosen]
    return torch.where(rng.chance("empty prompt", empty), captions, drawn) if empty > 0 else drawn


KeptT = TypeVar("KeptT")
LAYOUT = "layout"
"""Entry of a kept file's metadata: digest of the names, types and shapes of what it holds."""


TYPES = {
    **{torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"},
    **{torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL"},
}
"""Types of what is kept, and their names in a header."""


def _layout(entries: Iterable[tuple[str, str, tuple[int, ...]]]) -> str:
    return hashlib.sha256(json.dumps(sorted(entries)).encode()).hexdigest()[:16]


def _as_kept(path: Path, read: Callable[[Path], KeptT]) -> KeptT | None:
    """Read a file if it is laid out as it was kept; None, and no file any more, where it is missing or another."""
    if not path.exists():
        return None
    try:
        metadata, entries = read_safetensors_header(path)
        found = _layout((name, entry.dtype, entry.shape) for name, entry in entries.items())
        if metadata.get(LAYOUT, found) == found:  # files of older versions have none
            return read(path)
    except UserError:
        pass
    if path.is_dir():
        raise UserError(f"{path} is a folder, where a file is kept; remove it")
    path.unlink(missing_ok=True)
    return None


def kept(folder: Path, key: str) -> dict[str, Tensor] | None:
    """The tensors of `key` that the folder holds; None, and no file any more, where that is missing or broken."""
    return _as_kept(folder / f"{key}.safetensors", load_tensors)


def keep(folder: Path, key: str, tensors: Mapping[str, Tensor]) -> None:
    """Store tensors for `kept`."""
    layout = _layout((name, TYPES[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items())
    with atomic_write(folder / f"{key}.safetensors") as part:
        save_tensors(part, tensors, {LAYOUT: layout})


def cached(folder: Path, key: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return the tensors of `key` from the folder, or make and store them; a broken file is made again."""
    found = kept(folder, key)
    if found is not None:
        return found
    tensors = make()
    keep(folder, key, tensors)
    return tensors


def kept_rows(folder: Path, key: str) -> dict[str, MappedTensor] | None:
    """As `kept`, to be mapped from disk. A file's size and header are looked at, not its bytes."""
    return _as_kept(folder / f"{key}.safetensors", open_tensors)


def cached_rows(folder: Path, key: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, MappedTensor]:
    """As `cached`, to be mapped from disk like `kept_rows`."""
    found = kept_rows(folder, key)
    if found is not None:
        return found
    keep(folder, key, make())
    return open_tensors(folder / f"{key}.safetensors")


def every(count: int, wanted: np.ndarray | None) -> np.ndarray:
    """The wanted rows in rising order, each once; all of them for None."""
    return np.arange(count) if wanted is None else np.unique(wanted)


def _picture_groups(pictures: PictureSet) -> Sequence[Sequence[int]]:
    """The pictures of each shape, in the order in which they are stored."""
    return pictures.groups() if isinstance(pictures, BucketedFiles) else [range(len(pictures))]


def _batches(pictures: PictureSet, rows: Sequence[int], encoders: Encoders) -> Batches:
    """How the pictures of one shape are encoded."""
    width, height = pictures.size, pictures.size
    if isinstance(pictures, BucketedFiles):
        width, height = pictures.shapes[pictures.of[rows[0]]]
    return Batches(len(rows), encoders.pictures_at_once(width * height), CHUNK)


def encode_pictures(
    pictures: PictureSet, encoders: Encoders, cache: Path, key: str, wanted: np.ndarray | None = None
) -> Rows:
    """Encode the wanted pictures: latents, float32, on disk. Some pictures at a time are in memory."""
    chosen, parts = every(len(pictures), wanted), list[Rows]()
    groups = _picture_groups(pictures)
    read = pictures.read_shaped if isinstance(pictures, BucketedFiles) else pictures.read
    for number, rows in enumerate(groups):
        place, own = cache / f"{key}-{number}", np.asarray(rows)

        def encode(some: Sequence[int], own: np.ndarray = own) -> dict[str, Tensor]:
            return {"latents": encoders.to_latents(read(own[some])).cpu()}

        mine = np.flatnonzero(np.isin(own, chosen))
        fill(place, mine, _batches(pictures, rows, encoders), encode, "encoding pictures", "picture", number)
        parts.append(read_rows(place, len(own)).get("latents") or StoredRows(len(own), []))
    return BucketedLatents(parts, groups) if isinstance(pictures, BucketedFiles) else parts[0]


def encode_captions(
    captions: Sequence[str],
    encoders: Encoders,
    cache: Path,
    key: str,
    wanted: np.ndarray | None = None,
    on_encoded: OnEncoded | None = None,
) -> dict[str, Rows]:
    """Encode the wanted captions and, last, the unconditional one: conditions, fp16, on disk."""
    place, count = cache / key, len(captions)

    def halves(states: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: state.half().cpu() for name, state in states.items()}

    def encode(some: Sequence[int]) -> dict[str, Tensor]:
        read = [captions[row] for row in some]
        if on_encoded is not None:
            on_encoded(read)
        return halves(encoders.encode(read))

    def null(_: Sequence[int]) -> dict[str, Tensor]:
        return halves(encoders.null(1))

    batches = Batches(count, encoders.prompts_at_once, SAID)
    fill(place, every(count, wanted), batches, encode, "encoding captions", "caption")
    fill(place, np.array([count]), Batches(count + 1, 1, 1), null, "", "caption")
    return dict(read_rows(place, count + 1))


@dataclass(frozen=True)
class Known:
    """What identifies a training set before anything of it is encoded.

    Attributes:
        pictures, captions: names of their stores; of prompts alone the first is "no-pictures".
        said: the distinct captions.
        rows: int64 [N, c]: which of them belong to which item.
        parts: fingerprints of what makes it up, by name (`training.run_folder.ITEMS`).
    """

    pictures: str
    captions: str
    said: tuple[str, ...]
    rows: Tensor
    parts: Mapping[str, str]

    @property
    def key(self) -> str:
        """Fingerprint of all of it."""
        return f"{self.pictures} {self.captions}"


def known(data: Captioned, fingerprint: str) -> Known:
    """Identify a training set by its pictures, captions and the `fingerprint` of what encodes them."""
    pictures, parts = data.pictures, {"encoders": fingerprint}
    seen = "no-pictures"
    if pictures is not None:
        digest = hashlib.sha256(f"{fingerprint} {pictures.fingerprint()}".encode())
        seen = f"latents-{digest.hexdigest()[:16]}"
        parts["size"] = f"{pictures.size}"
        parts["pictures"] = items(identity.hex() for identity in pictures.identities())
        if isinstance(pictures, BucketedFiles):
            shapes = [pictures.shapes[number] for number in pictures.of]
            parts["crops"] = items(f"{width:08x}{height:08x}" for width, height in shapes)
    captions = (json.dumps(list(row)).encode() for row in data.captions)
    parts["captions"] = items(hashlib.sha256(row).hexdigest() for row in captions)
    distinct = sorted({caption for row in data.captions for caption in row})
    digest = hashlib.sha256((fingerprint + json.dumps(distinct)).encode())
    number = {caption: i for i, caption in enumerate(distinct)}
    most = max(len(row) for row in data.captions)
    rows = torch.tensor([[number[row[i % len(row)]] for i in range(most)] for row in data.captions])
    return Known(seen, f"captions-{digest.hexdigest()[:16]}", tuple(distinct), rows, parts)


def lacking_pictures(data: Captioned, of: Known, cache: Path, wanted: np.ndarray | None) -> int:
    """How many of the wanted pictures are not encoded yet."""
    if data.pictures is None:
        return 0
    chosen, groups = every(len(data), wanted), _picture_groups(data.pictures)
    own = [np.flatnonzero(np.isin(np.asarray(rows), chosen)) for rows in groups]
    return sum(lacking(cache / f"{of.pictures}-{number}", rows) for number, rows in enumerate(own))


def lacking_captions(of: Known, cache: Path, wanted: np.ndarray | None) -> int:
    """How many of the wanted captions are not encoded yet."""
    return lacking(cache / of.captions, every(len(of.said), wanted))


def latent_set(
    data: Captioned,
    encoders: Encoders,
    fingerprint: str,
    cache: Path,
    shape: tuple[int, ...] = (),
    *,
    of: Known | None = None,
    wanted: Wanted = ALL,
    on_encoded: OnEncoded | None = None,
) -> LatentSet:
    """Encode pictures and captions, once for each (encoder weights, pictures, captions); of prompts alone no picture.

    Text states are kept in fp16, latents in fp32. All processes of a launch must ask: each encodes its share, and reads
    what the others kept.

    Args:
        cache: folder that is shared with other runs.
        shape: of a latent, for prompts alone.
        of: the set's identity, if it is known already.
        wanted: which pictures and captions will be asked for.
        on_encoded: called with captions as they are encoded; not with those that were kept.
    """
    of = of or known(data, fingerprint)
    latents: Rows
    if data.pictures is None:
        latents = torch.zeros(()).expand(len(data), *shape)
    else:
        latents = encode_pictures(data.pictures, encoders, cache, of.pictures, wanted.pictures)
    table = encode_captions(of.said, encoders, cache, of.captions, wanted.captions, on_encoded)
    return LatentSet(latents, table, of.rows, of.key, of.said, of.parts)
