"""Waiting of OpenMP threads on a CPU; set before torch is imported."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

SPINS = "1000"
"""Spins before a waiting thread sleeps, about ten microseconds.

Measured on two cores of an AMD EPYC, seconds of a student's and a target's call in training on the bundled world:
no spinning .33 alone and .33 beside a busy process, 1,000 spins .21 and .47, 20,000 spins .20 and 2.1.
"""


def limit_spinning() -> None:
    """Let waiting OpenMP threads spin briefly and then sleep, so that they leave the core to other processes.

    An existing OMP_WAIT_POLICY is kept. GNU's OpenMP, which PyTorch's Linux builds bundle, needs the policy `active`
    with a spin count: under `passive` it does not spin while more threads run than there are cores. Other runtimes
    have no count and would spin without end.
    """
    if "OMP_WAIT_POLICY" in os.environ:
        return
    if uses_gnu_openmp():
        os.environ["OMP_WAIT_POLICY"] = "active"
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
    else:
        os.environ["OMP_WAIT_POLICY"] = "passive"


def uses_gnu_openmp() -> bool:
    """Return whether the installed torch bundles GNU's OpenMP, without importing it."""
    torch = find_spec("torch")
    if torch is None or torch.origin is None:
        return False
    root = Path(torch.origin).parent
    return any([*root.glob("lib/libgomp*"), *root.parent.glob("torch.libs/libgomp*")])
