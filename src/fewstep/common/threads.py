"""How the threads of an operation wait for each other on a CPU; to be said before torch is imported."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

SPINS = "1000"
"""Looks at a lock before a thread sleeps: some ten microseconds, in which most others arrive.

Measured on two cores of an AMD EPYC, seconds of a student's and a target's call in training on the bundled world:
asleep at once .33 alone and .33 beside a busy process, after 1,000 looks .21 and .47, after 20,000 .20 and 2.1.
"""


def wait_briefly() -> None:
    """Let waiting threads look for a moment and then sleep; one that looks on takes the core that it waits for.

    What the environment says of it already stays. To GNU's OpenMP, the one that PyTorch's own builds for Linux bring,
    waiting is `active` with so many looks: `passive` has none beside a thread that reads ahead. Others know no count,
    and would look for ever.
    """
    if "OMP_WAIT_POLICY" in os.environ:
        return
    if brings_gnu():
        os.environ["OMP_WAIT_POLICY"] = "active"
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
    else:
        os.environ["OMP_WAIT_POLICY"] = "passive"


def brings_gnu() -> bool:
    """Whether the torch that is installed brings GNU's OpenMP; it is not imported for the answer."""
    torch = find_spec("torch")
    if torch is None or torch.origin is None:
        return False
    root = Path(torch.origin).parent
    return any([*root.glob("lib/libgomp*"), *root.parent.glob("torch.libs/libgomp*")])
