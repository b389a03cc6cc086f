"""A synthesised sample beside the bare guided teacher calls that it is made of."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from fewstep.backbones.base import load_backbone
from fewstep.common.device import DTYPES
from fewstep.distillation.synthesis.settings import Kind, resolve_synthesis
from fewstep.distillation.synthesis.synthesize import synthesize
from perf.task import Task
from perf.timing import Timed, rounds

POINTS = 10
BATCHES = 5
FEWEST = 5
"""Fewest rounds: the figure is the difference of two timings."""


def time_synthesis(task: Task, kind: Kind) -> dict[str, Timed]:
    """`ours` (a whole set, written), and `guided calls` (as many network calls of the same batches, nothing else).

    The cost that a set has once, mostly the loading of the teacher, is subtracted: the time of a set of one batch is
    subtracted from that of a set of many.
    """
    place, batch = torch.device(task.device), task.batch
    backbone = load_backbone(task.folder, place)
    mixed = torch.autocast(place.type, DTYPES[task.precision], enabled=task.precision != "fp32")
    many = BATCHES * batch
    both = {name: value.to(place).repeat_interleave(2 * batch, 0) for name, value in backbone.encode(["x"]).items()}
    backbone.release_encoders()
    x = torch.randn(2 * batch, *backbone.latent_shape, device=place)
    t = torch.full((2 * batch,), 499.0, dtype=torch.float64)

    words = [f"grid={POINTS}", f"batch={batch}", f"shard={batch}", f"precision={task.precision}", f"kind={kind}"]
    config = resolve_synthesis([*words, f"device={task.device}"], task.folder)

    def drawn(samples: int) -> None:
        with tempfile.TemporaryDirectory() as held:
            synthesize(config, [f"picture {i}" for i in range(samples)], Path(held) / "set", quiet=True)

    @torch.no_grad()
    def bare() -> None:
        with mixed:
            for _ in range(BATCHES * POINTS):
                backbone.call(backbone.network, x, t, both)

    contenders = {"many": lambda: drawn(many + batch), "one": lambda: drawn(batch), "guided calls": bare}
    found = rounds(contenders, place, max(FEWEST, task.rounds // 2))
    ours = tuple(a - b for a, b in zip(found["many"].seconds, found["one"].seconds, strict=True))
    return {"ours": Timed(ours), "guided calls": found["guided calls"]}
