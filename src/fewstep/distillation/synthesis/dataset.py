"""Training on a set that `fewstep synthesize` drew: latents as data, or trajectories, read as they are needed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fewstep.backbones.base import Backbone
from fewstep.common.errors import UserError
from fewstep.common.mapped_tensors import Rows
from fewstep.data.latents import LatentSet
from fewstep.diffusion.grid import end_time, training_grid
from fewstep.distillation.synthesis.reader import Synthesis, read_synthesis
from fewstep.methods.config import ConsistencyConfig


@dataclass(frozen=True)
class FromSet:
    """The trajectories of some samples of a set (`methods.pair.StoredTrajectories`)."""

    synthesis: Synthesis
    items: Tensor

    def point(self, index: Tensor) -> Tensor:
        """x at those times of the grid, [B, ...]; -1 is the end point."""
        return self.synthesis.points(self.items, index + 1)

    def outputs(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """What the network said there, with and without the prompt."""
        return self.synthesis.predictions(self.items, index + 1)


@dataclass(frozen=True)
class EndPoints:
    """The latents of a set as training data (`mapped.Rows`)."""

    synthesis: Synthesis

    def __len__(self) -> int:
        return len(self.synthesis)

    def __getitem__(self, rows: Tensor) -> Tensor:
        """Latents as they are stored, [B, C, h, w]."""
        return self.synthesis.latents(rows)

    @property
    def nbytes(self) -> int:
        """Bytes of the set's files."""
        return sum(note.bytes for note in self.synthesis.manifest.notes)


def open_set(folder: Path, method: ConsistencyConfig, backbone: Backbone) -> tuple[Synthesis, LatentSet]:
    """A finished set as training data; no picture and no encoder is needed.

    It comes in the type it is stored in. Nothing is read yet; of trajectories, one number stands for all latents.

    Raises:
        UserError: it is no finished set, was drawn by another teacher, or its points are not those of `method.grid`.
    """
    synthesis = read_synthesis(folder, widen=False)  # what it is widened on is the device
    synthesis.check_teacher(backbone.folder)
    every = torch.arange(len(synthesis))
    if method.start == "trajectory":
        path = backbone.path
        wanted = torch.cat([torch.tensor([end_time(path, method.end)]).double(), training_grid(path, method.grid)])
        if not torch.equal(synthesis.times, wanted):
            drawn = synthesis.plan.settings
            raise UserError(
                f"data.source = {str(folder)!r} holds points of grid = {drawn.grid}, end = {drawn.end!r}, not of "
                f"method.grid = {method.grid}, end = {method.end!r}; the nearest legal method.grid is {drawn.grid}"
            )
        latents: Rows = torch.zeros(()).expand(len(synthesis), *backbone.latent_shape)
    else:
        if method.start == "data" and synthesis.plan.settings.end != "clean":
            raise UserError(
                f"data.source = {str(folder)!r} holds end points that are not clean (end = 'index0'), and "
                "method.start = 'data' takes them for data; the nearest is a set of end = 'clean'"
            )
        latents = EndPoints(synthesis)
    rows = synthesis.rows(every)[:, None]
    return synthesis, LatentSet(latents, synthesis.table, rows, f"synthesis {synthesis.key}", tuple(synthesis.prompts))
