"""A synthesised set, read sample by sample: no more of it is in memory than was asked for."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from fewstep.backbones.pipeline_folder import PipelineFolder
from fewstep.common.device import DTYPES
from fewstep.common.errors import UserError
from fewstep.common.files import sha256
from fewstep.common.mapped_tensors import MappedTensor, map_tensors, open_tensors
from fewstep.distillation.synthesis.planning import fingerprints
from fewstep.distillation.synthesis.record import (
    CONDITIONS,
    MANIFEST,
    PROMPTS,
    Manifest,
    Plan,
    check_files,
    is_whole,
    read_manifest,
)

Items = Tensor | Sequence[int]
"""Sample numbers, [B], in any order."""


def read_synthesis(folder: Path | str, *, widen: bool = True) -> Synthesis:
    """Open a finished set. Sizes and headers are checked here, checksums by `Synthesis.verify`.

    Args:
        widen: latents, points and predictions come as fp32, whatever they are stored in; False: in their own type.

    Raises:
        UserError: it is none, is not finished, or a file of it is missing or of another size or layout.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    check_files(folder, manifest)
    return Synthesis(folder, manifest, DTYPES["fp32" if widen else manifest.plan.settings.dtype])


class Synthesis:
    """A finished set. Samples go by number, 0 .. len - 1; points by their place in `times`, 0 for the end point.

    What is read comes on the CPU, as `kind` whatever it is stored in.

    Attributes:
        kind: fp32, or the type that it is stored in.
        times: of the points, rising, float64 [N + 1]: the end point, then the grid.
    """

    def __init__(self, folder: Path, manifest: Manifest, kind: torch.dtype = torch.float32) -> None:
        self.folder = folder
        self.manifest = manifest
        self.kind = kind
        self.times = torch.tensor(manifest.plan.times, dtype=torch.float64)
        self._shards: dict[int, dict[str, MappedTensor]] = {}

    @property
    def plan(self) -> Plan:
        """What it was drawn from, and how."""
        return self.manifest.plan

    def __len__(self) -> int:
        return self.plan.samples

    @cached_property
    def key(self) -> str:
        """Fingerprint of the whole set: the SHA-256 of its manifest, which holds those of its files."""
        return sha256(self.folder / MANIFEST)

    @cached_property
    def prompts(self) -> list[str]:
        """The K distinct prompts."""
        return (self.folder / PROMPTS).read_text(encoding="utf-8").split("\n")[:-1]

    @cached_property
    def table(self) -> dict[str, Tensor]:
        """Text states of the distinct prompts and, last, the unconditional one, fp16 [K + 1, ...], mapped from disk."""
        return {name: torch.from_numpy(array) for name, array in map_tensors(self.folder / CONDITIONS).items()}

    @cached_property
    def _inputs(self) -> dict[str, Tensor]:
        shards = [self._shard(number) for number in range(self.plan.shards)]
        return {
            name: torch.from_numpy(np.concatenate([shard[name].array() for shard in shards]))
            for name in ("prompt", "seed", "omega")
        }

    def rows(self, items: Items) -> Tensor:
        """Row of `table` (and of `prompts`) that each sample was drawn with, int64 [B]; K for the empty prompt."""
        return self._inputs["prompt"][self._numbers(items)]

    def omega(self, items: Items) -> Tensor:
        """Guidance that each walk took, in the papers' convention, float64 [B]; 0 for none."""
        return self._inputs["omega"][self._numbers(items)]

    def seeds(self, items: Items) -> Tensor:
        """Seed of the CPU generator that each start noise came from, int64 [B]."""
        return self._inputs["seed"][self._numbers(items)]

    def latents(self, items: Items) -> Tensor:
        """End points, [B, C, h, w]."""
        return self._read("latents", self._numbers(items))

    def points(self, items: Items, index: Tensor | int) -> Tensor:
        """x at times[index], [B, C, h, w]; `index` is one for all, or int64 [B].

        Raises:
            UserError: the set holds end points alone.
            IndexError: there is no such point.
        """
        numbers = self._numbers(items)
        return self._read("points", numbers, self._index(numbers, index, lowest=0))

    def predictions(self, items: Items, index: Tensor | int) -> tuple[Tensor, Tensor]:
        """What the network said at `points(items, index)` with and without the prompt, [B, C, h, w] each.

        Its own output, `plan.prediction`. The end point, index 0, has none.

        Raises:
            UserError: the set holds end points alone.
            IndexError: there is no such point, or it is the end point.
        """
        numbers = self._numbers(items)
        place = self._index(numbers, index, lowest=1) - 1
        return self._read("with_prompt", numbers, place), self._read("without_prompt", numbers, place)

    def verify(self, *, quiet: bool = False) -> None:
        """Read every file once and compare it with its checksum.

        Raises:
            UserError: naming the first broken file.
        """
        notes = self.manifest.notes
        with tqdm(
            total=sum(note.bytes for note in notes), desc="verifying", unit="B", unit_scale=True, disable=quiet
        ) as bar:
            for note in notes:
                if not is_whole(self.folder, note):
                    raise UserError(
                        f"{self.folder / note.file} is broken; run its `fewstep synthesize` again to mend it"
                    )
                bar.update(note.bytes)

    def check_teacher(self, folder: PipelineFolder) -> None:
        """Refuse another teacher than the one that drew the set.

        Raises:
            UserError: naming what differs.
        """
        for name, found in fingerprints(folder).items():
            drawn = getattr(self.plan, name)
            if found != drawn:
                raise UserError(
                    f"{self.folder} was drawn with another {name} ({drawn[:12]}) than that of {folder.path} "
                    f"({found[:12]}); give the teacher that drew it"
                )

    def _numbers(self, items: Items) -> Tensor:
        numbers = torch.as_tensor(items, dtype=torch.int64)
        _check_range("item", numbers, 0, len(self) - 1)
        return numbers

    def _index(self, numbers: Tensor, index: Tensor | int, lowest: int) -> Tensor:
        if self.plan.settings.kind != "trajectories":
            raise UserError(
                f"{self.folder} holds kind = 'latents', end points alone; the kind that holds points is 'trajectories'"
            )
        place = torch.as_tensor(index, dtype=torch.int64).expand(len(numbers))
        _check_range("index", place, lowest, len(self.times) - 1)
        return place

    def _shard(self, number: int) -> dict[str, MappedTensor]:
        if number not in self._shards:
            self._shards[number] = open_tensors(self.folder / self.manifest.shards[number].file)
        return self._shards[number]

    def _read(self, name: str, numbers: Tensor, index: Tensor | None = None) -> Tensor:
        size = self.plan.settings.shard
        found = torch.empty((len(numbers), *self.plan.shape), dtype=self.kind)
        for number in np.unique(numbers // size).tolist():
            chosen = numbers // size == number
            rows = (numbers[chosen] - number * size).numpy()
            array = self._shard(number)[name].array()
            part = array[rows] if index is None else array[rows, index[chosen].numpy()]
            found[chosen] = torch.from_numpy(part).to(self.kind)
        return found


def _check_range(what: str, values: Tensor, lowest: int, highest: int) -> None:
    if len(values) and not lowest <= int(values.min()) <= int(values.max()) <= highest:
        raise IndexError(f"{what} {values.tolist()} is not within {lowest} .. {highest}")
