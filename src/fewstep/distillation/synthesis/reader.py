"""A synthesised set, read sample by sample as it is used, and as training data."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from fewstep.backbones.base import Backbone
from fewstep.backbones.pipeline_folder import PipelineFolder
from fewstep.common.device import DTYPES
from fewstep.common.errors import UserError
from fewstep.common.files import sha256
from fewstep.common.mapped_tensors import MappedRows, MappedTensor, Rows, map_tensors, open_tensors
from fewstep.common.messages import Bar
from fewstep.data.latents import LatentSet
from fewstep.distillation.synthesis.planning import fingerprints
from fewstep.distillation.synthesis.record import CONDITIONS, MANIFEST, PROMPTS, Plan, SynthesizedSet, is_whole
from fewstep.distillation.trajectory import Trajectories
from fewstep.methods.config import ConsistencyConfig

Items = Tensor | Sequence[int]
"""Sample numbers, [B], in any order."""


class Synthesis:
    """The samples of a finished set, by number (0 .. len - 1), on the CPU; points by their place in `times`.

    Attributes:
        kind: dtype that is returned; the stored one may differ.
        times: of the points, rising, float64 [N + 1]: the end point, then the grid.
    """

    def __init__(self, files: SynthesizedSet, kind: torch.dtype = torch.float32) -> None:
        self.folder = files.folder
        self.manifest = files.manifest
        self.kind = kind
        self.times = torch.tensor(self.plan.times, dtype=torch.float64)
        self._mapped: dict[str, MappedRows] = {}

    @property
    def plan(self) -> Plan:
        """The settings and fingerprints that it was drawn with."""
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
        return map_tensors(self.folder / CONDITIONS)

    @cached_property
    def _shards(self) -> list[dict[str, MappedTensor]]:
        return [open_tensors(self.folder / record.file) for record in self.manifest.shards]

    @cached_property
    def _inputs(self) -> dict[str, Tensor]:
        names = ("prompt", "seed", "omega")
        return {
            name: torch.from_numpy(np.concatenate([shard[name].array() for shard in self._shards])) for name in names
        }

    def mapped(self, name: str) -> MappedRows:
        """Return a tensor of all samples as it is stored: `latents`, `points`, `with_prompt` or `without_prompt`.

        Raises:
            UserError: the set holds end points alone.
        """
        if name not in self._shards[0]:
            raise UserError(
                f"{self.folder} holds kind = 'latents', end points alone; the kind that holds points is 'trajectories'"
            )
        if name not in self._mapped:
            self._mapped[name] = MappedRows([shard[name] for shard in self._shards])
        return self._mapped[name]

    @property
    def trajectories(self) -> Trajectories:
        """The trajectories of all samples, with the network's outputs, in the type that they are stored in."""
        outputs = self.mapped("with_prompt"), self.mapped("without_prompt")
        return Trajectories(self.mapped("points"), self._inputs["omega"], outputs)

    def rows(self, items: Items) -> Tensor:
        """Return each sample's row of `table` (and of `prompts`), int64 [B]; K for the empty prompt."""
        return self._inputs["prompt"][self._numbers(items)]

    def omega(self, items: Items) -> Tensor:
        """Return each trajectory's guidance in the papers' convention, float64 [B]; 0 for none."""
        return self._inputs["omega"][self._numbers(items)]

    def seeds(self, items: Items) -> Tensor:
        """Return the seed of the CPU generator of each start noise, int64 [B]."""
        return self._inputs["seed"][self._numbers(items)]

    def latents(self, items: Items) -> Tensor:
        """Return end points, [B, C, h, w]."""
        return self.mapped("latents")[self._numbers(items)].to(self.kind)

    def points(self, items: Items, index: Tensor | int) -> Tensor:
        """Return x at times[index], [B, C, h, w]; `index` is one for all, or int64 [B].

        Raises:
            UserError: the set holds end points alone.
            IndexError: there is no such sample or point.
        """
        return self._at("points", items, index, lowest=0)

    def predictions(self, items: Items, index: Tensor | int) -> tuple[Tensor, Tensor]:
        """Return the network's outputs (`plan.prediction`) at `points(items, index)`, with and without the prompt.

        Both are [B, C, h, w]. The end point, index 0, has none.

        Raises:
            UserError: the set holds end points alone.
            IndexError: there is no such sample or point, or it is the end point.
        """
        return self._at("with_prompt", items, index, lowest=1), self._at("without_prompt", items, index, lowest=1)

    def verify(self, *, quiet: bool = False) -> None:
        """Read every file once and compare it with its checksum.

        Raises:
            UserError: naming the first broken file.
        """
        records = self.manifest.records
        total = sum(record.bytes for record in records)
        with Bar(total=total, desc="verifying", unit="B", unit_scale=True, disable=quiet) as bar:
            for record in records:
                if not is_whole(self.folder, record):
                    raise UserError(
                        f"{self.folder / record.file} is broken; run its `fewstep synthesize` again to repair it"
                    )
                bar.update(record.bytes)

    def check_teacher(self, folder: PipelineFolder) -> None:
        """Refuse another teacher than the one that drew the set."""
        for name, found in fingerprints(folder).items():
            drawn = getattr(self.plan, name)
            if found != drawn:
                raise UserError(
                    f"{self.folder} was drawn with another {name} ({drawn[:12]}) than that of {folder.path} "
                    f"({found[:12]}); use the teacher that drew it",
                    field="teacher",
                )

    def _numbers(self, items: Items) -> Tensor:
        numbers = torch.as_tensor(items, dtype=torch.int64)
        _check_range("item", numbers, 0, len(self) - 1)
        return numbers

    def _at(self, name: str, items: Items, index: Tensor | int, lowest: int) -> Tensor:
        numbers, rows = self._numbers(items), self.mapped(name)
        place = torch.as_tensor(index, dtype=torch.int64).expand(len(numbers))
        _check_range("index", place, lowest, len(self.times) - 1)
        return rows.at(numbers, place - lowest).to(self.kind)


def _check_range(what: str, values: Tensor, lowest: int, highest: int) -> None:
    if len(values) and not lowest <= int(values.min()) <= int(values.max()) <= highest:
        raise IndexError(f"{what} {values.tolist()} is not within {lowest} .. {highest}")


def training_set(
    files: SynthesizedSet, method: ConsistencyConfig, backbone: Backbone
) -> tuple[LatentSet, Trajectories | None]:
    """Return a set as training data in its stored types, and its trajectories if the recipe starts on them.

    Nothing is read yet, and no encoder is needed. With trajectories, the latents are one zero, expanded.

    Raises:
        UserError: it was drawn by another teacher, or the recipe starts on clean data and its end points are not clean.
    """
    # in the stored type: half the bytes go to the device, and are widened there
    synthesis = Synthesis(files, DTYPES[files.manifest.plan.settings.dtype])
    synthesis.check_teacher(backbone.folder)
    drawn = synthesis.plan.settings
    latents: Rows = synthesis.mapped("latents")
    trajectories = None
    if method.start == "trajectory":
        assert (drawn.grid, drawn.end) == (method.grid, method.end)  # `checks.check_distillation`
        latents, trajectories = torch.zeros(()).expand(len(synthesis), *backbone.latent_shape), synthesis.trajectories
    elif method.start == "data" and drawn.end != "clean":
        raise UserError(
            f"data.source = {str(files.folder)!r} holds end points that are not clean (end = {drawn.end!r}), "
            "method.start = 'data' needs clean data; use a set of end = 'clean'"
        )
    rows: Tensor = synthesis.rows(range(len(synthesis)))[:, None]
    key = f"synthesis {synthesis.key}"
    return LatentSet(latents, synthesis.table, rows, key, tuple(synthesis.prompts)), trajectories
