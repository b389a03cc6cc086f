"""Latents and text states computed once, kept on disk, and served by item number."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from fewstep import processes
from fewstep.data.buckets import BucketedFiles, BucketedLatents
from fewstep.data.pictures import Captioned, PictureSet
from fewstep.device import sent
from fewstep.draws import Draws
from fewstep.errors import UserError
from fewstep.files import atomic_write
from fewstep.mapped import Mapped, MappedRows, Rows, tensors_in
from fewstep.processes import together
from fewstep.tensors import load_tensors, save_tensors

CHUNK = 512
"""Pictures read and encoded at a time."""
SAID = 4096
"""Captions encoded at a time: 1.3 GB of SDXL's states in half precision."""


Look = Callable[[Sequence[str]], None]


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
    """

    latents: Rows
    table: Mapping[str, Rows]
    rows: Tensor
    key: str
    said: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.latents)

    @property
    def captions(self) -> int:
        """K, the distinct captions: the rows of the table before the unconditional one."""
        return len(next(iter(self.table.values()))) - 1

    def drawn(self, items: Tensor, draws: Draws, empty: float) -> Tensor:
        """Rows of the table, int64 [B]: one of the captions of each item, drawn; the unconditional one instead for a
        share `empty` of them."""
        chosen = draws.integers("caption", 0, self.rows.shape[1])
        rows = self.rows[items, chosen]
        if empty > 0:
            rows = torch.where(draws.chance("empty prompt", empty), self.captions, rows)
        return rows

    def condition(self, items: Tensor, draws: Draws, empty: float, device: torch.device) -> dict[str, Tensor]:
        """The conditions in the `drawn` rows."""
        return self.states(self.drawn(items, draws, empty), device)

    def null(self, count: int, device: torch.device) -> dict[str, Tensor]:
        """The unconditional condition, one row that is seen `count` times."""
        one = self.states(torch.tensor([-1]), device)
        return {name: row.expand(count, *row.shape[1:]) for name, row in one.items()}

    def states(self, rows: Tensor, device: torch.device) -> dict[str, Tensor]:
        """The conditions in the given rows of the table."""
        # widened there: half the bytes go over
        return {name: sent(states[rows], device).float() for name, states in self.table.items()}


def kept(folder: Path, key: str) -> dict[str, Tensor] | None:
    """The tensors of `key` that the folder holds; None, and no file any more, where that is missing or broken."""
    path = folder / f"{key}.safetensors"
    if path.is_file():
        try:
            return load_tensors(path)
        except UserError:
            path.unlink(missing_ok=True)
    return None


def keep(folder: Path, key: str, tensors: Mapping[str, Tensor]) -> None:
    """Store tensors for `kept`."""
    with atomic_write(folder / f"{key}.safetensors") as part:
        save_tensors(part, tensors)


def cached(folder: Path, key: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return the tensors of `key` from the folder, or make and store them; a broken file is made again."""
    found = kept(folder, key)
    if found is not None:
        return found
    tensors = make()
    keep(folder, key, tensors)
    return tensors


def kept_rows(folder: Path, key: str) -> dict[str, Mapped] | None:
    """As `kept`, to be mapped from disk. A file's size and header are looked at, not its bytes."""
    path = folder / f"{key}.safetensors"
    if path.is_file():
        try:
            return tensors_in(path)
        except UserError:
            path.unlink(missing_ok=True)
    return None


def cached_rows(folder: Path, key: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Mapped]:
    """As `cached`, to be mapped from disk like `kept_rows`."""
    found = kept_rows(folder, key)
    if found is not None:
        return found
    keep(folder, key, make())
    return tensors_in(folder / f"{key}.safetensors")


class Chunk(NamedTuple):
    """One file of many: how much is in it, and what makes its tensors."""

    size: int
    make: Callable[[], dict[str, Tensor]]


def shared_rows(folder: Path, chunks: Mapping[str, Chunk], title: str, unit: str) -> list[dict[str, Mapped]]:
    """`cached_rows` of each key, in order. The processes of a launch take chunks in turn; all must ask.

    Raises:
        UserError: it failed in another process.
    """
    own = list(chunks)[processes.rank() :: processes.count()]
    total = sum(chunks[key].size for key in own)
    silent = len(chunks) == 1 or not processes.is_main()
    with together(), tqdm(total=total, desc=title, unit=unit, disable=silent) as bar:
        for key in own:
            cached_rows(folder, key, chunks[key].make)
            bar.update(chunks[key].size)
    return [tensors_in(folder / f"{key}.safetensors") for key in chunks]


def encode_all(pictures: PictureSet, encoders: Encoders, cache: Path, key: str) -> Rows:
    """Latents of all pictures, float32, on disk; some pictures at a time are in memory, and kept once encoded."""
    groups: Sequence[Sequence[int]] = [range(len(pictures))]
    read = pictures.read
    if isinstance(pictures, BucketedFiles):
        groups, read = pictures.groups(), pictures.read_shaped

    def encode(some: Sequence[int]) -> dict[str, Tensor]:
        return {"latents": encoders.to_latents(read(some)).cpu()}

    parted = [[rows[start : start + CHUNK] for start in range(0, len(rows), CHUNK)] for rows in groups]
    chunks = {
        f"{key}-{some[0]}-{some[-1] + 1}": Chunk(len(some), partial(encode, some)) for part in parted for some in part
    }
    found = iter(shared_rows(cache, chunks, "encoding pictures", "picture"))
    parts = [MappedRows([next(found)["latents"] for _ in part]) for part in parted]
    return BucketedLatents(parts, groups) if isinstance(pictures, BucketedFiles) else parts[0]


def encode_captions(
    captions: Sequence[str], encoders: Encoders, cache: Path, key: str, look: Look | None = None
) -> dict[str, Rows]:
    """Conditions of the captions and, last, the unconditional one, fp16, on disk; some at a time are in memory."""

    def encode(start: int) -> dict[str, Tensor]:
        some = captions[start : start + SAID]
        states = encoders.encode(some)
        if look is not None:
            look(some)
        if start + SAID >= len(captions):
            null = encoders.null(1)
            states = {name: torch.cat([state, null[name]]) for name, state in states.items()}
        return {name: state.half().cpu() for name, state in states.items()}

    chunks = {
        f"{key}-{start}": Chunk(min(SAID, len(captions) - start), partial(encode, start))
        for start in range(0, len(captions), SAID)
    }
    parts = shared_rows(cache, chunks, "encoding captions", "caption")
    return {name: MappedRows([part[name] for part in parts]) for name in parts[0]}


def latent_set(
    data: Captioned,
    encoders: Encoders,
    fingerprint: str,
    cache: Path,
    shape: tuple[int, ...] = (),
    look: Look | None = None,
) -> LatentSet:
    """Encode pictures and captions, once for each (encoder weights, pictures, captions); of prompts alone no picture.

    Text states are kept in fp16, latents in fp32. All processes of a launch must ask: each encodes its share of the
    chunks, and reads what the others kept.

    Args:
        shape: of a latent, for prompts alone.
        look: called with captions as they are encoded, once for each; not with those that were kept.
    """
    pictures = data.pictures
    if pictures is None:
        seen = "no-pictures"
        latents: Rows = torch.zeros(()).expand(len(data), *shape)
    else:
        digest = hashlib.sha256(f"{fingerprint} {pictures.fingerprint()}".encode())
        seen = f"latents-{digest.hexdigest()[:16]}"
        latents = encode_all(pictures, encoders, cache, seen)
    distinct = sorted({caption for row in data.captions for caption in row})
    digest = hashlib.sha256((fingerprint + json.dumps(distinct)).encode())

    said = f"captions-{digest.hexdigest()[:16]}"
    table = encode_captions(distinct, encoders, cache, said, look)
    number = {caption: i for i, caption in enumerate(distinct)}
    most = max(len(row) for row in data.captions)
    rows = torch.tensor([[number[row[i % len(row)]] for i in range(most)] for row in data.captions])
    return LatentSet(latents, table, rows, f"{seen} {said}", tuple(distinct))
