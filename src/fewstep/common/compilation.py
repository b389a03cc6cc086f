"""Networks under `torch.compile`: one graph per role, gradient mode and batch shape.

Graphs are for the shapes of a training step alone; validation and features, at other shapes, run `eagerly`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

BACKEND = "inductor"
MOST_GRAPHS = 64
"""Graphs of a network for pictures of one shape: a handful for its roles, and those of a roll-out."""


def compile_networks(networks: Sequence[nn.Module], backend: str = BACKEND, *, shapes: int = 1) -> None:
    """Compile the networks' calls, in place; a graph is made at the first call of its kind.

    Parameters and their names stay the same. A role has graphs with and without gradient, and one per batch shape:
    guided calls have twice the batch, and those of a roll-out R shapes for a batch of a multiple of R, at most twice as
    many for others.

    Args:
        shapes: number of picture shapes; every bucket has graphs of its own.
    """
    # all graphs share one cache with default limits of 8, and 256 per class; past them calls silently run eagerly
    config, most = torch._dynamo.config, MOST_GRAPHS * len(networks) * shapes
    config.recompile_limit = max(config.recompile_limit, most)
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, most)
    for network in networks:
        network.compile(dynamic=False, backend=backend)


@contextmanager
def eagerly() -> Iterator[None]:
    """Run compiled networks eagerly until the block ends."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and dynamo need not be imported
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield
