"""Streams of random numbers keyed by (seed, purpose, sample, step). Light: no torch.

Philox is counter-based: the key holds (seed, purpose), the counter starts at (0, 0, sample, step), so that streams do
not overlap (2^128 numbers each).
"""

from __future__ import annotations

import zlib

import numpy as np


def generator(seed: int, purpose: str, sample: int = 0, step: int = 0) -> np.random.Generator:
    """Return the generator of one (seed, purpose, sample, step)."""
    key = np.array([seed, zlib.crc32(purpose.encode())], dtype=np.uint64)
    counter = np.array([0, 0, sample, step], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))
