"""Networks under `torch.compile`: one graph a role, because a role is what a call finds in its adapters.

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


def compile_networks(networks: Sequence[nn.Module], backend: str = BACKEND) -> None:
    """Compile the networks' calls, in place; a graph is made at the first call of each role and shape.

    Parameters, their names and what files hold stay the same. A role that is called with and without gradient has a
    graph for each.
    """
    # every network and role of a plan is a line in the same cache, whose usual limit is 8
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 16 * len(networks))
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
