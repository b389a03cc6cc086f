"""Scenes of index ranges, drawn by worker processes while a network trains."""

from __future__ import annotations

import hashlib
import multiprocessing
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Self

import numpy as np

from fewstep_worlds.stickers.draw import Picture, draw_scene
from fewstep_worlds.stickers.scene import SIDE, Scene, make_scene
from fewstep_worlds.stickers.sprites import load_sprites, sprite_folder
from fewstep_worlds.stickers.vocabulary import STYLES

TRAINING_SEED = 0
REFERENCE_SEED = 1
"""Seed of scenes that nothing trains on: references of distances, and what networks are judged on."""
ENDLESS = 2**62
"""Number of scenes of a seed and split, for a training loop."""


def draw_scenes(seed: int, indices: Iterable[int], split: str = "train", folder: Path | None = None) -> Picture:
    """Return the pictures of scenes, uint8 [N, 64, 64, 3].

    Raises:
        UserError: the sprite sheets cannot be read.
    """
    sprites = load_sprites(folder or sprite_folder())
    pictures = [draw_scene(make_scene(seed, int(index), split), sprites) for index in indices]
    return np.stack(pictures) if pictures else np.zeros((0, SIDE, SIDE, 3), np.uint8)


def make_scenes(seed: int, indices: Iterable[int], split: str = "train") -> list[Scene]:
    """Return the facts of scenes."""
    return [make_scene(seed, int(index), split) for index in indices]


def fingerprint(folder: Path | None = None) -> str:
    """Return a SHA-256 of the sprite sheets and of the first pictures that are drawn from them."""
    folder = folder or sprite_folder()
    digest = hashlib.sha256(draw_scenes(REFERENCE_SEED, range(16), folder=folder).tobytes())
    for style in STYLES:
        digest.update((folder / f"{style}.webp").read_bytes())
    return digest.hexdigest()


class SceneWorkers:
    """Worker processes that draw training scenes; with none, the caller's own process draws.

    `with SceneWorkers(workers, seed) as scenes:` ends them.
    """

    def __init__(self, workers: int, seed: int = TRAINING_SEED, folder: Path | None = None) -> None:
        self.seed = seed
        self.folder = folder or sprite_folder()
        load_sprites(self.folder)
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(workers, mp_context=context) if workers else None
        self._workers = workers

    def pictures(self, indices: Sequence[int] | np.ndarray) -> Picture:
        """Return the pictures of training scenes, uint8 [N, 64, 64, 3]."""
        if self._pool is None:
            return draw_scenes(self.seed, indices, folder=self.folder)
        parts = np.array_split(np.asarray(indices), self._workers)
        jobs = [self._pool.submit(draw_scenes, self.seed, part, "train", self.folder) for part in parts if len(part)]
        return np.concatenate([job.result() for job in jobs])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
