"""A synthesised set as training data: latents, or trajectories, read from disk as they are used."""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.backbones.base import Backbone
from fewstep.common.device import DTYPES
from fewstep.common.errors import UserError
from fewstep.common.mapped_tensors import Rows
from fewstep.data.latents import LatentSet
from fewstep.distillation.synthesis.reader import Synthesis
from fewstep.distillation.synthesis.record import SynthesizedSet
from fewstep.distillation.trajectory import Trajectories
from fewstep.methods.config import ConsistencyConfig


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
            "method.start = 'data' needs clean data; use a set of end = 'clean'",
            field="data.source",
        )
    rows: Tensor = synthesis.rows(range(len(synthesis)))[:, None]
    key = f"synthesis {synthesis.key}"
    return LatentSet(latents, synthesis.table, rows, key, tuple(synthesis.prompts)), trajectories
