"""Networks under `torch.compile`: a graph for each role (a role is what a call finds in its adapters), gradient mode
and batch shape.

Compiled for the shapes of a training step alone. What runs beside it, at other shapes or up to a layer in the middle
(quality checks, features), runs `eagerly`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

BACKEND = "inductor"
MOST_GRAPHS = 64
"""Graphs that a network may have for pictures of one shape: a handful for its roles, and those of a roll-out."""


def compile_networks(networks: Sequence[nn.Module], backend: str = BACKEND, *, shapes: int = 1) -> None:
    """Compile the networks' calls, in place; a graph is made at the first call of its kind.

    Parameters, their names and what files hold stay the same. A role has a graph with gradient and one without, if it
    is called in both ways, and one for each batch shape: guided calls are of twice the batch, and the calls of a
    roll-out of as many rows as are on their way (`objectives.rounds`: R shapes for a batch of a multiple of R, at most
    twice as many for others).

    Args:
        shapes: how many the pictures have: every bucket has graphs of its own.
    """
    # every graph of a plan is a line in the same cache, whose usual limits are 8, and 256 for all networks of a
    # class; past them calls would run eagerly, without a word
    config, most = torch._dynamo.config, MOST_GRAPHS * len(networks) * shapes
    config.recompile_limit = max(config.recompile_limit, most)
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, most)
    for network in networks:
        network.compile(dynamic=False, backend=backend)


@contextmanager
def eagerly() -> Iterator[None]:
    """Run compiled networks as they are written, until the block ends."""
    if "torch._dynamo" not in sys.modules:  # nothing has been compiled; to ask would load all of it
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield
